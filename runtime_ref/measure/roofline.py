"""The limit model of a decode step: how many bytes must move, and what that allows at best, from a geometry alone.

A step of T tokens (one verification block) reads every weight that it touches once; at these sizes arithmetic is never
the limit (0.65 TFLOP for 8 tokens of MiMo-V2.5-Pro, 0.1 ms on eight GPUs). So

    step time = (weights read by target and drafter) / (GPUs x fraction x bandwidth)
              + all-reduces x time of one + barriers x time of one
    tokens/s  = acceptance length / step time

Routed experts are what differs between 1 and 8 tokens: with independent routing T tokens touch
D(T) = N (1 - (1 - k / N)^T) of N experts. Real text touches fewer, since neighbouring tokens share experts;
`distinct_share` scales D, and a runtime that counts D replaces the guess.

The unit of every size is the byte, of every time the second. These are bounds and projections, not measurements; whoever
prints them says so. Rejected: counting key/value reads (0.5 GB at 8k tokens of context against 110 GB of weights).
"""

from __future__ import annotations

from dataclasses import dataclass

MXFP4_BYTES = 4.25 / 8

# Bytes per second, as the vendors state them.
BANDWIDTH = {"H200": 4.8e12, "B200": 8.0e12, "MI355X": 8.0e12}
# Streaming multiprocessors and the clock (Hz) at which they are assumed to run.
MULTIPROCESSORS = {"H200": (132, 1.98e9), "B200": (148, 1.85e9)}
LANES_PER_CLOCK = 128
# Share of the bandwidth that an expert kernel is to reach at a verification block: the goal, and beyond it.
GOALS = {"goal": 0.7, "moonshot": 0.8}
# What others have published, on 2026-11-30: (what, figure, source). Not measured here, and not on the same model.
PUBLISHED = (
    ("one user, MiMo-V2.5-Pro with its drafter, TileRT (kernels closed), 8 GPUs", "1,000 tokens/s, 1,200 at best",
     "tile-ai/TileRT, README, 2026-06-08"),
    ("one user, the same model on an open engine, 8 x RTX PRO 6000", "157 tokens/s", "local-inference-lab/vllm#85"),
    ("one user, DeepSeek-V4-Flash with FP4 experts, SGLang 0.5.16, 4 x H200", "1.72 ms per token, 581 tokens/s",
     "sgl-project/sglang#33109"),
    ("one user, Qwen3.5-397B-A17B NVFP4, TokenSpeed, 8 x B200", "580 tokens/s at best", "pytorch.org/blog, 2026-05-27"),
    ("experts of a layer, NVFP4, FlashInfer, B300, 135 MB", "45 % of the bandwidth at 8 tokens, 48 % at 13",
     "flashinfer-ai/flashinfer#5036"),
    ("experts of a layer, INT4, Marlin, 4096 x 14336, 8 tokens", "63 % of an H200's", "FlagOpen/FlagGems#4350"),
    ("experts of a layer, bf16, TileOPs, H200", "82 % of the bandwidth", "tile-ai/TileOPs#2127"))

# The drafter as published for MiMo-V2.5-Pro; other targets get one of the same depth at their own width.
DRAFT_LAYERS, DRAFT_FEATURES, DRAFT_HEAD_DIM, DRAFT_KEY_HEADS = 5, 5, 128, 8


def distinct_experts(experts: int, chosen: int, tokens: int) -> float:
    """Expected number of experts touched by `tokens` tokens that choose `chosen` of `experts` independently."""
    return experts * (1 - (1 - chosen / experts) ** tokens)


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one step reads: routed experts, the rest of the target, the drafter with its pass through the head."""

    distinct: float
    experts: float
    fixed: float
    drafter: float

    @property
    def total(self) -> float:
        return self.experts + self.fixed + self.drafter


def expert_bytes(config: dict) -> float:
    """MXFP4 bytes of one routed expert (gate, up and down)."""
    return 3 * config["hidden_size"] * config["moe_intermediate_size"] * MXFP4_BYTES


def fixed_bytes(config: dict) -> float:
    """Bytes of everything else that each step reads: qkv and the dense FFN in FP8, the other projections in bf16."""
    hidden, total = config["hidden_size"], 2 * config["vocab_size"] * config["hidden_size"]
    for window, moe in zip(config["hybrid_layer_pattern"], config["moe_layer_freq"], strict=True):
        kind = "swa_" if window else ""
        heads, keys = config[f"{kind}num_attention_heads"], config[f"{kind}num_key_value_heads"]
        qk, v = config[f"{kind}head_dim"], config[f"{kind}v_head_dim"]
        total += hidden * (heads * qk + keys * (qk + v)) + 2 * hidden * heads * v
        total += 2 * hidden * config["n_routed_experts"] if moe else 3 * hidden * config["intermediate_size"]
    return total


def drafter_bytes(config: dict) -> float:
    """bf16 bytes of a DFlash drafter of this width, and of the target's head, which it reads once more."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    layer = hidden * (2 * heads * DRAFT_HEAD_DIM + 2 * DRAFT_KEY_HEADS * DRAFT_HEAD_DIM + 3 * config["intermediate_size"])
    return 2 * (DRAFT_LAYERS * layer + DRAFT_FEATURES * hidden * hidden + config["vocab_size"] * hidden)


