"""What a step is made of, checked before anything is computed: the recorded calls, the final gradients, the optimizer's state."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from adam_ghost.capture.recording import Recording
from adam_ghost.optim import OptState
from adam_ghost.optim.gradient_sums import gradient_sums
from adam_ghost.processes.world import World
from adam_ghost.scores.contract import score_recordings
from adam_ghost.scores.forms import Asked, Directions
from adam_ghost.scores.sample_gradients import sample_gradients
from adam_ghost.scores.shapes import add
from adam_ghost.step.coverage import Coverage, Joined
from adam_ghost.step.fingerprint import Fingerprint, gradients
from adam_ghost.step.whole_pass import WholePass

_BLOCK_BYTES = 64 * 2**20  # of per-sample gradients held at once


def plain_precision(model: nn.Module) -> torch.autocast:
    """Around what is computed of a step: the loop's autocast would round our sums, and keep casts of other weights."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False, cache_enabled=False)


@dataclass
class Step:
    """One step about to be taken: the parameters that will move by their gradient, and the recordings that explain it.

    Everything is known by the parameters' names. The samples of several recordings (the micro-batches of an accumulated step)
    count on, one after another. Of several processes each has its own samples' recordings; gradients are the whole batch's.
    """

    opt_state: OptState
    params: dict[str, nn.Parameter]
    grads: dict[str, Tensor]
    recordings: list[Recording]
    scale: dict[str, Tensor] = field(default_factory=dict)  # what gradients were multiplied by since they were recorded
    missing: list[str] = field(default_factory=list)  # parameters whose gradient is not explained
    # parameters that recorded calls do not explain, scored by the whole passes, one to a recording
    whole: list[str] = field(default_factory=list)
    passes: list[WholePass] = field(default_factory=list)
    coverage: Coverage | None = None
    world: World = field(default_factory=World)
    reached: Tensor | None = None  # [K]: < P , g >, where P was foreseen and the gradients' scaling was told by the same pass

    def sample_gradients(self, name: str, block: slice = slice(None)) -> Tensor:
        """``[n, *p[block].shape]``: each sample's share of a parameter's gradient, for a block of its first dimension."""
        p = self.params[name]
        if name in self.whole:
            passes = zip(self.recordings, self.passes, strict=True)
            shares = torch.cat([whole.sample_gradients({name: p}, Asked(r.batch_size, r.packing))[name] for r, whole in passes])
            shares = shares[:, block] if p.ndim else shares
        else:
            asked = [Asked(r.batch_size, r.packing) for r in self.recordings]
            shares = torch.cat([sample_gradients(r.calls, name, p, a, block) for r, a in zip(self.recordings, asked, strict=True)])
        shares = shares * self.scale[name] if self.scale else shares
        return shares if self.world.size == 1 else shares * self.world.share

    def sample_gradient_blocks(self, name: str) -> Iterator[tuple[Any, Tensor]]:
        """All of a parameter's ``sample_gradients``, ``[n, rows, ...]``, in blocks of rows of at most 64 MB, or one row; with the
        index by which each is a part of the parameter.
        """
        p = self.params[name]
        if not p.ndim:
            yield ..., self.sample_gradients(name)
            return
        rows = max(1, _BLOCK_BYTES // max(1, 4 * self.samples * p[:1].numel()))
        for start in range(0, len(p), rows):
            block = slice(start, start + rows)
            yield block, self.sample_gradients(name, block)

    @property
    def samples(self) -> int:
        return sum(Asked(r.batch_size, r.packing).samples for r in self.recordings)

    def scores(self, P: Directions, per_token: bool = False, half: bool = False) -> Tensor:
        """``[n, K]``: every sample's ``< P , g_i >``; ``half`` as in ``contract``. ``per_token``: ``[rows, T, K]``, whatever
        samples are packed in the rows."""
        if per_token and any(recording.packing for recording in self.recordings):
            own = replace(self, recordings=[_in_rows(r) for r in self.recordings])
            found = own.scores(P, per_token, half)
            self.whole, self.missing = own.whole, own.missing  # a pass may turn out to have no forward mode
            return found
        if self.scale:
            P = {name: x * self.scale[name] for name, x in P.items()}
        by_passes = self.whole_scores({name: P[name] for name in self.whole if name in P}, per_token)
        by_calls = {name: x for name, x in P.items() if name not in self.whole}
        parts = [] if by_passes is None else [by_passes]
        for whole in self.world.whole(by_calls) if by_calls else ():
            parts.append(score_recordings(self.recordings, whole, per_token, half))
        scores = add(parts)
        return scores if self.world.size == 1 else scores * self.world.share

    def whole_scores(self, P: Directions, per_token: bool = False) -> Tensor | None:
        """The part of the parameters that whole passes score; None where there are none, or the model has no forward mode."""
        if not P:
            return None
        found = score_passes(self.passes, self.recordings, self.params, P, per_token, self.world)
        if self.coverage is not None:
            self.coverage.tell_of_passes(self.whole, self.grads, found is not None)
        if found is None:
            self.missing, self.whole = [*self.missing, *self.whole], []
        return found

    def joined(self, scores: Tensor, val_loss: Tensor) -> Joined:
        """What is known of all processes' scores, read by the host."""
        if self.world.size == 1:
            return Joined.of(scores.detach().double().cpu().numpy())
        samples, total, squares, mean = join(self.world, scores, val_loss).cpu().numpy()
        return Joined(int(samples[0]), total, squares, mean)

    def factors(self) -> Tensor:
        """What gradients were multiplied by since they were recorded, one number or one per gradient."""
        return torch.stack(list(self.scale.values())) if self.scale else next(iter(self.grads.values())).new_ones(1)

    def touched(self) -> set[str]:
        """The parameters of whose gradient recorded calls explain a part, or all."""
        return {name for r in self.recordings for name in r.touched()}

    def only(self, names: Sequence[str]) -> "Step":
        """The step of these parameters, the others staying where they are."""
        part = lambda held: {name: held[name] for name in names if name in held}  # noqa: E731
        missing = [name for name in self.missing if name in names]
        return Step(
            self.opt_state, part(self.params), part(self.grads), self.recordings, part(self.scale), missing, world=self.world
        )

    def accounted(self, P: Directions, total: Tensor) -> Tensor | None:
        """``[K]``, of ``total = < P , g >``: what the scores have to add up to, without the parameters that no call explains.

        None where a call explains a part of one of these: how large a part, nothing says.
        """
        if not self.missing:
            return total
        if not self.world.union(self.touched(), list(self.grads)).isdisjoint(self.missing):
            return None
        explained = {name: g for name, g in self.grads.items() if name not in self.missing}
        return self.world.sum_parts(inner(P, explained))

    def unexplained(self, P: Directions) -> list[str]:
        """The names of parameters whose samples' shares do not add up to their gradient, as far as ``P`` sees it; worst first."""
        off = {}
        for name in (self.touched() - set(self.whole)) & self.grads.keys():
            total = inner(P, {name: self.grads[name]})
            gap = (self.scores({name: P[name]}).sum(0) - total).abs().max()
            if not gap <= 1e-3 * total.abs().max():
                off[name] = float(gap)
        worst = max(off.values(), default=0.0)
        return [name for name in sorted(off, key=lambda name: -off[name]) if off[name] > 0.1 * worst]


def _in_rows(recording: Recording) -> Recording:
    """The recording, whose rows of the batch are taken as they are, whatever samples are packed in them."""
    found = copy(recording)
    found.packing = None
    return found


def score_passes(
    passes: Sequence[WholePass],
    recordings: Sequence[Recording],
    params: Mapping[str, Tensor],
    P: Directions,
    per_token: bool = False,
    world: World | None = None,
) -> Tensor | None:
    """``[n, K]``, or ``[n, T, K]``: by the whole passes of all recordings; None where the model has no forward mode, in any
    process.
    """
    params, found = {name: params[name] for name in P}, []
    for recording, whole in zip(recordings, passes, strict=True):
        scores = whole.scores(params, P, recording.packing, per_token)
        if scores is None:
            break
        found.append(scores)
    complete = (world or World()).everywhere(len(found) == len(passes))
    return torch.cat(found) if complete else None


def join(world: World, scores: Tensor, val_loss: Tensor) -> Tensor:
    """``[4, K]``, float64: the number of all processes' scores ``[..., K]``, their sum, the sum of their squares, and the mean of
    the processes' ``val_loss``, ``[]`` or ``[K]``.
    """
    flat = scores.detach().flatten(0, -2).double()
    total = flat.sum(0)
    share = val_loss.to(total).expand_as(total) / world.size
    return world.sum(torch.stack([torch.full_like(total, len(flat)), total, flat.square().sum(0), share]))


def inner(P: Directions, grads: Mapping[str, Tensor]) -> Tensor:
    """``< P , g >``, ``[K]``, over the parameters of ``grads``."""
    if not grads:
        some = next(iter(P.values()))
        return torch.zeros(len(some), dtype=torch.promote_types(some.dtype, torch.float32), device=some.device)
    return gradient_sums(list(grads.values()), [P[name] for name in grads]).along()


def gather_step(
    named: Mapping[str, nn.Parameter],
    opt_state: OptState,
    recordings: list[Recording],
    coverage: Coverage,
    passes: Sequence[WholePass | None] = (),
    world: World | None = None,
) -> Step:
    """The step of those of a model's ``named`` parameters that have a gradient, checked; ``coverage`` is told which ones no call
    explains.

    ``passes``: of the recordings, by which those can be scored.
    """
    world = world or World()
    found = gradients(named)
    params = {name: p for name, p in named.items() if name in found and p.requires_grad}
    if len(params) < len(found):
        for name in found.keys() - params.keys():
            if named[name] in opt_state:
                raise ValueError(
                    f"'{name}' is frozen but has a .grad still, by which the optimizer goes on moving it: set it to None"
                )
        found = {name: found[name] for name in params}
    grads = dict(zip(found, world.parts(found.values()), strict=True))
    if not params:
        raise ValueError("no parameter has a gradient: compute the scores before optimizer.zero_grad()")
    for (name, p), g in zip(params.items(), grads.values(), strict=True):
        if p not in opt_state:
            raise ValueError(f"'{name}' has a gradient but is not among the optimizer's parameters: freeze it or add it")
        if g.layout is not torch.strided:
            raise ValueError(f"'{name}' has a sparse gradient, whose samples' shares are not followed: use sparse=False")
    step = Step(opt_state, params, grads, recordings, coverage=coverage, world=world)
    if recordings:
        moving = [p for p in opt_state.parameters() if p.grad is not None]  # the model's among them, as was checked above
        inside = set(params.values()) if len(moving) > len(params) else None
        outside = [] if inside is None else [p for p in moving if p not in inside]
        step.passes = [whole for whole in passes if whole is not None]
        reached = reached_by(step.passes, recordings, params, coverage)
        step.whole, step.missing = report_coverage(grads, recordings, coverage, outside, reached, world)
    return step


def reached_by(
    passes: Sequence[WholePass], recordings: Sequence[Recording], params: Mapping[str, Tensor], coverage: Coverage
) -> set[str] | None:
    """The names of those ``params`` that whole passes of the recordings have a part in; None where such passes cannot score."""
    if not coverage.forward_mode or len(passes) != len(recordings):
        return None
    if not all(whole.by_sample(r.batch_size, r.packing) for r, whole in zip(recordings, passes, strict=True)):
        return None
    return {name for name, p in params.items() if any(whole.reaches(p) for whole in passes)}


def report_coverage(
    grads: Mapping[str, Tensor],
    recordings: Sequence[Recording],
    coverage: Coverage,
    outside: Sequence[Tensor] = (),
    reached: Collection[str] | None = None,
    world: World | None = None,
) -> tuple[list[str], list[str]]:
    """Tells ``coverage`` which gradients no recorded call explains: the names of those that whole passes do, and of the others.

    ``outside``: trained parameters that are not the model's; ``reached``: as ``reached_by`` says.
    """
    world, known = world or World(), list(grads)
    touched = [r.touched() for r in recordings]
    covered = world.union(set().union(*touched), known)
    covered -= world.union({name for r, names in zip(recordings, touched, strict=True) for name in names & r.unattributed}, known)
    # zeros left by zero_grad(set_to_none=False) under a layer that did not run are no gradient: nothing is missing there
    missing = [name for name, g in grads.items() if name not in covered and bool(g.any())]
    if world.sharded:
        anywhere = world.union(set(missing), known)
        missing = [name for name in known if name in anywhere]
    whole: list[str] = []
    # what was contracted as it came is in the scores already, in part
    contracted = {name for r, names in zip(recordings, touched, strict=True) if not r.calls for name in names}
    if missing and world.everywhere(reached is not None and contracted.isdisjoint(missing)):
        by_passes = world.union(set(reached or ()), known)
        whole = [name for name in missing if name in by_passes]
        missing = [name for name in missing if name not in by_passes]
    if not missing and not outside:
        coverage.report([], 1.0)
        return whole, missing
    total = sum(x.numel() for x in (*grads.values(), *outside))
    lost = sum(grads[name].numel() for name in missing) + sum(p.numel() for p in outside)
    coverage.report(missing + ["parameters outside the model"] * bool(outside), 1 - lost / total)
    return whole, missing


def follow_scaling(
    step: Step, before: Fingerprint, optimizers: Sequence[torch.optim.Optimizer], P: Directions | None = None
) -> tuple[Tensor, Tensor]:
    """Finds by what the gradients were multiplied since the backward pass, ``before``, for ``step``; of a foreseen ``P``, what they
    reach along it as well.

    Returns which were edited otherwise, per gradient, and per optimizer whether its gradients are void (not finite, or a scaler's
    fused step found them so).
    """
    changes = before.changes(step.grads, step.world, P)
    scale, edited, device = changes.scale, changes.edited, changes.void.device
    step.reached = changes.reached
    void = []
    for optimizer in optimizers:
        names = changes.names if len(optimizers) == 1 else held_by(optimizer, step.params)
        theirs = changes.void.new_ones(())
        if len(names) < len(changes.names):
            theirs = torch.tensor([name in set(names) for name in changes.names]).to(device, non_blocking=True)
        # a fused optimizer unscales inside its step, on what the scaler leaves with it
        if (factor := getattr(optimizer, "grad_scale", None)) is not None:
            inverse = factor.to(device).reciprocal()
            scale, step.reached = torch.where(theirs, scale * inverse, scale), None
            step.grads = step.grads | {name: step.grads[name] * inverse.to(step.grads[name].dtype) for name in names}
        gone = (changes.void & theirs).any()
        if (found := getattr(optimizer, "found_inf", None)) is not None:
            gone = gone | (found.to(device) > 0).any()
        void.append(gone)
        edited = edited & ~(gone & theirs)
    step.scale = changes._replace(scale=scale).factors()
    return edited, torch.stack(void)


def held_by(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> list[str]:
    """The names of those of ``params`` that the optimizer trains."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in params.items() if p in held]
