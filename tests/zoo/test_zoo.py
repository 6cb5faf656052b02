"""Every architecture, tiny: its scores are those of single samples, nothing is left out, in every schedule."""

import warnings

import pytest
from architecture import WAYS, losses
from families import FAMILIES
from from_transformers import TRANSFORMERS, Family
from measure import available, measured, taken_direction, train
from oracles import Problem as Step
from oracles import close

MIXTURES = ("mixtral", "granite-moe", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "deepseek-v3", "ernie-moe")
FAST = (
    "gpt2", "llama", "mixtral", "gpt-oss", "deepseek-v3", "bloom", "funnel", "patchtst", "t5", "vit", "mamba", "whisper", "llama4",
    "qwen3.5-moe", "timm-vit", "timm-coatnet", "timm-resnet", "plain-nanogpt", "plain-llama", "plain-mamba", "plain-dit",
    "plain-unet", "plain-vae", "plain-two-towers",
)  # fmt: skip
CASES = [
    pytest.param(name, way, marks=() if name in FAST and way == WAYS[FAST.index(name) % 3] else pytest.mark.slow)
    for name, family in FAMILIES.items()
    for way in family.ways
]


@pytest.mark.parametrize("name,way", CASES)
def test_family(name, way, monkeypatch):
    if not available(name):
        pytest.skip(f"{name} is of a library that is not installed")
    close(*measured(name, way, monkeypatch), 1e-9)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "mixtral" else pytest.mark.slow) for n in MIXTURES])
def test_experts_by_other_means(name, implementation, monkeypatch):
    """In a loop over experts, and with each row's own weights gathered."""
    pytest.importorskip("transformers")
    build = Family.build

    def with_experts(self):
        model = build(self)
        model.model.set_experts_implementation(implementation)
        return model

    monkeypatch.setattr(Family, "build", with_experts)
    close(*measured(name, "midpoint", monkeypatch), 1e-9)


def test_grouped_products_of_torch(monkeypatch):
    """torch's own grouped product, in float32: the scores add up, and are single samples' to rounding."""
    pytest.importorskip("transformers")
    seen, family = taken_direction(monkeypatch), TRANSFORMERS["mixtral"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        step = Step(family.build().float(), family.inputs(1), family.inputs(2), losses=losses)
        got, want = train(step, "lookahead", seen)
    close(got, want.to(got.dtype), 1e-4)
