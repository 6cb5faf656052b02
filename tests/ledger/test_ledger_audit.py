"""``adam-ghost audit`` fails by default where scores are not to be trusted, and says why."""

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
import made
from typer.testing import CliRunner

from adam_ghost import use
from adam_ghost.cli import app
from adam_ghost.ledger.reader import open_ledger
from adam_ghost.report.gather import gather

UNTIED_HEAD = {"gap": 0.93, "coverage": 0.9, "r": 0.999}
CASES = {
    "all is well": ({"r": 0.999}, [], 0, "within 0.0%"),
    "an untied head outside its module": (UNTIED_HEAD, [], 1, "explain 90.0% of the parameters, less than 99.0%"),
    "its gap": (UNTIED_HEAD, ["--min-coverage", "0"], 1, "of its gradient, more than 5.0%"),
    "as much as is admitted": (UNTIED_HEAD, ["--min-coverage", "0.9", "--max-gap", "2"], 0, "cover 90.0% of the parameters"),
    "a tied head outside its module": ({"gap": 0.31}, [], 1, "of its gradient, more than 5.0%"),
    "a smaller gap than is admitted": ({"gap": 0.03}, [], 0, ""),
    "a larger one": ({"gap": 0.03}, ["--max-gap", "0.01"], 1, "of its gradient, more than 1.0%"),
    "a gap that is no number": ({"gap": float("nan")}, [], 1, "miss nan% of its gradient"),
    "samples alone": ({"r": 0.999, "alone": 1e-5}, [], 0, ""),
    "other samples alone": ({"r": 0.999, "alone": 0.46}, [], 1, "from the recorded ones by more than 0.001 in steps 1"),
    "in half precision": ({"r": 0.999, "alone": 0.01}, ["--max-alone", "0.05"], 0, ""),
    "no number alone": ({"r": 0.999, "alone": float("nan")}, [], 1, "alone differ"),
    "poor correlation": ({"r": 0.5}, [], 1, "correlation is below 0.9 in steps 1, 2"),
    "of a drop that float32 can tell": ({"r": 0.5, "drop": 1e-5}, [], 1, "correlation is below 0.9 in steps 1, 2, 3, 4, 5, 6, …"),
    "of one that it cannot": ({"r": 0.5, "drop": 1e-7}, [], 0, "In 15 audited steps"),
    "correlation that is no number": ({"r": float("nan")}, [], 1, "correlation is below 0.9"),
}


@pytest.mark.parametrize("case", CASES)
def test_audit(tmp_path, case):
    options, arguments, code, says = CASES[case]
    made.write(tmp_path, **options)
    done = CliRunner().invoke(app, ["audit", str(tmp_path), *arguments])
    assert done.exit_code == code, done.output
    assert says in " ".join(done.output.split())


def test_tables_and_the_report_say_what_the_audits_do(tmp_path):
    made.write(tmp_path / "bad", r=0.5)
    made.write(tmp_path / "good", r=0.95)
    made.write(tmp_path / "none")
    for command in (["top"], ["groups"], ["watch", "--times", "1"]):
        said = {
            run: " ".join(CliRunner().invoke(app, [command[0], str(tmp_path / run), *command[1:]]).output.split())
            for run in ("bad", "good", "none")
        }
        assert "audits do not bear these scores out: in 15 of 15 audited steps (steps 1, 2, 3, 4, 5, 6, …)" in said["bad"]
        assert "Audits of 15 steps bear the scores out: R of 0.950 at least." in said["good"]
        assert "udit" not in said["none"]
    with pytest.warns(UserWarning, match="audits do not bear these scores out"):
        use.keep(tmp_path / "bad", 0.1)
    use.keep(tmp_path / "good", 0.1)
    notes = {}
    for run in ("bad", "good", "none"):
        with open_ledger(tmp_path / run) as ledger:
            notes[run] = gather(ledger, "standardized", None)["targets"][0]["headline"]["note"]
    assert notes["bad"].startswith("The run's own audits do not bear these scores out")
    assert "udit" not in notes["good"] + notes["none"]


def test_every_reason_is_given(tmp_path):
    made.write(tmp_path, gap=0.93, coverage=0.9, r=0.5)
    done = CliRunner().invoke(app, ["audit", str(tmp_path)])
    assert all(part in done.output for part in ("correlation is below", "of its gradient", "explain 90.0%"))
