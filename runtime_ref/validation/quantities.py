"""Names of what is measured, once: code asks for a number or a table by its name here, and the report shows the name.

A check records a number with `Check.measure(Number.X, value, limit)`; nothing anywhere looks a number up by a text of its own,
so a caption can be reworded in one place. `PROJECTED` are computed from a model of other hardware, not measured.
"""

from __future__ import annotations

from enum import StrEnum


class Number(StrEnum):
    """A number of a check; the value is its key in the JSON report and its label on the page."""

    FILES_COMPARED = "files compared with their checksums"
    FILES_DIFFERENT = "files that differ"
    TOKENIZER_SIZE = "tokens of the tokenizer"
    VOCABULARY_ROWS = "rows of the vocabulary"
    SCALE_BYTES = "scale bytes"
    BLOCKS = "blocks"
    TENSORS = "tensors"
    DRAFTER = "drafter"
    STORED_REFERENCE = "stored reference"
    ORIGINAL_TOKENS = "tokens compared with the original"
    REFERENCE_TOKENS = "tokens of the stored reference"
    FEATURE_ERROR = "worst feature error"
    DRAFT_HIDDEN_ERROR = "error of the drafter's hidden states"
    TARGET_LOGITS_ERROR = "error of the target's logits"
    LOGITS_ERROR = "logits error"
    DRAFT_LOGITS_ERROR = "draft logits error"
    DRAFT_ROUNDS = "draft rounds compared"
    TOKENS = "tokens"
    SERVED_KL = "KL of the served dtype"
    SERVED_SAME = "same arg-max"
    BACKENDS = "backends"
    RANKS = "ranks"
    ROW_BLOCKS = "row blocks"
    WORST_OP = "worst relative error of an op"
    PROMPTS = "prompts"
    PROMPT_TOKENS = "tokens of the prompts"
    ENTROPY = "entropy of the distribution (nats)"
    FLATTENED = "logits divided by"
    ROUNDS_COMPARED = "rounds compared draw by draw"
    DRAWS = "draws of each distribution"
    CHI_SQUARE = "worst chi-square z"
    ACCEPTANCE = "acceptance length"
    STEP_STORED = "bytes of a step, as stored"
    STEP_HELD = "bytes of a step, as this backend holds them"
    BANDWIDTH = "memory bandwidth of this machine (bytes/s)"
    STEP_BOUND = "memory bound of a step (ms)"
    STEP_8 = "measured step of 8 tokens (ms)"
    STEP_1 = "measured step of 1 token (ms)"
    BOUND_SHARE = "share of the bound"
    SPEED_DRAFTS = "tokens/s with drafts, one sequence"
    SPEED_PLAIN = "tokens/s without drafts, one sequence"
    PRICE_DRAFTS = "price per million tokens with drafts"
    PRICE_PLAIN = "price per million tokens without drafts"
    PROJECTED_STEP = "projected step (ms)"
    NODE_BANDWIDTH = "bytes/s of 8 x H200"
    PROJECTED_SPEED = "projected tokens/s of 8 x H200"
    PROJECTED_PRICE = "projected price per million tokens, one sequence on 8 x H200"
    FORMULA = "formula"
    LENGTH_USED = "acceptance length used"
    SURE_POSITIONS = "positions where the reference is sure"
    SURE_EQUAL = "of them equal"
    WORST_LOGPROB = "worst difference of a log-probability (nats)"
    REQUESTS = "requests"
    TOOL_CALLS = "valid tool calls"
    PERPLEXITY = "perplexity"
    PERPLEXITY_ORIGINAL = "perplexity of the original"
    KL_MEAN = "mean KL to the original (nats)"
    KL_90 = "90 % of the tokens have at most (nats)"
    KL_99 = "99 % of the tokens have at most (nats)"
    KL_MAX = "largest KL of a token (nats)"
    SAME_TOP = "same top-1 token"
    RMS_PROBABILITY = "RMS of probability differences"
    FLIPS = "answers that flip (right to wrong, wrong to right)"


class Table(StrEnum):
    """A table of a check; the value is its caption."""

    ACCEPTANCE = "acceptance length (1 to block size, bonus token included)"
    POSITIONS = "% of rounds that accept the draft at position 1, 2, ..."
    LAYERS = "relative error by layer"
    FEATURES = "features of the target: relative error by layer"
    OPS = "ops"
    LIKELIHOOD = "negative log-likelihood of the prompts"
    GREEDY = "greedy answers"
    SAMPLES = "sampling: both rules"
    EXPERTS = "distinct experts per layer for 8 tokens"
    ENDPOINT_GREEDY = "greedy tokens against the reference"
    TASKS = "tasks: original against FP4"
    TOOLS = "tool calls"


PROJECTED = frozenset({Number.PROJECTED_STEP, Number.PROJECTED_SPEED, Number.PROJECTED_PRICE})
