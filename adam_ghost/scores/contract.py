"""From recorded calls and the direction ``P`` to every sample's ``< P , g_i >``, without per-sample gradients."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# importing a kind registers its form
from adam_ghost.capture.calls import Call
from adam_ghost.capture.recording import Recording
from adam_ghost.capture.rows import Rows
from adam_ghost.scores import anything, linear, lookup, norm  # noqa: F401
from adam_ghost.scores.forms import Asked, Directions, form_of
from adam_ghost.scores.together import score_together


def score_call(call: Call, P: Directions, asked: Asked) -> Tensor:
    """Scores of one call's share of the gradient: ``[n, K]``, or ``[n, T, K]`` per token. Sums in P's dtype.

    Raises ValueError where ``per_token`` is asked of a call whose outputs have no token dimension.
    """
    form = form_of(call)
    scores = (anything.scores if form is None else form.scores)(call, P, asked)
    if asked.per_token:
        rows = {tag.per if isinstance(tag, Rows) else tag[1] for tag in call.outputs.values()}
        shapes = {grad.ndim for grad in call.grad_output.values()}
        if (isinstance(call.fn, nn.Module) and "conv" in type(call.fn).__module__) or (rows == {1} and min(shapes) < 3):
            raise ValueError(f"per_token=True needs tokens at dimension 1 of every layer's output; '{call.name}' has none")
    return scores


def score_calls(calls: list[Call], P: Directions, asked: Asked) -> list[Tensor]:
    """Scores that add up to those of all calls, each ``[n, K]``, or ``[n, T, K]`` per token."""
    together, left = score_together(calls, P, asked)
    parts = [] if together is None else [together]
    for call in left:
        part = score_call(call, P, asked)
        if parts and parts[0].shape != part.shape:
            tokens = f"'{call.name}' has {part.shape[1]}, others {parts[0].shape[1]}"
            raise ValueError(f"per_token=True needs the same tokens in every layer; {tokens}")
        parts.append(part)
    return parts


def score_recordings(recordings: Iterable[Recording], P: Directions, per_token: bool = False, half: bool = False) -> Tensor:
    """``score_call`` summed over each recording's calls; the recordings' samples one after another."""
    return torch.cat([_score_recording(r, P, per_token, half) for r in recordings])


def _score_recording(recording: Recording, P: Directions, per_token: bool, half: bool) -> Tensor:
    asked = Asked(recording.batch_size, recording.packing, per_token, half)
    some = next(iter(P.values()))
    if recording.batch_size == 0:
        return recording.doubted(some.new_zeros(0, len(some)))
    parts = score_calls([call for call in recording.calls if not P.keys().isdisjoint(call.parameters())], P, asked)
    if not parts:
        raise ValueError("none of the recorded calls explains a gradient: was it computed inside `with cache`?")
    return recording.doubted(torch.stack(parts).sum(0))
