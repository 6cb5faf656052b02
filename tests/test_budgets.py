"""Counts that stand for speed where there is no GPU: launches, waits, operands, barriers, widths, order. Never times."""

import pytest

from adam_ghost import extension

pytest.importorskip("triton")
from bench import host, launches, operations, sass, schedule
from bench.throughput import Setting

BLOCKS = 2  # of GPT-2's twelve, which are all alike


@pytest.fixture(scope="module")
def books():
    return launches.measure(("bound", "lookahead", "midpoint", "window", "lookahead+packed"), BLOCKS)


def test_launches_of_a_step(books):
    bound = books["bound"]["launches"]
    assert books["lookahead"]["launches"] <= launches.budget("lookahead", bound, BLOCKS), books["lookahead"]["by_line"]


def test_memory_that_a_step_moves(books):
    assert books["lookahead"]["bytes_per_parameter"] <= books["bound"]["bytes_per_parameter"] + launches.BYTES


@pytest.mark.parametrize("variant", ["lookahead", "midpoint", "window", "lookahead+packed"])
def test_nothing_waits_for_the_device(books, variant):
    assert not books[variant]["waits"]


@pytest.mark.parametrize("variant", ["lookahead", "midpoint"])
def test_products_are_of_sixteen_bits_under_autocast(books, variant):
    assert set(books[variant]["dtypes"]) == {f"{'wgrad_score' if variant == 'lookahead' else 'contract'}: bfloat16 x bfloat16"}


# function calls of a step, in calls of the bound's: what a later change may not exceed
CALLS = {"lookahead": 3.4, "midpoint": 3.4, "thin layer": 3.25}
CALLS |= {"lookahead, layer by layer": 4.95, "midpoint, layer by layer": 4.15, "thin layer, layer by layer": 4.0}


@pytest.mark.skipif(not extension.built["cpu"], reason="the extension was not built")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.together
def test_function_calls_of_a_step():
    bound = host.calls(host.stepper("bound"))
    for variant, times in CALLS.items():
        assert host.calls(host.stepper(variant)) <= times * bound, variant


@pytest.mark.skipif(not extension.built["cpu"], reason="the extension was not built")
def test_experts_cost_their_own_forward():
    """Beyond the bound: in lookahead one more pass of the experts alone, in midpoint one of all, as in the dense model."""
    setting = Setting(layers=1, width=64, heads=2, context=64, batch=8)
    rows = {(row["experts"], row["variant"]): row for row in operations.measure(setting, 8)}
    bound = rows[8, "bound"]["operations"]
    forward = rows[8, "plain"]["by_operator"]["aten._grouped_mm"] / 3  # a backward pass has two of a forward's
    assert 0 < rows[8, "lookahead"]["operations"] - bound - forward < 0.03 * bound
    assert rows[8, "midpoint"]["of_bound"] == pytest.approx(rows[0, "midpoint"]["of_bound"], rel=0.01)


@pytest.mark.skipif(not extension.built["cuda"] or not sass.tool("cuobjdump"), reason="no CUDA part, or no cuobjdump")
def test_extension_writes_sixteen_bytes_at_once():
    found = sass.of_extension(extension.C.__file__)
    for name in ("correct 0 1", "correct 0 4", "move_weights", "pull_back_adjoint"):
        assert found[name]["store bits"] == found[name]["load bits"] == 128, name
    assert found["correct 0 1"]["blocks"] >= 2 and found["correct 0 4"]["blocks"] >= 2
    assert found["correct 0 4"]["barriers"] <= 16  # one reduction of all sums, under each of two branches


@pytest.mark.parametrize("shape", ["GPT-2 124M qkv", "GPT-2 124M up", "GPT-2 124M down"])
def test_order_of_work(shape):
    n, T, d_in, d_out = schedule.LINEARS[shape]
    read = n * T * (d_in + d_out) * 2
    for walks, least in (
        (schedule.wgrad(n, T, d_in, d_out), read),
        (schedule.contraction(n * T, d_in, d_out), read + d_in * d_out * 2),
    ):
        assert schedule.dram(walks) <= schedule.DRAM * least
        assert schedule.balance(walks) >= schedule.BALANCE - 1e-3
