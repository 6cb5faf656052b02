"""What others score a training by: their packages where those are installed, and gradients' dot products."""

import copy
import logging
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.evidence.tasks import Task


def gradient_dots(task: Task) -> Tensor:
    """``[N]`` or ``[N, K]``: dot products of the samples' gradients with the targets', at the model's weights (TracIn's term)."""
    target = task.sample_gradients(task.held_out)
    target = target if task.each_target else target.mean(0, keepdim=True)
    dots = task.sample_gradients(task.samples) @ target.T / len(task.batches[0])
    return dots if task.each_target else dots.squeeze(1)


def ekfac(task: Task) -> Tensor:
    """Influence with the EK-FAC inverse Hessian by kronfluence (arXiv 2308.03296), at its defaults, of the trained model."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task as Kronfluence

    class Measured(Kronfluence):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            out = model(x)
            if sample:  # labels drawn from the model's own distribution: the true Fisher
                with torch.no_grad():
                    y = torch.distributions.Categorical(logits=out.detach()).sample()
            return task.losses(out, y).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return task.losses(model(batch[0]), batch[1]).sum()

    logging.disable(logging.WARNING)
    untied = _untied(task.model)
    train, held_out = (torch.utils.data.TensorDataset(*x) for x in (task.samples, task.held_out))
    how = Measured()
    try:
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer("evidence", prepare_model(untied, how), how, cpu=True, output_dir=folder, disable_tqdm=True)
            factors = FactorArguments(strategy="ekfac", **{f"{k}_dtype": torch.float64 for k in _DTYPES})
            analyzer.fit_all_factors("factors", train, per_device_batch_size=64, factor_args=factors)
            scoring = {
                "score_dtype": torch.float64,
                "precondition_dtype": torch.float64,
                "per_sample_gradient_dtype": torch.float64,
            }
            analyzer.compute_pairwise_scores(
                "scores", "factors", held_out, train, 32, per_device_train_batch_size=64, score_args=ScoreArguments(**scoring)
            )
            found = analyzer.load_pairwise_scores("scores")["all_modules"]  # [K, N]
    finally:
        logging.disable(logging.NOTSET)
    return found.T.double() if task.each_target else found.double().mean(0)


_DTYPES = ("activation_covariance", "gradient_covariance", "eigendecomposition", "per_sample_gradient", "lambda")


def _untied(model: nn.Module) -> nn.Module:
    """A copy whose layers each own their weight: kronfluence keeps its factors by layer."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        for name, p in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(p.detach().clone()))
    return model


def trak(task: Task) -> Tensor:
    """TRAK (arXiv 2303.14186) of the one trained model by traker, 512 projected dimensions, the loss as its output."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    class Margin(AbstractModelOutput):
        """The log-odds of the right answer, meaned over a text's characters."""

        def __init__(self) -> None: ...

        @staticmethod
        def _probability(out: Tensor, y: Tensor) -> Tensor:
            return (-task.losses(out, y)).exp()

        def get_output(self, model: nn.Module, weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
            out = functional_call(model, (weights, buffers), (x[None],))
            p = self._probability(out, y[None])
            return (p.log() - (1 - p).clamp(min=1e-12).log()).sum()

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            x, y = batch
            return (1 - self._probability(functional_call(model, (weights, buffers), (x,)), y)).clone().detach()[:, None]

    size = sum(p.numel() for p in task.model.parameters())
    projector = BasicProjector(size, 512, 0, ProjectionType.rademacher, "cpu", 64, torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            task.model, Margin(), len(task.bad), folder, device="cpu", projector=projector, proj_dim=512,
            logging_level=logging.ERROR, use_half_precision=False,
        )  # fmt: skip
        traker.load_checkpoint(task.model.state_dict(), model_id=0)
        with sdpa_kernel(SDPBackend.MATH):  # under vmap, where the fused kernels have no batched form
            _batches(lambda part: traker.featurize(part, num_samples=len(part[0])), task.samples)
            traker.finalize_features()
            traker.start_scoring_checkpoint("targets", task.model.state_dict(), 0, len(task.held_out[0]))
            _batches(lambda part: traker.score(part, num_samples=len(part[0])), task.held_out)
        found = torch.from_numpy(traker.finalize_scores("targets")).double()  # [N, K]
    return found if task.each_target else found.mean(1)


def _batches(call: Callable[[tuple[Tensor, ...]], Any], samples: tuple[Tensor, ...]) -> None:
    for k in range(0, len(samples[0]), 64):
        call(tuple(x[k : k + 64] for x in samples))


_PACKAGES = {"EK-FAC (kronfluence)": "kronfluence", "TRAK (traker)": "trak"}
PEERS: dict[str, Callable[[Task], Tensor]] = {
    "gradient dots, trained model": gradient_dots,
    "EK-FAC (kronfluence)": ekfac,
    "TRAK (traker)": trak,
}


def installed(name: str) -> bool:
    package = _PACKAGES.get(name)
    return package is None or find_spec(package) is not None