def step_bytes(config: dict, tokens: int, *, distinct_share: float = 1.0, drafter: bool = True) -> StepBytes:
    """What a step of `tokens` tokens reads.

    Args:
        config: keyword arguments of MiMoV2Config, e.g. from `modeling.published_geometries.released_config`.
        distinct_share: D as a share of the independent case.
        drafter: whether a drafter runs beside the target.
    """
    distinct = distinct_share * distinct_experts(config["n_routed_experts"], config["num_experts_per_tok"], tokens)
    return StepBytes(distinct, sum(config["moe_layer_freq"]) * distinct * expert_bytes(config), fixed_bytes(config),
                     drafter_bytes(config) if drafter else 0.0)


def step_seconds(read: StepBytes, *, gpus: int, bandwidth: float, fraction: float = 1.0, all_reduces: int = 0,
                 all_reduce_seconds: float = 0.0, barriers: int = 0, barrier_seconds: float = 0.0) -> float:
    """Time of a step whose bytes are spread evenly over `gpus` (bandwidth of one in bytes per second)."""
    return (read.total / (gpus * fraction * bandwidth) + all_reduces * all_reduce_seconds
            + barriers * barrier_seconds)


def all_reduces_per_step(config: dict) -> int:
    """Two per layer: after the attention's and after the feed-forward's last projection."""
    return 2 * len(config["moe_layer_freq"])


def experts_call(config: dict, tokens: int, ranks: int) -> tuple[float, float]:
    """(distinct experts, bytes read) of one MoE layer on one of `ranks` tensor-parallel GPUs."""
    distinct = distinct_experts(config["n_routed_experts"], config["num_experts_per_tok"], tokens)
    return distinct, distinct * expert_bytes(config) / ranks


def lane_instructions_per_weight(card: str, fraction: float = 1.0) -> float:
    """How many lane-instructions a kernel may issue per 4.25-bit weight before it, not memory, sets the pace."""
    processors, clock = MULTIPROCESSORS[card]
    weights_per_second = fraction * BANDWIDTH[card] / MXFP4_BYTES
    return LANES_PER_CLOCK * processors * clock / weights_per_second


def published() -> str:
    """Figures of others, to hold the limits against."""
    return "\n".join(["published by others, on other models and machines, not measured here:",
                      *(f"  {what}: {figure} ({source})" for what, figure, source in PUBLISHED)])


def report(name: str, config: dict, *, tokens: int, acceptance: float, gpus: int, distinct_share: float = 1.0) -> str:
    """The limit model of one target as text."""
    read = step_bytes(config, tokens, distinct_share=distinct_share)
    single = step_bytes(config, 1, drafter=False)
    reduces = all_reduces_per_step(config)
    lines = [f"{name}: limit model of a step of {tokens} tokens on {gpus} GPUs (projected, nothing here is measured)",
             f"  distinct experts {read.distinct:.1f} of {config['n_routed_experts']} per layer, "
             f"{expert_bytes(config) / 1e6:.2f} MB each",
             f"  bytes: experts {read.experts / 1e9:.1f} GB + rest {read.fixed / 1e9:.1f} GB + drafter and its head pass "
             f"{read.drafter / 1e9:.1f} GB = {read.total / 1e9:.1f} GB ({read.total / gpus / 1e9:.2f} GB per GPU)",
             f"  acceptance length {acceptance:g}; {reduces} all-reduces",
             "  tokens/s             GPU   100 %, none  100 %, 5 us   80 %, 5 us   70 %, 5 us   65 %, 5 us  80 %, 10 us  "
             "50 %, 10 us"]
    scenarios = ((1.0, 0.0), (1.0, 5e-6), (0.8, 5e-6), (0.7, 5e-6), (0.65, 5e-6), (0.8, 1e-5), (0.5, 1e-5))
    for card, bandwidth in BANDWIDTH.items():
        rates = [acceptance / step_seconds(read, gpus=gpus, bandwidth=bandwidth, fraction=fraction,
                                           all_reduces=reduces, all_reduce_seconds=seconds) for fraction, seconds in scenarios]
        lines.append(f"  {bandwidth / 1e12:.1f} TB/s {card:>15}" + "".join(f"{rate:13.0f}" for rate in rates))
    for card, bandwidth in BANDWIDTH.items():
        rate = 1 / step_seconds(single, gpus=gpus, bandwidth=bandwidth)
        lines.append(f"  without a drafter, {card}: {rate:.0f} tokens/s at most")
    distinct, layer = experts_call(config, tokens, gpus)
    lines.append(f"  one MoE layer on one of {gpus} ranks: {layer / 1e6:.0f} MB, " + ", ".join(
        f"{layer / bandwidth * 1e6:.1f} us on {card}" for card, bandwidth in BANDWIDTH.items())
        + "; on H200 " + ", ".join(f"{name} {share:.0%} {layer / share / BANDWIDTH['H200'] * 1e6:.1f} us"
                                   for name, share in GOALS.items()))
    lines.append("  lane-instructions per weight at full bandwidth: " + ", ".join(
        f"{lane_instructions_per_weight(card):.2f} on {card}" for card in MULTIPROCESSORS))
    return "\n".join(lines)
