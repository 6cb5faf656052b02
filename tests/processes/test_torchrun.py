"""Processes that ``torchrun`` starts, two and four: scores of one process with the whole batch, weights of a training without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from compared import distance
from launched import SPREADS, cases
from loops import train

# trainings end where they end, seldom with a window
pytestmark = pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")


@pytest.mark.parametrize("size", [2, 4])
def test_scores_are_those_of_one_process(size, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    script, written = Path(__file__).with_name("launched.py"), tmp_path / "scores.json"
    done = subprocess.run([*launcher, str(script), str(written)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(written.read_text())
    assert len(found) == len(SPREADS) * len(cases(size))
    for name, case in cases(size).items():
        expected = {str(i): s for i, s in train("one", **case)["scores"].items()}
        for spread in SPREADS:
            got, (scores, weights) = found[f"{spread} {name}"], (1e-6, 1e-5) if "float32" in name else (1e-12, 1e-12)
            assert distance(got["scores"], expected) < scores, (spread, name)
            # lookahead forms the linear layers' gradients by another product
            assert got["weights apart"] <= (weights if case["schedule"] == "lookahead" else 0), (spread, name)
