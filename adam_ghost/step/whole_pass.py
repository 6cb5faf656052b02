"""The universal way: parameters whose layer calls were lost are scored by the model's own derivative along ``P``.

One forward-mode pass of the whole model along ``P``, times the gradient that came back at its outputs, is what each row of the
outputs does: right wherever samples stay apart in the loss, whatever becomes of them on the way. It costs about two forward
passes for each validation target, however few the parameters.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from adam_ghost.capture.calls import rng_state
from adam_ghost.capture.declared import custom_function
from adam_ghost.capture.rows import Packing
from adam_ghost.capture.surroundings import Surroundings, custom_modules
from adam_ghost.processes.world import World
from adam_ghost.scores.anything import forward_mode
from adam_ghost.scores.forms import Asked, Directions
from adam_ghost.scores.shapes import add, samples_of, sum_samples


def may_pass(fallback: bool | None, world: World) -> bool:
    """What ``fallback`` says of parameters that layer calls lose: whether whole passes score them; None: where they can.

    Raises ValueError where they are asked for and cannot.
    """
    if fallback and world.sharded:
        raise ValueError(
            "fallback=True needs the model's whole weights for a forward-mode pass, which fully_shard keeps in parts: parameters"
            " that layer calls lose are left out there, and named; leave it out or use fallback=False"
        )
    return not world.sharded if fallback is None else fallback


class WholePass:
    """A model's forward pass as it began, its outputs, and the gradients that came back at them."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.device = next(model.parameters()).device
        self._rng = rng_state(self.device)
        self._surroundings = Surroundings(custom_modules(model))
        kind = self.device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.outputs: list[Tensor] = []
        self._leaves: set[Tensor] | None = set()  # that the outputs were made of; None: a checkpoint hides some
        self.grads: dict[int, Tensor] = {}
        # a model that returns its loss has its samples apart at its output embeddings
        self.head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        self.head_grads: list[Tensor] = []  # one to each call
        self._handle = None if self.head is None else self.head.register_forward_hook(self._meet_head)

    def _meet_head(self, module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda grad: self._receive_at_head(grad.detach()))

    def _receive_at_head(self, grad: Tensor) -> None:
        if not torch.is_grad_enabled():
            self.head_grads.append(grad)

    def ended(self, output: Any) -> None:
        """Takes the outputs, and waits for their gradients."""
        if self._handle is not None:
            self._handle.remove()
        self.outputs = _tensors(output)
        self._leaves = _leaves_of(self.outputs)
        for i, x in enumerate(self.outputs):
            if x.requires_grad:
                x.register_hook(lambda grad, i=i: self._receive(i, grad.detach()))
        self.outputs = [x.detach() for x in self.outputs]

    def _receive(self, i: int, grad: Tensor) -> None:
        if not torch.is_grad_enabled():  # not a pass for higher derivatives
            self.grads[i] = self.grads[i] + grad if i in self.grads else grad

    def reaches(self, p: Tensor) -> bool:
        """Whether the outputs were made of a parameter, so that this pass has a part in its gradient."""
        return self._leaves is None or p in self._leaves

    @contextmanager
    def _as_then(self) -> Iterator[None]:
        """The surroundings, precision and random state in which the pass began."""
        kind, dtype, enabled = self._autocast
        with ExitStack() as stack:
            stack.enter_context(self._surroundings.entered())
            stack.enter_context(torch.random.fork_rng([self.device] if kind == "cuda" else []))
            stack.enter_context(torch.autocast(kind, dtype, enabled=enabled))
            state, device_state, _ = self._rng
            torch.set_rng_state(state)
            if device_state is not None:
                torch.cuda.set_rng_state(device_state, self.device)
            yield

    def by_sample(self, n: int, packing: Packing | None) -> bool:
        """Whether the gradients at the outputs have the batch of ``n`` rows along dimension 0.

        Where the rows hold several samples, with tokens along dimension 1, and no other dimension of that size.
        """
        found = self._at_rows()
        apart = bool(found) and all(g.ndim and len(g) == n for g in found.values())
        if packing is None or n == 0:
            return apart
        tokens = packing.tokens // n
        return apart and all(g.ndim > 1 and g.shape[1] == tokens and tokens not in g.shape[2:] for g in found.values())

    def _at_rows(self) -> dict[int, Tensor]:
        """The gradients at the outputs, or at the head's output (its key is -1) where an output is the loss itself."""
        if any(g.ndim == 0 for g in self.grads.values()):
            return {-1: self.head_grads[0]} if len(self.head_grads) == 1 else {}
        return self.grads

    def _outputs(self, at: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Some outputs of the pass run again, by the keys of ``_at_rows``."""
        seen: list[Tensor] = []
        handle = self.head.register_forward_hook(lambda *call: seen.append(call[-1])) if -1 in at else None
        try:
            found = _tensors(self.model.forward(*self.args, **self.kwargs))
        finally:
            if handle is not None:
                handle.remove()
        return {i: seen[0] if i < 0 else found[i] for i in at}

    def scores(self, params: Mapping[str, Tensor], P: Directions, packing: Packing | None, per_token: bool) -> Tensor | None:
        """``[n, K]``, or ``[n, T, K]`` per token: the derivative of the outputs along ``P``, times their gradients.

        None where the model has no forward-mode derivative. ``params``: those that ``P`` is of, by name.
        """
        held = {name: p.detach() for name, p in params.items()}
        buffers = {name: x.clone() for name, x in self.model.named_buffers()}

        def outputs(values: dict[str, Tensor]) -> dict[int, Tensor]:
            with _reparametrize_module(self.model, values | buffers, tie_weights=True):
                return self._outputs(grads)

        grads = self._at_rows()
        by_token = per_token or packing is not None
        columns = []
        for k in range(len(next(iter(P.values())))):
            along = {name: P[name][k].to(p.dtype) for name, p in held.items()}
            with self._as_then(), forward_mode():
                try:
                    changes = torch.func.jvp(outputs, (held,), (along,))[1]
                except (NotImplementedError, RuntimeError):  # a function without a forward mode
                    return None
            columns.append(add(_by_row(changes[i], grad, by_token) for i, grad in grads.items()))
        found = torch.stack(columns, -1)  # [n, T, K], or [n, K]
        return found if packing is None else sum_samples(found, packing)

    def sample_gradients(self, params: Mapping[str, Tensor], asked: Asked) -> dict[str, Tensor]:
        """``[n, *shape]`` each: by a backward pass per sample, with its share of the gradients at the outputs alone."""
        grads, held = self._at_rows(), list(params.values())
        with self._as_then(), torch.enable_grad():
            outs = list(self._outputs(grads).values())
        rows, of = [], [samples_of(g, (0, 1), asked) for g in grads.values()]
        for i in range(asked.samples):
            shares = [torch.where(x == i, g, 0.0) for x, g in zip(of, grads.values(), strict=True)]
            rows.append(torch.autograd.grad(outs, held, shares, retain_graph=i < asked.samples - 1, allow_unused=True))
        found = zip(*rows, strict=True)
        return {
            name: torch.stack([torch.zeros_like(p) if g is None else g for g in column])
            for (name, p), column in zip(params.items(), found, strict=True)
        }

    def again(self) -> list[Tensor] | None:
        """The outputs of the pass run again, with a graph; None where it does not give the same."""
        with self._as_then():
            outputs = _tensors(self.model.forward(*self.args, **self.kwargs))
        if [x.shape for x in outputs] != [x.shape for x in self.outputs]:
            return None
        same = all(torch.allclose(x.detach(), y, 1e-3, 1e-5) for x, y in zip(outputs, self.outputs, strict=True))
        return outputs if same else None


def _by_row(change: Tensor, grad: Tensor, by_token: bool) -> Tensor:
    """``[n]``, or ``[n, T]``: the products with an output's gradient summed over the rest."""
    product = change * grad.to(change.dtype)
    return product.flatten(2).sum(-1) if by_token and product.ndim > 2 else product if by_token else product.flatten(1).sum(1)


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _leaves_of(outputs: Sequence[Tensor]) -> set[Tensor] | None:
    """The tensors in which the graph of ``outputs`` ends; None where a reentrant checkpoint keeps its part of it to itself."""
    found, leaves, visited = [x.grad_fn for x in outputs], set(), set()
    while found:
        node = found.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if custom_function(node) is CheckpointFunction:
            return None
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(leaf)
        found += [parent for parent, _ in node.next_functions]
    return leaves
