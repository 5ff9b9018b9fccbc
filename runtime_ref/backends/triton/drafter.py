"""The DFlash drafter on the Triton kernels: the passes of `backends/torch/drafter.py`, which documents the idea, launch by
launch.

Reference: the torch drafter. Differences: everything is bf16 where a product reads it; a block has exactly the rows that
are wanted (the anchor and its drafts), and only the drafts' rows meet the head.

Ranks share its heads and inner dimensions as those of the target, and sum o_proj and down in parts that the model fixes
(`kernels/tp_reduction.py`): read whole by every rank, the published drafter would cost one of eight a quarter of its step. Of
what joins the features (`fc`) each makes a share of the columns. A drafter whose sizes the ranks cannot share is held by each
of them, in the same parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modeling.drafter import DFlashDraftModel
from runtime_ref.backends.base import Drafter
from runtime_ref.backends.triton.backend import TritonBackend
from runtime_ref.backends.triton.steps import BLOCK, Blocks, KernelPool, RotaryTable, plan_blocks
from runtime_ref.checkpoints.device_weights import Arena, piece_bytes
from runtime_ref.core.batch import KIND, DraftRequest
from runtime_ref.core.drafter_checks import check_drafter
from runtime_ref.core.kv_cache import Table
from runtime_ref.core.tensor_parallel import SHARES, SINGLE_RANK, Ranks
from runtime_ref.kernels import launches
from runtime_ref.kernels.attention import attend
from runtime_ref.kernels.launches import Heads, Matrix, paired
from runtime_ref.kernels.tp_reduction import own_keys, own_share, parts_of

CONTEXT_ROWS = 64
LEAST_DOWN = 16  # entries of a part of the down product


@dataclass(frozen=True)
class Share:
    """What a rank holds: of whole heads and of the inner dimension, `parts_o` and `parts_down` parts of the sums over them.

    ranks: those that sum; SINGLE_RANK where each holds everything.
    """

    ranks: Ranks
    parts_o: int
    parts_down: int

    def of(self, weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's equal share of a dimension."""
        return own_share(weight, dim, self.ranks)


