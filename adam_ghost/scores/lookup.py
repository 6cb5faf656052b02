"""An embedding: rows of P, looked up as the layer looks up its weight."""

import torch
from torch import Tensor

from adam_ghost.capture.calls import Call
from adam_ghost.capture.rows import Rows
from adam_ghost.scores import ops
from adam_ghost.scores.forms import Asked, Directions, Form, register
from adam_ghost.scores.shapes import collect_rows, lead_rows, samples_first, sum_samples, tokens


def scores(call: Call, P: Directions, asked: Asked) -> Tensor:
    module, indices, b = call.fn, call.input, call.grad_output[0]
    if module.scale_grad_by_freq:
        b = b / torch.bincount(indices.flatten(), minlength=module.num_embeddings)[indices].unsqueeze(-1)
    tag, (weight,) = call.outputs[0], call.directions(P, "weight")  # [K, vocabulary, d]
    assert weight is not None
    if isinstance(tag, Rows):
        line = indices.reshape(1, -1), b.reshape(1, -1, b.shape[-1])
        found = ops.embedding_score(*line, weight, padding_idx=module.padding_idx, per_token=True)[0]  # [M, K]
        return collect_rows(found, lead_rows(b, tag), asked)
    b = samples_first(b, tag, asked.n)  # [n, T, ..., d]
    indices = indices.movedim(tag[0], 0).reshape(asked.n, -1)  # [n, rows]
    per_token = asked.per_token or asked.packing is not None
    found = ops.embedding_score(indices, b.flatten(1, -2), weight, padding_idx=module.padding_idx, per_token=per_token)
    if not per_token:
        return found
    found = tokens(found, b)
    return found if asked.packing is None else sum_samples(found, asked.packing)


register("embedding", Form(scores))
