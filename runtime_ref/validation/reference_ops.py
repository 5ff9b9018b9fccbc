"""Every op of a step once more, in float64 and without any trick: what a backend's ops are checked against.

Written from the model's definition, not from `backends/torch/ops.py`: no parts, no pages, no padding; one matrix product per
projection, one softmax over all keys that a query may see.
"""

from __future__ import annotations

import torch

from mxfp4.mxfp8 import dequantize_mxfp8, quantize_mxfp8
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.checkpoints.host_weights import Dense
from runtime_ref.core.batch import SequenceChunk
from runtime_ref.core.program import Op


def expected(backend: TorchBackend, op: Op, inputs: dict[str, torch.Tensor], chunk: SequenceChunk, real: int, *,
             mxfp8: bool = False) -> torch.Tensor | None:
    """float64 result of an op on the buffers that it read, comparable with `found`; None for ops that only move data.

    With several ranks: of this rank's share, except what all ranks get (`add_parts`, `head`), which is gathered here too, so
    that every rank must ask for the same tasks.

    Args:
        chunk: the one sequence of the step, from position 0 on.
        real: rows that are not padding. mxfp8: whether activations are rounded to it where they enter experts.
    """
    w, config = backend.weights, backend.config
    x = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    layer = w.layers[op.layer] if op.layer >= 0 else None
    if op.name in ("input_norm", "post_norm", "final_norm"):
        weight = w.norm if layer is None else layer.input_norm if op.name == "input_norm" else layer.post_norm
        value = x["x"]
        return value / (value.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt() * weight.double()
    if op.name.startswith("project"):
        return _projected(x["y"], layer.attention, backend.rotary[op.name.removeprefix("project_")], real,
                          config.layernorm_epsilon)
    if op.name.startswith("attend"):
        return _attended(x["q"], backend, op, chunk, real)
    if op.name == "merge_heads":
        a = layer.attention
        merged = torch.einsum("qrv,qvh->rh", x["heads"], a.o.double().reshape(x["heads"].shape[0], x["heads"].shape[2], -1))
        return merged if a.o_bias is None else merged + a.o_bias
    if op.name == "dense_mlp":
        return _mlp(x["y"], layer.mlp)
    if op.name == "route":
        return _routed(x["y"], layer.mlp, config)
    if op.name == "experts":
        if mxfp8:
            return _experts(x["y"].bfloat16(), x["index"], x["weight"], layer.mlp.experts, _mxfp8)
        return _experts(x["y"], x["index"], x["weight"], layer.mlp.experts, lambda rows: rows)
    if op.name == "shared_experts":
        return x["partial"].sum(0) + _mlp(x["y"], layer.mlp.shared)
    if op.name == "head":
        parts = torch.stack([x["y"] @ part.double() for part in w.head])
        return torch.cat(list(w.ranks.gather(parts)), dim=-1)
    if op.name == "add_parts":
        return x["x"] + w.ranks.gather(x["partial"]).sum(0)
    if op.name == "embed":
        return w.embed.double()[x["ids"].long()]
    return None


def found(op: Op, buffers: dict[str, torch.Tensor], backend) -> torch.Tensor:
    """What the backend computed, in the form of `expected`."""
    config = backend.config
    if op.name.startswith("project"):
        return torch.cat([buffers["q"].flatten(), buffers["k"].flatten(), buffers["v"].flatten()])
    if op.name in ("merge_heads", "dense_mlp", "experts", "shared_experts"):
        return buffers["partial"].double().sum(0)
    if op.name == "route":
        dense = torch.zeros(buffers["index"].shape[0], config.n_routed_experts, dtype=torch.float64)
        return dense.scatter_(1, buffers["index"].cpu().long(), buffers["weight"].cpu().double())
    if op.name == "head" and buffers["logits"].shape[1] < config.vocab_size:  # own columns, gathered after the last op
        return torch.cat(list(backend.ranks.gather(buffers["logits"][None].contiguous())), dim=-1)
    return buffers[op.writes[0]]


def _normed(x, weight, epsilon):
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


def _projected(y, a, rotary, real, epsilon):
    qk, v = torch.einsum("rh,nhd->nrd", y, a.qk.double()), torch.einsum("rh,khv->krv", y, a.v.double())
    if a.qk_bias is not None:
        qk, v = qk + a.qk_bias, v + a.v_bias
    if a.q_norm is not None:
        qk = torch.cat((_normed(qk[:a.query_heads], a.q_norm, epsilon), _normed(qk[a.query_heads:], a.k_norm, epsilon)))
    half, positions = rotary.rotated // 2, torch.arange(y.shape[0]).clamp_max(real - 1).double()
    frequencies = (rotary.base ** -(torch.arange(half, dtype=torch.float64) * 2 / rotary.rotated)
                   if rotary.frequencies is None else torch.tensor(rotary.frequencies, dtype=torch.float64))
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos() * rotary.scaling, angles.sin() * rotary.scaling
    first, second = qk[..., :half].clone(), qk[..., half:2 * half].clone()
    qk[..., :half] = first * cos - second * sin
    qk[..., half:2 * half] = second * cos + first * sin
    v = v * (1.0 if a.value_scale is None else a.value_scale)
    q = qk[:a.query_heads] * a.qk_dim**-0.5
    return torch.cat([q.flatten(), qk[a.query_heads:].flatten(), v.flatten()])


def _attended(q, backend, op, chunk, real):
    kind = op.name.removeprefix("attend_")
    pool, a = backend.pools[kind], backend.weights.layers[op.layer].attention
    slots = torch.tensor([chunk.tables[kind].slot(p) for p in range(real)])
    keys, values = (store[op.layer].index_select(1, slots.to(store[op.layer].device)).cpu().double()[..., :width]
                    for store, width in ((pool.keys, a.qk_dim), (pool.values, a.v_dim)))  # some backends pad the widths
    groups = q.shape[0] // keys.shape[0]
    scores = torch.einsum("qrd,qsd->qrs", q[:, :real], keys.repeat_interleave(groups, 0))
    rows, columns = torch.arange(real)[:, None], torch.arange(real)[None]
    seen = columns <= rows if a.window is None else (columns <= rows) & (columns > rows - a.window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if a.sink is not None:
        scores = torch.cat((scores, a.sink.double()[:, None, None].expand(-1, real, 1)), dim=-1)
    weights = scores.softmax(-1)[..., :real]
    return torch.einsum("qrs,qsv->qrv", weights, values.repeat_interleave(groups, 0))


def _silu(x):
    return x / (1 + (-x).exp())


def _mlp(y, w: Dense):
    total = 0
    for gate_up, down in zip(w.gate_up.double(), w.down.double(), strict=True):
        gate, up = (y @ gate_up).chunk(2, -1)
        total = total + (_silu(gate) * up) @ down
    return total


def _routed(y, moe, config):
    logits = y @ moe.router[0].double()
    if moe.bias is not None:
        logits = logits + moe.bias
    dense = torch.zeros(y.shape[0], logits.shape[1], dtype=torch.float64)
    if moe.scores != "sigmoid":
        index = logits.sort(dim=-1, descending=True, stable=True).indices[:, :config.num_experts_per_tok]
        weight = logits.softmax(-1).gather(1, index)
        if moe.scores == "softmax of the chosen" or config.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        return dense.scatter_(1, index, weight)
    scores = 1 / (1 + (-logits).exp())
    choice = scores + moe.correction.double()
    if config.n_group > 1:
        grouped = choice.unflatten(1, (config.n_group, -1))
        best = grouped.sort(-1, descending=True).values[..., :2].sum(-1).topk(config.topk_group, -1).indices
        allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
    index = choice.sort(dim=-1, descending=True, stable=True).indices[:, :config.num_experts_per_tok]
    weight = scores.gather(1, index)
    if config.norm_topk_prob:
        weight = weight / weight.sum(-1, keepdim=True)
    return dense.scatter_(1, index, weight * (config.routed_scaling_factor or 1.0))


def _mxfp8(rows):
    """Rounded as kernels with hw_fp4 pages round them, from bf16 or float32 [n, ...] of whole blocks."""
    return dequantize_mxfp8(*quantize_mxfp8(rows.flatten(1).float())).double().view_as(rows)


def _experts(y, index, weight, experts, entering):
    """entering: what the rows become that a product takes."""
    out = torch.zeros(y.shape, dtype=torch.float64)
    for expert in index.unique().tolist():
        rows, place = torch.nonzero(index == expert, as_tuple=True)
        gate_up, down = (t.double() for t in experts.decoded(expert))
        inner = torch.einsum("rh,phi->rpi", entering(y[rows]), gate_up)
        if experts.biases is not None:
            inner = inner + experts.biases.gate_up[expert].mT.reshape(1, *inner.shape[1:])
        found = torch.einsum("rpi,pih->rh", entering(_gated(*inner.chunk(2, -1), experts.clamp)), down)
        if experts.biases is not None and experts.biases.down is not None:
            found = found + experts.biases.down[expert]
        out[rows] += weight[rows, place, None] * found
    return out


def _gated(gate, up, clamp):
    if clamp is None:
        return _silu(gate) * up
    limit, alpha = clamp
    gate = gate.clamp(max=limit)
    return gate / (1 + (-alpha * gate).exp()) * (up.clamp(-limit, limit) + 1)
