"""The ops of a step: pure functions with one reference meaning each, row-invariant on a CPU.

Row-invariant: what an op computes for a row (a token) has the same bits alone, in any position and beside any other rows. Then
tokens decoded with a drafter equal those decoded without, and a batch equals its members. What it takes:

- every matrix product is a batch of products of fixed shape [n rows, K] x [K, N], rows padded to a multiple of 8: a CPU's
  library then gives a row the same bits wherever it stands. What holds beyond 8 rows, or for steps of at most 4, depends
  on the library (MKL: any number from 4 on gives the same bits; 1, 2 and 3 do not), so `row_rules` measures it on the
  machine at hand with the shapes that will run, and only what gave the bits of 8 rows is used;
- the number of parts of a matrix (`tensor_parallel.shares`) never depends on the number of ranks; parts are added in order;
- attention reduces each page of keys by itself and adds the pages in the order of their positions: hidden or missing pages
  add exact zeros, so the length of a table and the place of a window in its ring do not matter;
- experts are added in ascending order; a row that did not choose an expert is given weight zero or not computed at all.

Numbers: the residual stream, keys and values are rounded to the engine's dtype (bf16 or fp32) wherever they are written,
everything inside an op is float32, weights are the exact values of the file. Logits are float32, so bf16 makes no ties
among them. Tensors are float32 also where they hold bf16 values: a CPU would only convert them back and forth.

Shape legend: R rows (tokens, padded), B blocks of T (4 or 8) consecutive rows of one sequence each, Q and K own query and
key heads, G = Q / K, D and V widths, n pages, P parts, H hidden size, E experts, A experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from runtime_ref.backends.torch.rotary import Rotary
from runtime_ref.backends.torch.row_rules import NARROW, ROWS, STRICT, VECTOR, RowRules, in_order, padded, product, rounded
from runtime_ref.checkpoints.host_weights import Attention, Dense, Experts, Moe
from runtime_ref.core.batch import SequenceChunk, lay_out
from runtime_ref.core.kv_cache import PAGE, Pool
from runtime_ref.core.tensor_parallel import Ranks


@dataclass
class AttentionMetadata:
    """What the blocks of a step see of one kind of cache.

    tables [B * n] page ids; hidden [B, n, T, PAGE] is 0 or minus infinity; slots [real rows] is where rows are written.
    """

    blocks: int
    tables: torch.Tensor
    hidden: torch.Tensor
    slots: torch.Tensor


@dataclass
class Step:
    """Everything about the rows of one step that no layer changes."""

    ids: torch.Tensor  # [R]
    positions: torch.Tensor  # [R]
    real: int
    highest: int
    head_rows: torch.Tensor | None  # rows whose logits are wanted, padded; None = all
    wanted: int  # how many of them are real
    block: int  # rows of a block, T
    block_rows: torch.Tensor | None  # [B * T] rows of the blocks; None: rows are one block as they are
    row_slots: torch.Tensor | None  # [R] where a row stands among the blocks' rows
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    attention: dict[str, AttentionMetadata] = field(default_factory=dict)
    rotary: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def plan_rows(chunks: list[SequenceChunk], rules: RowRules = STRICT) -> tuple[Step, list[tuple[SequenceChunk, int, int]]]:
    """Rows of the chunks side by side, and the blocks (chunk, first position, count) they make."""
    ids, positions, head = lay_out(chunks)
    blocks, block_rows = [], []
    T = NARROW if rules.quantum == NARROW and max(len(chunk.tokens) for chunk in chunks) <= NARROW else ROWS
    for chunk in chunks:
        for begin in range(0, len(chunk.tokens), T):
            count = min(T, len(chunk.tokens) - begin)
            blocks.append((chunk, chunk.start + begin, count))
            block_rows += [chunk.row + begin + min(i, count - 1) for i in range(T)]
    real = len(ids)
    R = T if len(blocks) == 1 else padded(real, rules)
    highest = max(positions)
    ids += [ids[-1]] * (R - real)
    positions += [positions[-1]] * (R - real)
    wanted = len(head)
    whole = head == list(range(real))
    if not whole:
        head += [head[-1] if head else 0] * (padded(max(1, wanted), rules) - wanted)
    row_slots = None
    if len(blocks) > 1:
        slot_of = {row: slot for slot, row in reversed(list(enumerate(block_rows)))}
        row_slots = torch.tensor([slot_of.get(row, 0) for row in range(R)])
    step = Step(torch.tensor(ids), torch.tensor(positions), real, highest, None if whole else torch.tensor(head), wanted, T,
                torch.tensor(block_rows) if len(blocks) > 1 else None, row_slots,
                [start for _, start, _ in blocks], [count for _, _, count in blocks])
    return step, blocks


def attention_metadata(pool: Pool, kind: str, blocks: list[tuple[SequenceChunk, int, int]], T: int) -> AttentionMetadata:
    """Pages and mask of a target's kind for the blocks of `plan_rows`."""
    first = [pool.first_needed(start) for _, start, _ in blocks]
    last = [(start + count - 1) // PAGE for _, start, count in blocks]
    n = max(b - a for a, b in zip(first, last, strict=True)) + 1
    tables, slots = [], []
    for (chunk, start, count), low, high in zip(blocks, first, last, strict=True):
        table = chunk.tables[kind]
        held = table.pages[low - table.first:high + 1 - table.first]
        tables += held + [0] * (n - len(held))
        slots += [table.slot(p) for p in range(start, start + count)]
    queries = torch.tensor([[start + min(i, count - 1) for i in range(T)] for _, start, count in blocks])[:, None, :, None]
    keys = torch.tensor(first)[:, None] * PAGE + torch.arange(n * PAGE)
    keys = keys.view(len(blocks), n, 1, PAGE)
    seen = keys <= queries if pool.window is None else (keys <= queries) & (keys > queries - pool.window)
    hidden = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    return AttentionMetadata(len(blocks), torch.tensor(tables), hidden, torch.tensor(slots))


def embed(table: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Residual stream [R, H] of token ids."""
    return rounded(table.index_select(0, ids), dtype)


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMS norm over the last dimension, float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.mul_(length).mul_(1.0 / x.shape[-1]).add_(epsilon).rsqrt_()
    return (x * scale).mul_(weight)


def spread(x: torch.Tensor, w: torch.Tensor, rules: RowRules = STRICT) -> torch.Tensor:
    """Column-parallel product: x [R, K] with every part of w [P, K, N] -> [P, R, N]."""
    return product(x.expand(w.shape[0], *x.shape), w, rules)


def project_qkv(x: torch.Tensor, a: Attention, rotary: Rotary, table,
                epsilon: float = 0.0, rules: RowRules = STRICT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated, scaled queries [Q, R, D], rotated keys [K, R, D], scaled values [K, R, V]."""
    qk, v = spread(x, a.qk, rules), spread(x, a.v, rules)
    if a.qk_bias is not None:
        qk, v = qk.add_(a.qk_bias), v.add_(a.v_bias)
    if a.q_norm is not None:
        qk = torch.cat((norm(qk[:a.query_heads], a.q_norm, epsilon), norm(qk[a.query_heads:], a.k_norm, epsilon)))
    qk = rotary.apply(qk, table)
    q, k = qk[:a.query_heads] * a.qk_dim**-0.5, qk[a.query_heads:]
    return q, k, v if a.value_scale is None else v.mul_(a.value_scale)


def write_cache(pool: Pool, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """Stores the first len(slots) rows, rounded to the cache's dtype."""
    n = slots.shape[0]
    pool.keys[layer].index_copy_(1, slots, rounded(k[:, :n], pool.dtype))
    pool.values[layer].index_copy_(1, slots, rounded(v[:, :n], pool.dtype))


def attend(q: torch.Tensor, pool: Pool, layer: int, seen: AttentionMetadata, sink: torch.Tensor | None, step: Step,
           rules: RowRules = STRICT) -> torch.Tensor:
    """Heads [Q, R, V] of queries [Q, R, D] over the cache (which holds the rows' own keys already)."""
    K, B, T = pool.keys[layer].shape[0], seen.blocks, step.block
    Q, D = q.shape[0], q.shape[2]
    if step.block_rows is not None:
        q = q.index_select(1, step.block_rows)
    q = q.view(K, Q // K, B, T, D).transpose(1, 2).reshape(K, B, 1, Q // K * T, D)
    keys, values = (_pages(store[layer], seen.tables) for store in (pool.keys, pool.values))
    out = attend_pages(q, keys, values, seen.hidden, sink, rules)
    out = out.view(K, B, Q // K, T, -1).transpose(1, 2).reshape(Q, B * T, -1)
    return out if step.row_slots is None else out.index_select(1, step.row_slots)


def _pages(store: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """[K, pages, PAGE, width]."""
    K, _, width = store.shape
    return store.view(K, -1, PAGE, width).index_select(1, tables)


def attend_pages(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor,
                 sink: torch.Tensor | None, rules: RowRules = STRICT) -> torch.Tensor:
    """Softmax over pages with an optional sink per head.

    Args:
        q: [K, B, 1, G * T, D], scaled. keys, values: [K, B * n, PAGE, .]. hidden: [B, n, T, PAGE]. sink: [K * G].

    Returns:
        [K, B, G * T, V].
    """
    K, B, _, M, D = q.shape
    n, T = hidden.shape[1:3]
    scores = product(q.expand(K, B, n, M, D).reshape(-1, M, D), keys.flatten(0, 1).transpose(1, 2), rules)
    scores = scores.view(K, B, n, M // T, T, PAGE)
    scores += hidden[None, :, :, None]
    scores = scores.view(K, B, n, M, PAGE)
    top = scores.amax((2, 4), keepdim=True)
    if sink is not None:
        sink = sink.view(K, 1, 1, -1, 1).repeat_interleave(T, 3)
        top = torch.maximum(top, sink)
    weights = scores.sub_(top).exp_()
    sums = weights.sum(-1, keepdim=True)
    parts = product(weights.view(-1, M, PAGE), values.flatten(0, 1), rules).view(K, B, n, M, -1)
    total, below = in_order(parts, 2, rules), in_order(sums, 2, rules)
    if sink is not None:
        share = (sink - top)[:, :, 0].reshape(-1, 1)
        below = below + (share if K * M % VECTOR == 0 else share.repeat(1, VECTOR)).exp_()[:, :1].view(below.shape)
    return total / below


def merge_heads(heads: torch.Tensor, o: torch.Tensor, bias: torch.Tensor | None = None,
                rules: RowRules = STRICT) -> torch.Tensor:
    """Partial outputs [P, R, H] of heads [Q, R, V] through own parts of the output projection [P, Q V / P, H].

    A bias belongs to the first part of all, so that any number of ranks adds it in the same place.
    """
    P, (Q, R, V) = o.shape[0], heads.shape
    if Q != P:
        heads = heads.view(P, Q // P, R, V).transpose(1, 2).reshape(P, R, -1)
    out = product(heads, o, rules)
    if bias is not None:
        out[0] += bias
    return out


def add_parts(x: torch.Tensor, partial: torch.Tensor, ranks: Ranks, dtype: torch.dtype,
              rules: RowRules = STRICT) -> torch.Tensor:
    """Residual stream plus the parts of all ranks, added in their order: the one all-reduce of the model."""
    return rounded(x + in_order(ranks.gather(partial), 0, rules), dtype)


def gated(gate_up: torch.Tensor, clamp: tuple[float, float] | None = None) -> torch.Tensor:
    """silu(gate) * up of [..., 2 I], without any clamp; with `clamp` (limit, alpha) gpt-oss's form instead.

    That is gate sigmoid(alpha gate) (up + 1), of gate up to the limit and up within plus and minus the limit.
    """
    half = gate_up.shape[-1] // 2
    if clamp is not None:
        limit, alpha = clamp
        gate, up = gate_up[..., :half].clamp(max=limit), gate_up[..., half:].clamp(-limit, limit)
        return (gate * alpha).sigmoid_().mul_(gate).mul_(up.add_(1))
    return F.silu(gate_up[..., :half]).mul_(gate_up[..., half:])


def dense_mlp(x: torch.Tensor, w: Dense, rules: RowRules = STRICT) -> torch.Tensor:
    """Partial outputs [P, R, H]."""
    return product(gated(spread(x, w.gate_up, rules)), w.down, rules)


def whole_vectors(x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    """x [R, n], with columns of `value` behind it where needed: libraries compute the exponential of an incomplete vector's
    elements by other code, so the bits of a row would depend on where it stands."""
    return x if x.shape[1] * NARROW % VECTOR == 0 else F.pad(x, (0, -x.shape[1] % VECTOR), value=value)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension of [R, n], summed in order."""
    powers = whole_vectors(x, float("-inf"))
    powers = (powers - powers.amax(-1, keepdim=True)).exp_()
    return (powers / powers.cumsum(-1)[:, -1:])[:, :x.shape[1]]


def route(x: torch.Tensor, w: Moe, config, rules: RowRules = STRICT) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert indices [R, A] and weights [R, A] float32.

    Sigmoid scores: the best by score + correction, weighted by score. Softmax: the best of all experts' probabilities, or the
    probabilities among the chosen.
    """
    scores = spread(x, w.router, rules)[0]
    if w.bias is not None:
        scores = scores + w.bias
    if w.scores != "sigmoid":
        values, index = scores.topk(config.num_experts_per_tok, dim=-1)
        # Probabilities that are normalized among the chosen are a softmax of the chosen.
        among = w.scores == "softmax of the chosen" or config.norm_topk_prob
        return index, softmax(values) if among else softmax(scores).gather(1, index)
    scores = whole_vectors(scores).sigmoid_()[:, :scores.shape[1]]
    choice = scores + w.correction
    if config.n_group > 1:
        grouped = choice.view(-1, config.n_group, config.n_routed_experts // config.n_group)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
    index = choice.topk(config.num_experts_per_tok, dim=-1).indices
    weight = scores.gather(1, index)
    if config.norm_topk_prob:
        total = weight[:, 0]
        for i in range(1, weight.shape[1]):
            total = total + weight[:, i]
        weight = weight / (total[:, None] + 1e-20)
    factor = config.routed_scaling_factor
    return index, weight if factor in (None, 1.0) else weight * factor


def run_experts(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, experts: Experts, real: int,
                rules: RowRules = STRICT) -> torch.Tensor:
    """Partial outputs [P, R, H] of the chosen experts, weighted, added in ascending order of experts.

    Up to eight rows meet every touched expert together, those that did not choose it with weight zero; more rows are
    gathered by expert. Both give a row the same bits.
    """
    if x.shape[0] <= ROWS:
        return _experts_together(x, index, weight, experts, real)
    R, H = x.shape
    chosen = index[:real].tolist()
    rows_of: dict[int, list[tuple[int, int]]] = {}
    for row, picks in enumerate(chosen):
        for place, expert in enumerate(picks):
            rows_of.setdefault(expert, []).append((row, place))
    out = x.new_zeros(experts.parts, R, H)
    for expert in sorted(rows_of):
        gate_up, down = experts.decoded(expert)
        places = rows_of[expert]
        rows = torch.tensor([row for row, _ in places])
        scale = weight[rows, torch.tensor([place for _, place in places])]
        count = len(places)
        mine = x.new_zeros(padded(count, rules), H)
        mine[:count] = x.index_select(0, rows)
        inner = spread(mine, gate_up, rules)
        if experts.biases is not None:
            inner += experts.biases.gate_up[expert]
        inner = gated(inner, experts.clamp)
        inner[:, :count] *= scale[:, None]
        found = product(inner, down, rules)[:, :count]
        if experts.biases is not None and experts.biases.down is not None:
            found[0] += scale[:, None] * experts.biases.down[expert]
        out.index_add_(1, rows, found)
    return out


def _experts_together(x, index, weight, experts: Experts, real: int) -> torch.Tensor:
    touched = sorted({e for picks in index[:real].tolist() for e in picks})
    decoded = [experts.decoded(e) for e in touched]
    parts, width = experts.parts, decoded[0][0].shape[2]
    gate_up = x.new_empty(len(touched), parts, x.shape[0], width)
    rows = x.expand(parts, *x.shape)
    for i, (w, _) in enumerate(decoded):
        torch.bmm(rows, w, out=gate_up[i])
    dense = x.new_zeros(x.shape[0], experts.count).scatter_(1, index, weight)
    biases = experts.biases
    if biases is not None:
        gate_up += biases.gate_up[touched]
    inner, scale = gated(gate_up, experts.clamp), dense[:, touched].T[:, None, :, None]
    inner *= scale
    out = None
    for i, expert in enumerate(touched):
        found = torch.bmm(inner[i], decoded[i][1])
        if biases is not None and biases.down is not None:
            found[0] += scale[i, 0] * biases.down[expert]
        out = found if out is None else out.add_(found)
    return out


def head_logits(x: torch.Tensor, head: torch.Tensor, ranks: Ranks, rules: RowRules = STRICT) -> torch.Tensor:
    """float32 logits [R, vocabulary] of normed rows: each rank multiplies its share of the vocabulary."""
    parts = ranks.gather(spread(x, head, rules))
    return parts.transpose(0, 1).reshape(x.shape[0], -1)
