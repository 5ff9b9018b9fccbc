"""Which tensors a rank holds as the kernels read them, by layer: names, shapes, dtypes, tiles of pages.

All of it follows from the configuration and the number of ranks, so memory is planned before anything is read.
"""

from __future__ import annotations

import math
import os

import torch

from modeling.configuration_mimo_v2 import MiMoV2Config
from runtime_ref.core.tensor_parallel import SHARES, Ranks
from runtime_ref.kernels.launches import Heads
from runtime_ref.kernels.repack import Tile
from runtime_ref.kernels.tp_reduction import FP8_BLOCK, LEAST_DEPTH, expert_share, parts_of


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, where an operation costs the same whatever its size: tiles are wide."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def layer_heads(config: MiMoV2Config, index: int, ranks: Ranks) -> Heads:
    """Heads of a layer on one rank; with more ranks than key heads, several ranks hold the same one.

    Raises:
        ValueError: a number of ranks that cannot share them.
    """
    swa = "swa_" if config.hybrid_layer_pattern[index] else ""
    queries, keys, d, v = (getattr(config, swa + name) for name in
                           ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"))
    if queries % ranks.count or keys % ranks.count and ranks.count % keys:
        raise ValueError(f"{ranks.count} ranks: {queries} query heads and {keys} key heads of layer {index} cannot be shared; "
                         "expected a divisor of the query heads, and a divisor or multiple of the key heads")
    return Heads(queries // ranks.count, max(1, keys // ranks.count), d, v, int(d * config.partial_rotary_factor))


def expert_tiles(config: MiMoV2Config, ranks: Ranks, shares: int = SHARES, hw_fp4: bool = False) -> tuple[Tile, Tile]:
    """Tiles of gate-up and down pages: the standard ones, or smaller for small matrices, or wider in the interpreter; several
    parts are whole down pages.

    hw_fp4: for tensor cores that read E2M1 themselves, whose wide side are 128 rows."""
    least, most = (64, 128) if hw_fp4 else (16, 256 if interpreted() else Tile().rows)

    def fitting(rows: int, depth: int) -> Tile:
        return Tile(max(least, min(most, _power(rows))), max(LEAST_DEPTH, min(Tile().depth, depth)), hw_fp4)

    inner = config.moe_intermediate_size
    parts = parts_of(inner, LEAST_DEPTH, shares)
    depth = _power(inner) if parts == 1 else math.gcd(inner // parts, Tile().depth)
    own = inner // expert_share(inner, ranks, shares).of
    return fitting(2 * own, _power(config.hidden_size)), fitting(config.hidden_size, depth)


def has_head_norms(config) -> bool:
    """Whether queries and keys are normed head by head."""
    return getattr(config, "head_norms", False)


def layer_shapes(config: MiMoV2Config, index: int, ranks: Ranks, fp8: frozenset[str], shares: int = SHARES,
                 hw_fp4: bool = False) -> dict[str, tuple]:
    """(shape, dtype) of the tensors of a layer on one rank; `fp8`: those of "qkv", "o", "gate_up", "down" that are FP8."""
    H, heads, count = config.hidden_size, layer_heads(config, index, ranks), ranks.count
    swa = config.hybrid_layer_pattern[index]
    matrices = {"qkv": (heads.rows, H), "o": (H, heads.queries * heads.v)}
    shapes: dict[str, tuple] = {"input_norm": ((H,), torch.float32), "post_norm": ((H,), torch.float32)}
    if config.add_swa_attention_sink_bias if swa else config.add_full_attention_sink_bias:
        shapes["sink"] = ((heads.queries,), torch.float32)
    if has_head_norms(config):
        shapes["head_norm"] = (((heads.queries + heads.keys) * heads.d,), torch.float32)
    if config.moe_layer_freq[index]:
        up_tile, down_tile = expert_tiles(config, ranks, shares, hw_fp4)
        E, inner = config.n_routed_experts, config.moe_intermediate_size
        inner //= expert_share(inner, ranks, shares).of
        shapes["router"], shapes["correction"] = ((E, H), torch.float32), ((E,), torch.float32)
        shapes["up_pages"] = ((E, -(-inner // (up_tile.rows // 2)), -(-H // up_tile.depth), up_tile.page_bytes), torch.uint8)
        shapes["down_pages"] = ((E, -(-H // down_tile.rows), -(-inner // down_tile.depth), down_tile.page_bytes), torch.uint8)
    else:
        inner = config.intermediate_size // count
        matrices |= {"gate_up": (2 * inner, H), "down": (H, inner)}
    for name, shape in matrices.items():
        shapes[name] = (shape, torch.uint8 if name in fp8 else torch.bfloat16)
        if name in fp8:
            shapes[f"{name}_scales"] = ((shape[0], -(-shape[1] // FP8_BLOCK)), torch.float32)
    return shapes


def outer_shapes(config: MiMoV2Config, ranks: Ranks) -> dict[str, tuple]:
    """(shape, dtype) of the tensors outside the layers."""
    H, vocabulary = config.hidden_size, config.vocab_size
    if vocabulary % ranks.count:
        raise ValueError(f"{ranks.count} ranks: a vocabulary of {vocabulary} cannot be shared evenly")
    return {"embed": ((vocabulary, H), torch.bfloat16), "norm": ((H,), torch.float32),
            "head": ((vocabulary // ranks.count, H), torch.bfloat16)}


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
