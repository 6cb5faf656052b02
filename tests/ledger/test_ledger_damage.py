"""Parts that are missing, damaged or another run's are named by every reader, and none of their rows is read."""

import random
import shutil

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
import made
from typer.testing import CliRunner

import adam_ghost as ag
from adam_ghost.cli import app
from adam_ghost.ledger import layout
from adam_ghost.ledger.check import DamagedLedger

PART = "r0-00000002.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "ledger"
    made.write(folder, r=0.99, tokens=True)
    return folder


@pytest.fixture
def ledger(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "ledger")


def delete(folder, table):
    (folder / table / PART).unlink()


def flip(folder, table):
    part = folder / table / PART
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


def cut(folder, table):
    part = folder / table / PART
    part.write_bytes(part.read_bytes()[:-20])


def copy(folder, table):
    """Another part of the same run under this part's name."""
    shutil.copy(folder / table / "r0-00000003.parquet", folder / table / PART)


def foreign(folder, table):
    made.write(folder.parent / "other", seed=1, tokens=True)
    shutil.copy(folder.parent / "other" / table / PART, folder / table / PART)


def stray(folder, table):
    shutil.copy(folder / table / PART, folder / table / "mine.parquet")


@pytest.mark.parametrize("table", ["scores", "steps", "tokens"])
@pytest.mark.parametrize("harm", [delete, flip, cut, copy, foreign, stray])
def test_named_by_every_reader(ledger, harm, table):
    reader = ag.open_ledger(ledger)
    harm(ledger, table)
    named = "mine.parquet" if harm is stray else PART
    with pytest.raises(DamagedLedger, match=named):
        ag.open_ledger(ledger)
    with pytest.raises(DamagedLedger, match=named):
        reader.refresh()
    for command in ("top", "groups", "report", "audit", "export"):
        done = CliRunner().invoke(app, [command, str(ledger)])
        assert done.exit_code == 1 and named in done.output and len(done.output.splitlines()) == 1, done.output


def test_what_is_left_can_be_read_when_asked_for(ledger):
    delete(ledger, "scores")
    with ag.open_ledger(ledger, check=False) as reader:
        assert reader.scores().num_rows == 2 * 5 * made.BATCH


def test_no_flipped_bit_is_read(ledger):
    random.seed(0)
    for part in (ledger / "scores" / PART, ledger / "steps" / PART):
        content = part.read_bytes()
        for bit in random.sample(range(8 * len(content)), 200):
            harmed = bytearray(content)
            harmed[bit // 8] ^= 1 << bit % 8
            part.write_bytes(harmed)
            assert not layout.is_intact(part)
        part.write_bytes(content)
        assert layout.is_intact(part)


def test_pages_carry_checksums_for_other_readers(ledger):
    part = ledger / "scores" / PART
    content = bytearray(part.read_bytes())
    column = layout.pq.read_metadata(part).row_group(0).column(5)
    assert column.path_in_schema == "score"
    content[column.data_page_offset + column.total_compressed_size - 9] ^= 1  # in the last value
    part.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        layout.pq.read_table(part, partitioning=None, page_checksum_verification=True)


def test_settings_that_are_no_json(ledger):
    (ledger / "run.json").write_text("{")
    for command in ("top", "report"):
        done = CliRunner().invoke(app, [command, str(ledger)])
        assert done.exit_code == 1 and "run.json is damaged" in done.output


def test_scores_written_before_their_books_are_no_damage(ledger):
    """A kill between the two renames, or a reader beside the writer."""
    (ledger / "steps/r0-00000003.parquet").unlink()
    with ag.open_ledger(ledger) as reader:
        assert reader.scores().num_rows == 3 * 5 * made.BATCH and reader.steps().num_rows == 2 * 5


def test_resuming_a_ledger_that_lost_parts_is_refused(ledger):
    writer = ag.LedgerWriter(ledger)
    run = ag.open_ledger(ledger).run["run"]
    with pytest.raises(ValueError, match="ends with part 3, but the checkpoint was made after part 4"):
        writer.resume({"run": run, "parts": [4]}, {})
    writer.resume({"run": run, "parts": [2]}, {})
    writer.close()
    with ag.open_ledger(ledger) as reader:
        assert reader.steps()["step"].to_pylist() == list(range(1, 11)) and reader.scores().num_rows == 10 * made.BATCH
