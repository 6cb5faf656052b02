"""Every architecture, tiny: its scores are those of single samples, nothing is left out, in every schedule."""

import warnings

import pytest
from families import FAMILIES, losses
from measure import WAYS, measured, taken_direction, train
from oracles import Problem as Step
from oracles import close

transformers = pytest.importorskip("transformers")
MIXTURES = ("mixtral", "granite-moe", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "deepseek-v3", "ernie-moe")
FAST = ("gpt2", "llama", "mixtral", "gpt-oss", "deepseek-v3", "bloom", "funnel", "patchtst", "t5", "vit", "mamba", "whisper")
CASES = [
    pytest.param(name, way, marks=() if name in FAST and way == WAYS[FAST.index(name) % 3] else pytest.mark.slow)
    for name, family in FAMILIES.items()
    for way in family.ways
]


@pytest.mark.parametrize("name,way", CASES)
def test_family(name, way, monkeypatch):
    close(*measured(name, way, monkeypatch), 1e-9)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "mixtral" else pytest.mark.slow) for n in MIXTURES])
def test_experts_by_other_means(name, implementation, monkeypatch):
    """In a loop over experts, and with each row's own weights gathered."""
    build = type(FAMILIES[name]).build

    def with_experts(self):
        model = build(self)
        model.model.set_experts_implementation(implementation)
        return model

    monkeypatch.setattr(type(FAMILIES[name]), "build", with_experts)
    close(*measured(name, "midpoint", monkeypatch), 1e-9)


def test_grouped_products_of_torch(monkeypatch):
    """torch's own grouped product, in float32: the scores add up, and are single samples' to rounding."""
    seen, family = taken_direction(monkeypatch), FAMILIES["mixtral"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        step = Step(family.build().float(), family.inputs(1), family.inputs(2), losses=losses)
        got, want = train(step, "lookahead", seen)
    close(got, want.to(got.dtype), 1e-4)
