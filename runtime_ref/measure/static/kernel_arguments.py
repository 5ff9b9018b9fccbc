"""Arguments of the small and the persistent kernels as one of eight ranks of MiMo-V2.5-Pro would give them, for `static_gates`.

Types of run-time arguments by name (`POINTERS`, `FLOATS`; everything else is int32), and compile-time ones by kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime_ref.kernels.attention import CHUNK_PAGES, PAGE, attention_constants

if TYPE_CHECKING:
    from runtime_ref.kernels.experimental.megakernel import Tuning

POINTERS = {"x": "bf16", "up": "u8", "down": "u8", "index": "i32", "weight": "fp32", "order": "i32", "plan": "i32",
            "inner": "bf16", "partial": "fp32", "residual": "bf16", "out": "bf16", "ready": "i32", "arrived": "i32",
            "control": "i32", "buffers": "i64", "signals": "i64", "failed": "i32", "pages": "u8", "data": "u8",
            "lower_out": "fp32", "upper_out": "fp32", "q": "bf16", "keys": "bf16", "values": "bf16", "sink": "fp32",
            "tables": "i32", "first": "i32", "start": "i32", "count": "i32", "row": "i32", "stats": "fp32"}
ROW_POINTERS = {"w": "bf16", "scales": "fp32", "gamma": "fp32", "head_gamma": "fp32", "cos": "fp32", "sin": "fp32",
                "positions": "i32", "slots": "i32", "k": "bf16", "v": "bf16", "rows": "i32", "correction": "fp32",
                "scores": "fp32", "rounded": "bf16", "table": "i32", "arena": "u8", "embed": "bf16", "spare": "bf16",
                "head": "bf16", "final_norm": "fp32", "ids": "i32", "head_rows": "i32", "heads": "bf16", "y": "bf16",
                "route_arrived": "i32", "target_hidden": "bf16", "features": "fp32", "context_positions": "i32",
                "context_slots": "i32", "logits": "fp32",
                "drafts": "i32", "best": "fp32", "temperatures": "fp64", "uniform": "fp64", "mass": "fp64", "place": "i32",
                "tokens": "i32", "accepted": "i32", "rows_left": "i32", "unsafe": "i32",
                "barrier": "i32", "launches": "i32", "attend_arrived": "i32", "expert_inner": "bf16", "expert_partial": "fp32"}
for _kind in ("full", "window"):
    ROW_POINTERS |= {f"{_kind}_{name}": dtype for name, dtype in (
        ("cos", "fp32"), ("sin", "fp32"), ("keys", "bf16"), ("values", "bf16"), ("slots", "i32"), ("tables", "i32"),
        ("first", "i32"), ("start", "i32"), ("count", "i32"), ("row", "i32"))}
FLOATS = ("epsilon", "q_scale", "v_scale", "head_epsilon", "factor")
# Sizes of the model and of its caches, multiples of 16 here, so that a launch promises it too; a kernel that has one of these
# names for something else does not specialize on it.
ALIGNED = ("H", "K", "I", "N", "E", "n", "vocabulary", "hidden_width", "full_stride", "window_stride", "k_stride", "POSITIONS",
           "heads_stride", "part_stride")
TILE = {"BN": 32, "BK": 128, "FLOAT_DOT": False}
ROUTER = {"A": 8, "WIDE": 512, "GROUPS": 1, "TOP_GROUPS": 1, "NORMED": True}
HEADS = {"queries": 16, "keys": 1, "d": 192, "v": 128, "rotated": 64}
DRAFT_HEADS = {"queries": 16, "keys": 1, "d": 128, "v": 128, "rotated": 64}


def small_kernels() -> dict[str, tuple]:
    """Name -> (kernel, constants, types that differ)."""
    from mxfp4 import fake_quant_triton
    from runtime_ref.kernels import dense, routing, sampling

    project = TILE | {"QUERIES": HEADS["queries"], "KEYS": HEADS["keys"], "D": HEADS["d"], "V": HEADS["v"],
                      "HALF": HEADS["rotated"] // 2, "NORM": True, "HEAD_NORM": False}
    product = TILE | {"V": 0, "NORM": False, "PICK": False, "RESIDUAL": False, "PARTS": 1, "KEEP": False}
    return {
        "project_kernel, norm, FP8": (dense.project_kernel, project, {"w": "u8"}),
        "project_kernel, norm, bf16": (dense.project_kernel, project, {}),
        "product_kernel, o_proj, residual": (dense.product_kernel, product | {"V": 128, "RESIDUAL": True}, {}),
        "product_kernel, norm, head": (dense.product_kernel, product | {"NORM": True, "PICK": True}, {"out": "fp32"}),
        "swiglu_kernel, norm, FP8": (dense.swiglu_kernel, TILE | {"NORM": True}, {"w": "u8"}),
        "route_kernel, norm, 384 experts": (routing.route_kernel, TILE | ROUTER | {"BN": 16, "BK": 32, "NORM": True,
                                                                                   "SOFTMAX": False}, {"w": "fp32"}),
        "verify_kernel": (sampling.verify_kernel, {"CHUNKS": 75, "WIDE": 128, "BLOCK": 2048}, {}),
        "fake_quantize_kernel, bf16, floor": (fake_quant_triton.fake_quantize_kernel, {"SATURATES": True, "BLOCKS": 64},
                                              {"w": "bf16"}),
        "norm_kernel": (dense.norm_kernel, {"BK": 128, "FLOAT_DOT": False}, {"out": "fp32"}),
        "add_kernel, 8 parts": (dense.add_kernel, {"PARTS": 8, "BLOCK": 1024, "FLOAT_DOT": False}, {})}


def _kind(prefix: str, heads: dict, window: int | None, columns: int, sink: bool, draft: bool = False) -> dict:
    """Of one geometry of attention in a megakernel."""
    own = attention_constants(heads["keys"], heads["queries"] // heads["keys"], 8, heads["d"], heads["v"], window, sink,
                              draft=draft)
    kept = {name: own[name] for name in ("SPLIT", "M", "D", "D_HEAD", "D_TAIL", "V", "V_WIDE", "WINDOW")}
    kept |= {"QUERIES": heads["queries"], "KEYS": heads["keys"], "HALF": heads["rotated"] // 2, "SINK": sink, "BN": columns}
    return {f"{prefix}_{name}": value for name, value in kept.items()}


def _megakernel(experts: dict) -> dict:
    """Of any megakernel."""
    return {"PAGE_": PAGE, "CHUNK": CHUNK_PAGES, "ROUTE_BN": 16, "ROUTE_BK": 32, "COPY": 1024,
            "POLLS": experts["POLL_LIMIT"], "F_PARTS": 1, "W_PARTS": 1, "D_PARTS": 1} | ROUTER | TILE | {
                name: experts[name] for name in ("M", "UP", "DOWN", "TILES", "K_DOWN", "PARTS", "UP_ROWS", "UP_DEPTH",
                                                 "DOWN_ROWS", "DOWN_DEPTH", "EVEN", "STAGES", "PREFETCH", "PTX", "PACKED",
                                                 "AHEAD")} | {"FLAG": False}


def step_constants(experts: dict, ranks: int, tuning: Tuning | None = None) -> dict:
    """Of the megakernel; `experts`: compile-time arguments of the expert kernel, static order."""
    found = {"FULL": True, "WINDOW": True, "DENSE": True, "MOE": True, "DRAFT": False, "HEAD_NORM": False, "QKV_FP8": True,
             "O_FP8": False, "MLP_FP8": True, "HAS_TARGET_HIDDEN": True, "RANKS": ranks} | _megakernel(experts)
    if tuning is not None:
        found |= {"FLAG": tuning.release_flag, "AHEAD": tuning.ahead, "PACKED": tuning.packed}
    return found | _kind("F", HEADS, None, TILE["BN"], False) | _kind("W", HEADS, 128, TILE["BN"], True)


def draft_constants(experts: dict, ranks: int) -> dict:
    """Of the persistent round of the drafter's share of one of eight ranks."""
    found = {"FULL": True, "WINDOW": False, "DENSE": True, "MOE": False, "DRAFT": True, "HEAD_NORM": True, "QKV_FP8": False,
             "O_FP8": False, "MLP_FP8": False, "HAS_TARGET_HIDDEN": False, "RANKS": ranks} | _megakernel(experts)
    return found | _kind("F", DRAFT_HEADS, 1024, DRAFT_HEADS["d"], True, True) | _kind("W", DRAFT_HEADS, 1024, 128, True)
