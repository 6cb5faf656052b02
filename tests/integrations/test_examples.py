"""The examples, as their users run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("duckdb")
ROOT = Path(__file__).resolve().parents[2]


def run(name, tmp_path, *args):
    command = [sys.executable, str(ROOT / "examples" / name), "--ledger", str(tmp_path / "ledger"), *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=None)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_mislabelled_digits(tmp_path):
    pytest.importorskip("sklearn")
    out = run("mislabelled_digits.py", tmp_path)
    found = re.findall(
        r"^(windows, standardised|windows, summed|summed training loss): +AUROC (0\.\d+); .* mislabelled: (\d+)%", out, re.M
    )
    assert len(found) == 3
    assert float(found[0][1]) > 0.9 and int(found[0][2]) > 50  # one in ten by chance


def test_text_domains(tmp_path):
    out = run("text_domains.py", tmp_path)
    line = r"^(\w+) +standardised score .* \(95%: ([-+.\d]+) to ([-+.\d]+)\), \d+ samples; (no|suggested) weight"
    found = re.findall(line, out, re.M)
    assert found[0][0] == "prose" and len(found) == 3
    assert all((float(low) <= 0 <= float(high)) == (what == "no") for _, low, high, what in found)


def test_lora_trainer(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    found = dict(re.findall(r"^(\w+) +mean standardised score ([-+.\d]+)", run("lora_trainer.py", tmp_path), re.M))
    assert float(found["sentence"]) > float(found["noise"])


def test_resnet_digits():
    pytest.importorskip("sklearn")
    command = [sys.executable, str(ROOT / "examples" / "resnet_digits.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"^(.+): accuracy ([.\d]+)%; coverage 100% .* ([.\d]+)$", done.stdout, re.M)
    assert [name for name, *_ in found] == ["frozen batch norms", "group norms"]
    assert all(float(accuracy) > 80 and float(auroc) > 0.55 for _, accuracy, auroc in found)


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["replicas", "shards"])
def test_several_processes(how, tmp_path):
    pytest.importorskip("sklearn")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "examples" / "several_processes.py"), "--ledger", str(tmp_path / "ledger"), *how]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(re.findall(r"samples (\d+) have", done.stdout)[0]) > 25  # ten by chance
