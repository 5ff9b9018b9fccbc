"""The DFlash drafter inside the runtime: its ops are those of `ops.py`, so drafts do not depend on the batch either.

Context features become keys and values once and stay in pages of kind "draft". The block's own keys are written to the same
pages, at the positions that they stand for: they are provisional, and the features of what is committed overwrite them. So
one mask over positions says everything: context before the anchor within the window, and the block itself.

Every rank holds the whole drafter (it is a fraction of a percent of the target) and multiplies its share of the shared head.

Rejected: features projected in every round again (the context would cost a product per position and round).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modeling.drafter import DFlashDraftModel
from runtime_ref.backends.base import Drafter
from runtime_ref.backends.torch import ops
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.backends.torch.ops import AttentionMetadata
from runtime_ref.backends.torch.rotary import Rotary
from runtime_ref.backends.torch.row_rules import NARROW, ROWS, RowRules, padded, product, rounded
from runtime_ref.core.batch import KIND, DraftRequest
from runtime_ref.core.drafter_checks import check_drafter
from runtime_ref.core.kv_cache import PAGE, Pool, Table
from runtime_ref.core.markov import MarkovHead


class TorchDrafter(Drafter):
    """Weights, pool and the two passes: `extend` by context features, `logits` of blocks."""

    def __init__(self, model: DFlashDraftModel, backend: TorchBackend, pages: int):
        config = model.config
        check_drafter(model, backend.config, refused=())
        self.backend, self.target_layers, self.block = backend, list(model.target_layer_ids), model.block_size
        self.window, self.causal, self.epsilon = model.window, model.causal, config.rms_norm_eps
        self.Q, self.K, self.D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.V = model.layers[0].self_attn.v_dim
        self.value_scale = model.layers[0].self_attn.value_scale
        self.rotary = Rotary(model.rotary_base, model.rotary_dim, self.D)
        self.pool = Pool({i: (self.K, self.D, self.V) for i in range(len(model.layers))}, pages, backend.dtype, self.window)
        self.markov = None
        if model.markov_next is not None:
            self.markov = MarkovHead(model.markov_previous.weight.detach().float(),
                                     model.markov_next.weight.detach().float().T.contiguous(), model.selector_top_k)
        self._take(model)

    def _take(self, model: DFlashDraftModel) -> None:
        def heads(w, width):  # [heads * width, H] -> [heads, H, width]
            return w.detach().float().unflatten(0, (-1, width)).transpose(1, 2).contiguous()

        self.fc = model.fc.weight.detach().float().T.contiguous()[None]
        self.hidden_norm, self.norm = (m.weight.detach().float() for m in (model.hidden_norm, model.norm))
        self.mask = model.mask_embedding.detach().float()
        self.layers = []
        for layer in model.layers:
            a, m = layer.self_attn, layer.mlp
            self.layers.append({
                "qk": torch.cat((heads(a.q_proj.weight, self.D), heads(a.k_proj.weight, self.D))),
                "v": heads(a.v_proj.weight, self.V), "o": a.o_proj.weight.detach().float().T.contiguous()[None],
                "qk_norm": torch.cat((a.q_norm.weight.detach().float().expand(self.Q, 1, -1),
                                      a.k_norm.weight.detach().float().expand(self.K, 1, -1))),
                "sink": None if a.attention_sink_bias is None else a.attention_sink_bias.detach().float(),
                "gate_up": torch.cat((m.gate_proj.weight, m.up_proj.weight)).detach().float().T.contiguous()[None],
                "down": m.down_proj.weight.detach().float().T.contiguous()[None],
                "convolutions": [None if isinstance(c, torch.nn.Identity) else tuple(
                    p.weight.detach().float().T.contiguous()[None] for p in (c.down_proj, c.up_proj))
                    for c in (layer.attention_convolution, layer.mlp_convolution)],
                "input_norm": layer.input_layernorm.weight.detach().float(),
                "post_norm": layer.post_attention_layernorm.weight.detach().float()})
        # Context keys and values of all layers in one product each.
        self.context_k = torch.cat([layer["qk"][self.Q:] for layer in self.layers])
        self.context_v = torch.cat([layer["v"] for layer in self.layers])
        self.context_k_norm = torch.cat([layer["qk_norm"][self.Q:] for layer in self.layers])

    def product_shapes(self) -> set[tuple[int, int, int]]:
        """(batch, K, N) of the products of both passes."""
        found = {tuple(t.shape) for t in (self.fc, self.context_k, self.context_v)}
        for layer in self.layers:
            found |= {tuple(layer[name].shape) for name in ("qk", "v", "o", "gate_up", "down")}
            found |= {tuple(w.shape) for pair in layer["convolutions"] if pair for w in pair}
        return found | {(self.K, self.D, PAGE), (self.K, PAGE, self.V)}

    @torch.inference_mode()
    def extend(self, target_hidden: torch.Tensor, positions: list[int], slots: list[int]) -> None:
        """Writes keys and values of features [n, target layers * H] at positions into slots of the pool."""
        n = len(positions)
        rules = self.backend.rules
        rows = padded(n, rules)
        if rows != n:
            target_hidden = torch.cat((target_hidden, target_hidden[-1:].expand(rows - n, -1)))
            positions = positions + positions[-1:] * (rows - n)
        features = ops.norm(ops.spread(target_hidden, self.fc, rules)[0], self.hidden_norm, self.epsilon)
        table = self.rotary.rows(torch.tensor(positions), max(positions))
        k = ops.norm(ops.spread(features, self.context_k, rules), self.context_k_norm, self.epsilon)
        k, v = self.rotary.apply(k, table), ops.spread(features, self.context_v, rules)
        if self.value_scale is not None:
            v = v.mul_(self.value_scale)
        into = torch.tensor(slots)
        for i in range(len(self.layers)):
            own = slice(i * self.K, (i + 1) * self.K)
            ops.write_cache(self.pool, i, k[own], v[own], into)

    def extend_tables(self, target_hidden: torch.Tensor, start: int, table: Table) -> None:
        """`extend` by consecutive positions of one sequence, in pieces of at most 64."""
        for begin in range(0, target_hidden.shape[0], 64):
            part = target_hidden[begin:begin + 64]
            positions = list(range(start + begin, start + begin + part.shape[0]))
            self.extend(part, positions, [table.slot(p) for p in positions])

    @torch.inference_mode()
    def logits(self, requests: list[DraftRequest]) -> list[torch.Tensor]:
        """Draft logits [count, vocabulary] float32 of each sequence, its pending features included in the context first."""
        self._catch_up(requests)
        most = max(w.count for w in requests) + 1
        rules = self.backend.rules
        T = NARROW if most <= NARROW and rules.quantum == NARROW else -(-most // ROWS) * ROWS
        x = self.backend.weights.embed.new_empty(len(requests), T, self.mask.shape[0])
        x[:] = self.mask
        x[:, 0] = self.backend.weights.embed[torch.tensor([w.anchor for w in requests])]
        x = rounded(x.flatten(0, 1), self.backend.dtype)
        positions = torch.tensor([w.position for w in requests])[:, None] + torch.arange(T)
        table = self.rotary.rows(positions.flatten(), int(positions.max()))
        seen = self._metadata(requests, positions, T)
        step = _Blocks(T)
        for i, layer in enumerate(self.layers):
            y = convolved(ops.norm(x, layer["input_norm"], self.epsilon), layer["convolutions"][0], T, rules)
            qk = self.rotary.apply(ops.norm(ops.spread(y, layer["qk"], rules), layer["qk_norm"], self.epsilon), table)
            v = ops.spread(y, layer["v"], rules)
            if self.value_scale is not None:
                v = v.mul_(self.value_scale)
            rows = seen.rows
            ops.write_cache(self.pool, i, qk[self.Q:].index_select(1, rows), v.index_select(1, rows), seen.attention.slots)
            heads = ops.attend(qk[:self.Q] * self.D**-0.5, self.pool, i, seen.attention, layer["sink"], step, rules)
            x = rounded(x + ops.merge_heads(heads, layer["o"], rules=rules)[0], self.backend.dtype)
            y = convolved(ops.norm(x, layer["post_norm"], self.epsilon), layer["convolutions"][1], T, rules)
            inner = ops.gated(ops.spread(y, layer["gate_up"], rules))
            x = rounded(x + product(inner, layer["down"], rules)[0], self.backend.dtype)
        y = ops.norm(x, self.norm, self.epsilon)
        logits = ops.head_logits(y, self.backend.weights.head, self.backend.weights.ranks, rules).view(len(requests), T, -1)
        return [logits[b, 1:w.count + 1] for b, w in enumerate(requests)]

    def _catch_up(self, requests: list[DraftRequest]) -> None:
        pending = self._pending(requests)
        if pending is not None:
            self.extend(*pending)

    def _pending(self, requests: list[DraftRequest]) -> tuple[torch.Tensor, list[int], list[int]] | None:
        """What `extend` has to be told before a block; long stretches are taken in at once."""
        late = [w for w in requests if w.target_hidden is not None and w.target_hidden.shape[0]]
        short = [w for w in late if w.target_hidden.shape[0] <= 64]
        for w in late:
            if w.target_hidden.shape[0] > 64:
                self.extend_tables(w.target_hidden, w.position - w.target_hidden.shape[0], w.tables[KIND])
        if not short:
            return None
        positions = [p for w in short for p in range(w.position - w.target_hidden.shape[0], w.position)]
        slots = [w.tables[KIND].slot(p) for w in short for p in range(w.position - w.target_hidden.shape[0], w.position)]
        return torch.cat([w.target_hidden for w in short]) if len(short) > 1 else short[0].target_hidden, positions, slots

    def _metadata(self, requests: list[DraftRequest], positions: torch.Tensor, T: int) -> _DraftMetadata:
        """Pages, mask and slots of the blocks; only the block's own positions have slots, up to its count."""
        first = [self.pool.first_needed(w.position) for w in requests]
        last = [(w.position + w.count) // PAGE for w in requests]
        n = max(b - a for a, b in zip(first, last, strict=True)) + 1
        tables, slots, rows = [], [], []
        for b, (w, low, high) in enumerate(zip(requests, first, last, strict=True)):
            table = w.tables[KIND]
            held = table.pages[low - table.first:high + 1 - table.first]
            tables += held + [0] * (n - len(held))
            slots += [table.slot(w.position + i) for i in range(w.count + 1)]
            rows += range(b * T, b * T + w.count + 1)
        anchors = torch.tensor([[w.position, w.position + w.count + 1] for w in requests])[:, :, None, None, None]
        keys = (torch.tensor(first)[:, None] * PAGE + torch.arange(n * PAGE)).view(-1, n, 1, PAGE)
        queries = positions[:, None, :, None]
        context = keys < anchors[:, 0]
        if self.window is not None:
            context = context & (queries - keys < self.window)
        own = (keys >= anchors[:, 0]) & (keys < anchors[:, 1])
        if self.causal:
            own = own & (keys <= queries)
        seen = (context | own).expand(-1, -1, T, -1)
        hidden = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        attention = AttentionMetadata(len(requests), torch.tensor(tables), hidden, torch.tensor(slots))
        return _DraftMetadata(attention, torch.tensor(rows))


@dataclass
class _DraftMetadata:
    attention: AttentionMetadata
    rows: torch.Tensor


@dataclass
class _Blocks:
    """What `model.attend` needs of a step whose rows are whole blocks."""

    block: int
    block_rows: None = None
    row_slots: None = None


def convolved(y: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor] | None, block: int, rules: RowRules) -> torch.Tensor:
    """y [R, H] of whole blocks, with up(down(y_t)) * y_(t - 1) added inside each block (pair: down [1, H, r], up [1, r, H])."""
    if pair is None:
        return y
    before = torch.nn.functional.pad(y.unflatten(0, (-1, block)), (0, 0, 1, 0))[:, :-1].flatten(0, 1)
    return torch.addcmul(y, ops.spread(ops.spread(y, pair[0], rules)[0], pair[1], rules)[0], before)