def share_of(model: DFlashDraftModel, ranks: Ranks, shares: int = SHARES) -> Share:
    """How `ranks` share a drafter; see the module's text. shares: the most parts of a sum, as for `parts.layer_parts`."""
    config, v = model.config, model.layers[0].self_attn.v_dim
    queries, keys, count = config.num_attention_heads, config.num_key_value_heads, ranks.count
    o, down = parts_of(queries * v, v, shares), parts_of(config.intermediate_size, LEAST_DOWN, shares)
    if config.hidden_size % count or queries % count or (keys % count and count % keys) or o % count or down % count:
        return Share(SINGLE_RANK, o, down)
    return Share(ranks, o // count, down // count)


class TritonDrafter(Drafter):
    """Weights, pool and the two passes: `extend_tables` by context features, `logits` of blocks."""

    def __init__(self, model: DFlashDraftModel, backend: TritonBackend, pages: int, positions: int, shares: int = SHARES):
        config, device = model.config, backend.device
        check_drafter(model, backend.config)
        self.backend, self.target_layers, self.block = backend, list(model.target_layer_ids), model.block_size
        self.window, self.causal, self.epsilon = model.window, model.causal, config.rms_norm_eps
        if self.block > BLOCK:
            raise ValueError(f"dflash/config.json: block_size: {self.block}, expected at most {BLOCK} for the triton backend")
        if self.causal and self.window is not None and self.window < self.block:
            raise ValueError(f"dflash/config.json: window {self.window} of a causal block of {self.block}, expected at least "
                             "the block")
        attention = model.layers[0].self_attn
        self.share = share_of(model, backend.ranks, shares)
        count = self.share.ranks.count
        keys, d = max(1, config.num_key_value_heads // count), config.head_dim
        self.heads = Heads(config.num_attention_heads // count, keys, d, attention.v_dim, model.rotary_dim)
        self.context_heads = Heads(0, keys, d, attention.v_dim, model.rotary_dim)
        self.value_scale = attention.value_scale
        self.rotary = RotaryTable(model.rotary_base, model.rotary_dim, positions + 2 * BLOCK, device).table
        self.pool = KernelPool({i: (keys, d, attention.v_dim) for i in range(len(model.layers))}, pages, self.window, device)
        self.fc = _matrix(device, self.share.of(model.fc.weight))
        self.hidden_norm, self.norm = (m.weight.detach().float().to(device) for m in (model.hidden_norm, model.norm))
        self.mask = model.mask_embedding.detach().to(device, torch.bfloat16)
        self.layers = [self._layer(layer, config.num_key_value_heads, device) for layer in model.layers]
        self._place(device)

    def _place(self, device: str) -> None:
        """Moves what the megakernel finds by offset into one arena."""
        pieces = [self.fc.w, self.hidden_norm, *(getattr(t, "w", t) for layer in self.layers for t in layer.values()
                                                 if t is not None)]
        self.arena = Arena(sum(piece_bytes(t) for t in pieces), device)
        self.fc, self.hidden_norm = Matrix(self.arena.put(self.fc.w)), self.arena.put(self.hidden_norm)
        for layer in self.layers:
            for name, t in layer.items():
                if t is not None:
                    layer[name] = Matrix(self.arena.put(t.w)) if isinstance(t, Matrix) else self.arena.put(t)

    def _layer(self, layer, keys: int, device: str) -> dict:
        """This rank's weights of a layer; keys: key heads of all ranks."""
        a, m, heads, share = layer.self_attn, layer.mlp, self.heads, self.share
        own = share.of(a.q_proj.weight), *(own_keys(p.weight, keys, share.ranks) for p in (a.k_proj, a.v_proj))
        qkv = paired(torch.cat([w.detach() for w in own]).to(device, torch.bfloat16), heads)
        norms = torch.cat((a.q_norm.weight.detach().float().repeat(heads.queries),
                           a.k_norm.weight.detach().float().repeat(heads.keys))).to(device)
        norms, split = paired(norms, heads), heads.queries * heads.d
        sink = a.attention_sink_bias
        return {"qkv": Matrix(qkv), "context": Matrix(qkv[split:].contiguous()), "head_norm": norms,
                "context_norm": norms[split:].contiguous(), "o": _matrix(device, share.of(a.o_proj.weight, 1)),
                "gate_up": _matrix(device, share.of(m.gate_proj.weight), share.of(m.up_proj.weight)),
                "down": _matrix(device, share.of(m.down_proj.weight, 1)),
                "sink": None if sink is None else share.of(sink.detach()).float().to(device).contiguous(),
                "input_norm": layer.input_layernorm.weight.detach().float().to(device),
                "post_norm": layer.post_attention_layernorm.weight.detach().float().to(device)}

    @torch.inference_mode()
    def extend(self, target_hidden: torch.Tensor, positions: list[int], slots: list[int]) -> None:
        """Writes keys and values of features [n, target layers * H] at positions into slots of the pool."""
        tiling, device = self.backend.tiling, self.backend.device
        at, into = (torch.tensor(c, dtype=torch.int32, device=device) for c in (positions, slots))
        out = torch.empty((target_hidden.shape[0], self.fc.w.shape[0]), dtype=torch.float32, device=device)
        features = launches.product(target_hidden.contiguous(), self.fc, out, tiling)
        if self.share.ranks.count > 1:
            features = self.share.ranks.gather(features[None]).transpose(0, 1).reshape(target_hidden.shape[0], -1)
        for i, layer in enumerate(self.layers):
            launches.project(features, layer["context"], self.context_heads, self.rotary, at, into, self.pool.keys[i],
                             self.pool.keys[i], self.pool.values[i], tiling, norm=(self.hidden_norm, self.epsilon),
                             head_norm=(layer["context_norm"], self.epsilon), value_scale=self.value_scale)

    def extend_tables(self, target_hidden: torch.Tensor, start: int, table: Table) -> None:
        """`extend` by consecutive positions of one sequence."""
        for begin in range(0, target_hidden.shape[0], CONTEXT_ROWS):
            part = target_hidden[begin:begin + CONTEXT_ROWS]
            positions = list(range(start + begin, start + begin + part.shape[0]))
            self.extend(part, positions, [table.slot(p) for p in positions])

    @torch.inference_mode()
    def logits(self, requests: list[DraftRequest]) -> list[torch.Tensor]:
        """Draft logits [count, vocabulary] float32 of each sequence, its pending features included in the context first."""
        for w in requests:
            if w.target_hidden is not None and w.target_hidden.shape[0]:
                self.extend_tables(w.target_hidden, w.position - w.target_hidden.shape[0], w.tables[KIND])
        found = self.block_logits(*self.plan(requests))
        return list(found.split([w.count for w in requests]))

    def block_logits(self, ids: torch.Tensor, positions: torch.Tensor, picked: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """float32 [drafts, vocabulary] of planned blocks, whose context is complete."""
        x = launches.gather(self.backend.kernel_weights.embed, ids, self.backend.tiling, spare=self.mask)
        for i, layer in enumerate(self.layers):
            x = self._run_layer(i, layer, x, positions, blocks)
        return self.backend.head_logits(x, picked.shape[0], norm=(self.norm, self.epsilon), rows=picked)

    def plan(self, requests: list[DraftRequest]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Blocks]:
        """ids (-1: the mask), positions and the drafts' rows, int32, and the blocks over the drafter's pages."""
        device = self.backend.device
        ids, positions, picked, places = [], [], [], []
        for w in requests:
            places.append((w.tables[KIND], w.position, w.count + 1, len(ids)))
            picked += range(len(ids) + 1, len(ids) + w.count + 1)
            ids += [w.anchor] + [-1] * w.count
            positions += range(w.position, w.position + w.count + 1)
        ids, positions, picked = (torch.tensor(c, dtype=torch.int32, device=device) for c in (ids, positions, picked))
        return ids, positions, picked, plan_blocks(self.pool, places, device)

    def _run_layer(self, i: int, layer: dict, x: torch.Tensor, positions: torch.Tensor, blocks) -> torch.Tensor:
        tiling, (keys, values) = self.backend.tiling, (self.pool.keys[i], self.pool.values[i])
        q = torch.empty((self.heads.queries, x.shape[0], self.heads.d), dtype=torch.bfloat16, device=x.device)
        launches.project(x, layer["qkv"], self.heads, self.rotary, positions, blocks.slots, q, keys, values, tiling,
                         norm=(layer["input_norm"], self.epsilon), head_norm=(layer["head_norm"], self.epsilon),
                         value_scale=self.value_scale)
        heads = attend(q, keys, values, layer["sink"], blocks.tables, blocks.first, blocks.start, blocks.count, blocks.row,
                       rows=BLOCK, window=self.window, longest=blocks.longest, float_dot=tiling.float_dot,
                       draft=not self.causal)
        x = self._added(x, heads, layer["o"], self.share.parts_o)
        inner = launches.swiglu(x, layer["gate_up"], tiling, norm=(layer["post_norm"], self.epsilon))
        return self._added(x, inner, layer["down"], self.share.parts_down)

    def _added(self, x: torch.Tensor, inner: torch.Tensor, matrix: Matrix, parts: int) -> torch.Tensor:
        """x plus a product that the ranks share."""
        tiling, ranks = self.backend.tiling, self.share.ranks
        if ranks.count == 1:
            return launches.product(inner, matrix, torch.empty_like(x), tiling, residual=x, parts=parts)
        own = torch.empty((parts, *x.shape), dtype=torch.float32, device=x.device)
        return launches.add(x, ranks.gather(launches.product(inner, matrix, own, tiling, parts=parts)), tiling)


def _matrix(device: str, *weights: torch.Tensor) -> Matrix:
    return Matrix(torch.cat([w.detach() for w in weights]).to(device, torch.bfloat16).contiguous())
