"""The programs as their users run them: the demo, the benchmarks and the examples, at their smallest."""

import csv
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adam_ghost

ROOT = Path(__file__).resolve().parent.parent


def run(*args, **options):
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_demo(tmp_path):
    out = run("-m", "adam_ghost", "demo", "--steps", "8", "--samples", "64", "--audits", "2", "--out", str(tmp_path))
    for part in ("Score by domain", "Most helpful", "Most harmful", "Audit of one step", "Audit of windows", "AUROC", "Throughput"):
        assert part in out
    assert "Completeness" in out and "summed training loss" in out and "scores.csv" in out
    assert " ".join(out.split("Take-away: ")[1].split()).endswith(").")  # the last words
    assert "\x1b" not in out
    if importlib.util.find_spec("duckdb"):
        assert str(tmp_path / "report.html") in out and 5e4 < (tmp_path / "report.html").stat().st_size < 1.5e6
        for name in ("ledger", "windows"):
            assert list((tmp_path / name / "scores").glob("*.parquet"))
        with adam_ghost.open_ledger(tmp_path / "ledger") as ledger:
            audited = ledger.sql("SELECT step FROM steps WHERE audit_r IS NOT NULL ORDER BY step")["step"].to_pylist()
        shown = out.split("Audit of one step")[1].split("Audit of windows")[0]
        assert audited == [int(step) for step in re.findall(r"^\W+(\d+) ", shown, re.M)] == [4, 8]
    rows = list(csv.DictReader((tmp_path / "scores.csv").open(encoding="utf-8")))
    assert len(rows) == 64 and {r["domain"] for r in rows} == {"prose", "code", "corrupted"}
    scores = [float(r["window_standardized"]) for r in rows]
    assert scores == sorted(scores, reverse=True)


def test_demo_refuses_a_file_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "adam_ghost", "demo", "--out", str(tmp_path / "file")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "--out" in done.stderr


def test_demo_corpus_keeps_target_and_training_apart():
    from adam_ghost.demo.data import load_corpus

    corpus = load_corpus(samples=200, targets=8, length=65, seed=1)
    assert corpus.tokens.shape == (200, 65) and corpus.target.shape == (8, 65)
    assert corpus.domains.count("prose") == 100 and corpus.domains.count("corrupted") == 40
    again = load_corpus(samples=200, targets=8, length=65, seed=1)
    assert again.texts == corpus.texts


def test_bench_fidelity(tmp_path):
    out = run("-m", "bench", "fidelity", "--quick", "--json", str(tmp_path / "f.json"))
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["machine"]["torch"] and [row["step"] for row in found["rows"]] == [2, 10]
    assert found["rows"][1]["secant at w_mid"]["r"] > 0.999
    assert "secant at w_mid: R >= 0.999 and relative L2 <= 0.02" in out and "except" not in out


def test_bench_fidelity_of_another_optimizer(tmp_path):
    run("-m", "bench", "fidelity", "--quick", "--optimizer", "SGD", "--json", str(tmp_path / "f.json"))
    (found,) = json.loads((tmp_path / "f.json").read_text())["optimizers"]
    assert found["window_r"] > 0.98 and found["cost"] > 0
    assert found["rows"][0]["midpoint"]["r"] > 0.999 and found["rows"][0]["midpoint"]["relative_l2"] < 0.02


def test_sgd_is_exact():
    pytest.importorskip("sklearn")
    out = run("examples/sgd_is_exact.py")
    found = re.findall(r"^(.+?) +(dot products|its own rule) +R (\S+) +relative error (\S+)$", out, re.M)
    errors = {(name, rule): float(error) for name, rule, _, error in found}
    assert len(errors) == 6
    assert errors["SGD, momentum", "its own rule"] <= 1e-3 and errors["SGD, momentum", "dot products"] <= 0.01
    for name, most in (("AdamW", 0.05), ("Muon and AdamW", 0.3)):
        assert errors[name, "its own rule"] < most and errors[name, "dot products"] > 0.5


@pytest.mark.parametrize(("schedule", "dtype"), [("midpoint", "float32"), ("lookahead", "float16")])
def test_nanogpt_loop(schedule, dtype):
    out = run("examples/nanogpt_loop.py", "--steps", "24", "--schedule", schedule, "--dtype", dtype)
    clean, noisy = (float(line.split(":")[1]) for line in out.splitlines() if line.startswith("mean standardised"))
    assert clean > noisy


def test_imports_from_elsewhere(tmp_path):
    code = "import adam_ghost; print(adam_ghost.attribute.__module__)"
    assert run("-c", code, env={"PATH": ""} | {"PYTHONPATH": str(ROOT)}).strip() == "adam_ghost.attribution"
