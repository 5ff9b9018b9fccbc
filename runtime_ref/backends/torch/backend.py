"""Runs a target program with torch ops, one op at a time: the reference backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from modeling.drafter import load_drafter
from runtime_ref.backends.base import Backend, Capabilities, Drafter
from runtime_ref.backends.torch import ops, row_rules
from runtime_ref.backends.torch.ops import Step
from runtime_ref.backends.torch.rotary import rotary_tables
from runtime_ref.checkpoints.host_weights import Dense, TargetWeights
from runtime_ref.core.batch import SequenceChunk
from runtime_ref.core.kv_cache import Pool
from runtime_ref.core.program import Op, run_ops
from runtime_ref.core.tensor_parallel import shares


class TorchBackend(Backend):
    """Runs programs on one rank's weights with torch, on the CPU.

    Args:
        dtype: of the residual stream and the cache, bfloat16 or float32.
        pages: pages by kind ("full", "window"); a kind that the model does not have gets no pool.
    """

    def __init__(self, weights: TargetWeights, *, dtype: torch.dtype = torch.bfloat16, pages: dict[str, int]):
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"dtype {dtype}: expected bfloat16 or float32")
        self.weights, self.config, self.dtype, self.ranks = weights, weights.config, dtype, weights.ranks
        self.pools = self._pools(pages)
        self.rotary = rotary_tables(self.config)
        self.ops: dict[str, Callable] = {name.removeprefix("op_"): getattr(self, name)
                                         for name in dir(self) if name.startswith("op_")}
        self._probed: set[tuple[int, int, int]] = set()
        self.rules = row_rules.STRICT
        self.probe(self.product_shapes())

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("torch", row_multiple=self.rules.quantum)

    def probe(self, shapes: set[tuple[int, int, int]]) -> None:
        """Fits the row rules to these products (batch, K, N) too (see `row_rules.probe_rows`)."""
        self._probed |= shapes
        self.rules = row_rules.probe_rows(self._probed)

    def load_drafter(self, folder: str | Path, pages: int, context: int, *, precision: str = "bf16") -> Drafter:
        self.only_bf16_drafts(precision)
        from runtime_ref.backends.torch.drafter import TorchDrafter

        drafter = TorchDrafter(load_drafter(folder, torch.float32), self, pages)
        self.probe(drafter.product_shapes())
        return drafter

    def _pools(self, pages: dict[str, int]) -> dict[str, Pool]:
        pools = {}
        for kind, window in (("full", None), ("window", self.config.sliding_window)):
            own = {i: (a.key_heads, a.qk_dim, a.v_dim) for i, layer in enumerate(self.weights.layers)
                   if ((a := layer.attention).window is not None) == (kind == "window")}
            if own:
                pools[kind] = Pool(own, pages[kind], self.dtype, window)
        return pools

    def product_shapes(self) -> set[tuple[int, int, int]]:
        """(batch, K, N) of the products of a step."""
        w, config = self.weights, self.config
        found = {tuple(w.head.shape)}
        for layer in w.layers:
            a = layer.attention
            found |= {tuple(a.qk.shape), tuple(a.v.shape), tuple(a.o.shape)}
            found |= {(a.key_heads, a.qk_dim, ops.PAGE), (a.key_heads, ops.PAGE, a.v_dim)}
            dense = layer.mlp if isinstance(layer.mlp, Dense) else layer.mlp.shared
            if dense is not None:
                found |= {tuple(dense.gate_up.shape), tuple(dense.down.shape)}
            if dense is not layer.mlp:
                parts, inner = layer.mlp.experts.parts, config.moe_intermediate_size // shares(config.moe_intermediate_size)
                found |= {tuple(layer.mlp.router.shape), (parts, config.hidden_size, 2 * inner),
                          (parts, inner, config.hidden_size)}
        return found

    def plan(self, chunks: list[SequenceChunk]) -> Step:
        """The step that computes the tokens of `chunks`, whose tables must reach to their ends."""
        step, blocks = ops.plan_rows(chunks, self.rules)
        for kind, pool in self.pools.items():
            step.attention[kind] = ops.attention_metadata(pool, kind, blocks, step.block)
            step.rotary[kind] = self.rotary[kind].rows(step.positions, step.highest)
        return step

    def plan_of_rows(self) -> Step:
        """A step of eight rows without a sequence, for ops that look at rows only."""
        rows = torch.zeros(row_rules.ROWS, dtype=torch.long)
        return Step(rows, rows, row_rules.ROWS, 0, None, row_rules.ROWS, row_rules.ROWS, None, None)

    @torch.inference_mode()
    def run(self, program: list[Op], step: Step, watch: Callable[[Op, dict], None] | None = None, *,
            host: bool = True) -> dict[str, torch.Tensor]:
        """Executes the ops in order; returns all buffers."""
        return run_ops(program, self.ops, step, watch)

    def op_embed(self, step, layer, ids):
        return ops.embed(self.weights.embed, ids, self.dtype)

    def op_input_norm(self, step, layer, x):
        return ops.norm(x, self.weights.layers[layer].input_norm, self.config.layernorm_epsilon)

    def op_post_norm(self, step, layer, x):
        return ops.norm(x, self.weights.layers[layer].post_norm, self.config.layernorm_epsilon)

    def op_final_norm(self, step, layer, x):
        return ops.norm(x, self.weights.norm, self.config.layernorm_epsilon)

    def op_project_full(self, step, layer, y, kind="full"):
        return ops.project_qkv(y, self.weights.layers[layer].attention, self.rotary[kind], step.rotary[kind],
                               self.config.layernorm_epsilon, self.rules)

    def op_project_window(self, step, layer, y):
        return self.op_project_full(step, layer, y, "window")

    def op_write_full(self, step, layer, k, v, kind="full"):
        ops.write_cache(self.pools[kind], layer, k, v, step.attention[kind].slots)

    def op_write_window(self, step, layer, k, v):
        self.op_write_full(step, layer, k, v, "window")

    def op_attend_full(self, step, layer, q, kind="full"):
        return ops.attend(q, self.pools[kind], layer, step.attention[kind],
                          self.weights.layers[layer].attention.sink, step, self.rules)

    def op_attend_window(self, step, layer, q):
        return self.op_attend_full(step, layer, q, "window")

    def op_merge_heads(self, step, layer, heads):
        attention = self.weights.layers[layer].attention
        return ops.merge_heads(heads, attention.o, attention.o_bias, self.rules)

    def op_add_parts(self, step, layer, x, partial):
        return ops.add_parts(x, partial, self.weights.ranks, self.dtype, self.rules)

    def op_dense_mlp(self, step, layer, y):
        return ops.dense_mlp(y, self.weights.layers[layer].mlp, self.rules)

    def op_route(self, step, layer, y):
        return ops.route(y, self.weights.layers[layer].mlp, self.config, self.rules)

    def op_experts(self, step, layer, y, index, weight):
        return ops.run_experts(y, index, weight, self.weights.layers[layer].mlp.experts, step.real, self.rules)

    def op_shared_experts(self, step, layer, y, partial):
        return partial + ops.dense_mlp(y, self.weights.layers[layer].mlp.shared, self.rules)

    def op_target_hidden(self, step, layer, x):
        return x

    def op_pick_rows(self, step, layer, x):
        return x if step.head_rows is None else x.index_select(0, step.head_rows)

    def op_head(self, step, layer, y):
        return ops.head_logits(y, self.weights.head, self.weights.ranks, self.rules)
