"""Plain and speculative decoding with a transformers target: short, slow to misread, and exact.

What training needs of it: batched answers (`generate`), and the reference loop (`speculate`) against which the predicted
acceptance is checked. The runtime has its own engine; this one is the simple truth.

The cache is preallocated (a growing cache copies itself at every token) and can be shortened, which is how rejected
drafts are forgotten. Window layers keep everything here and mask what they may not see: a cache that had dropped old
positions could not take rejected ones back.

One speculative round: draft B - 1 tokens after the anchor, run the target once over [anchor, drafts], keep the accepted
prefix and one token of the target's own (the next anchor). `lengths` counts tokens per round, the bonus token included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, DynamicLayer

from dflash_train.target import Target
from modeling.drafter import DFlashDraftModel


class _Slots(DynamicLayer):
    """Keys and values [B, K, capacity, .], filled up to `length`."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.slots = [t.new_empty(*t.shape[:2], self.capacity, t.shape[3]) for t in (key_states, value_states)]
        end = self.length + key_states.shape[2]
        for slots, new in zip(self.slots, (key_states, value_states), strict=True):
            slots[:, :, self.length:end] = new
        self.crop(end)
        return self.keys, self.values

    def crop(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (s[:, :, :length] for s in self.slots)

    def get_seq_length(self) -> int:
        return self.length

    def select(self, rows: torch.Tensor) -> None:
        self.slots = [s[rows] for s in self.slots]
        self.crop(self.length)


class SlotCache(Cache):
    """A cache of `layers` layers with room for `capacity` positions."""

    def __init__(self, layers: int, capacity: int):
        super().__init__(layers=[_Slots(capacity) for _ in range(layers)])

    def crop(self, length: int) -> None:
        """Forgets everything from position `length` on."""
        for layer in self.layers:
            layer.crop(length)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the sequences `rows` (int64 indices)."""
        for layer in self.layers:
            layer.select(rows)


def probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """float32 [..., V]: softmax at `temperature`; at 0 all mass on the (first) largest logit."""
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return (logits.float() / temperature).softmax(-1)


def pick(logits_BV: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """Tokens [B]: arg-max at temperature 0, else sampled."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    return torch.multinomial(probabilities(logits_BV, temperature), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(target: Target, prompts: list[list[int]], *, max_new_tokens: int | list[int], temperature: float,
             generator: torch.Generator | None = None) -> list[list[int]]:
    """Answers of all prompts side by side; each ends with an end token or has `max_new_tokens` tokens (of its own, if a list).

    Prompts are padded on the left. Sequences that have ended leave the batch once half of it has.
    """
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
    device, pad = target.device, target.end_ids[0]
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = SlotCache(len(target.base.layers), longest + max(limits))
    answers: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts))  # prompt of each row
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for _ in range(max(limits)):
        _, last = target.run(ids, cache=cache, attention_mask=mask, position_ids=positions)
        tokens = pick(target.head(last[:, -1]), temperature, generator)
        open_rows = []
        for row, (index, token) in enumerate(zip(alive.tolist(), tokens.tolist(), strict=True)):
            answer = answers[index]
            if answer and (answer[-1] in target.end_ids or len(answer) == limits[index]):
                continue
            answer.append(token)
            if token not in target.end_ids and len(answer) < limits[index]:
                open_rows.append(row)
        if not open_rows:
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        if len(open_rows) <= len(alive) // 2:
            rows = torch.tensor(open_rows, device=device)
            cache.select(rows)
            ids, positions, mask, alive = ids[rows], positions[rows], mask[rows], alive[rows.cpu()]
    return answers


class DraftContext:
    """Keys and values of the drafter's context, per layer: only what its window can still see."""

    def __init__(self, drafter: DFlashDraftModel):
        self.drafter = drafter
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.positions = torch.zeros(1, 0, dtype=torch.long)

    def append(self, target_hidden: torch.Tensor, start: int) -> None:
        """Features [1, S, n * H] of the positions start, start + 1, ..."""
        positions = torch.arange(start, start + target_hidden.shape[1], device=target_hidden.device)[None]
        new = self.drafter.context_keys_values(self.drafter.fuse(target_hidden), positions)
        keep = None if self.drafter.window is None else -(self.drafter.window - 1)
        old = self.pairs or [(k[:, :, :0], v[:, :, :0]) for k, v in new]
        self.pairs = [tuple(torch.cat(both, dim=2)[:, :, keep:] for both in zip(was, now, strict=True))
                      for was, now in zip(old, new, strict=True)]
        self.positions = torch.cat((self.positions.to(positions.device), positions), dim=1)[:, keep:]


@torch.no_grad()
def draft(drafter: DFlashDraftModel, target: Target, context: DraftContext, anchor: int, position: int, *, temperature: float,
          generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B - 1] drafted after `anchor` at `position`, and the distributions [B - 1, V] they were drawn from."""
    embeds = drafter.embed_block(torch.tensor([anchor], device=target.device), target.embed_tokens)
    positions = torch.arange(position, position + drafter.block_size, device=target.device)[None]
    hidden = drafter.block_hidden(embeds, positions, context.pairs, context.positions)[0, 1:]
    logits = target.head(hidden.to(target.head.weight.dtype)).float()
    if drafter.markov_next is None:
        return pick(logits, temperature, generator), probabilities(logits, temperature)
    if temperature == 0 and drafter.selector_top_k:
        path = best_path(drafter, logits[None], torch.tensor([anchor], device=target.device))[0]
        return path, torch.nn.functional.one_hot(path, logits.shape[-1]).float()
    tokens, spread, previous = [], [], torch.tensor(anchor, device=target.device)
    for row in logits:
        row = row + drafter.markov_bias(previous).float()
        previous = pick(row[None], temperature, generator)[0]
        tokens.append(previous)
        spread.append(probabilities(row, temperature))
    return torch.stack(tokens), torch.stack(spread)


def best_path(drafter: DFlashDraftModel, logits_NTV: torch.Tensor, anchors_N: torch.Tensor) -> torch.Tensor:
    """The most probable path through the `selector_top_k` best candidates of each position (Viterbi), tokens [N, T]."""
    scores, candidates = logits_NTV.topk(drafter.selector_top_k, dim=-1)
    previous = anchors_N[:, None]
    total, back = logits_NTV.new_zeros(len(logits_NTV), 1), []
    for t in range(logits_NTV.shape[1]):
        bias = drafter.markov_bias(previous).float()  # [N, candidates before, vocabulary]
        normal = (logits_NTV[:, t, None] + bias).logsumexp(-1)
        options = candidates[:, t]
        steps = bias.gather(-1, options[:, None].expand(-1, bias.shape[1], -1)) - normal[..., None]
        total, best = (total[..., None] + steps + scores[:, t, None]).max(1)
        back.append(best)
        previous = options
    index, tokens = total.argmax(-1, keepdim=True), []
    for t in range(logits_NTV.shape[1] - 1, -1, -1):
        tokens.append(candidates[:, t].gather(1, index)[:, 0])
        index = back[t].gather(1, index)
    return torch.stack(tokens[::-1], dim=1)


def verify(drafts: torch.Tensor, q: torch.Tensor, p: torch.Tensor, generator: torch.Generator | None) -> tuple[int, int]:
    """(accepted drafts n, next token): rejection sampling, which at temperature 0 is equality with the arg-max.

    Args:
        drafts: [n]; q: their distributions [n, V]; p: the target's distributions [n + 1, V].

    Source: Leviathan et al., arXiv 2211.17192: accept x with min(1, p(x) / q(x)), else draw from max(p - q, 0).
    """
    for i, token in enumerate(drafts.tolist()):
        ratio = float(p[i, token] / q[i, token])
        if ratio < 1 and float(torch.rand((), generator=generator, device=p.device)) >= ratio:
            rest = (p[i] - q[i]).clamp_min(0)
            rest = rest if float(rest.sum()) > 0 else p[i]
            return i, int(torch.multinomial(rest, 1, generator=generator))
    return len(drafts), int(torch.multinomial(p[-1], 1, generator=generator))


@dataclass
class Decoded:
    """Generated tokens, and how many each round of the drafter added (the first token comes from the prompt's pass)."""

    tokens: list[int]
    lengths: list[int] = field(default_factory=list)


@torch.no_grad()
def plain(target: Target, prompt: list[int], *, max_new_tokens: int, temperature: float,
          generator: torch.Generator | None = None) -> Decoded:
    """One token per pass of the target."""
    cache = SlotCache(len(target.base.layers), len(prompt) + max_new_tokens)
    ids, tokens = torch.tensor([prompt], device=target.device), []
    while True:
        _, last = target.run(ids, cache=cache)
        tokens.append(int(pick(target.head(last[:, -1]), temperature, generator)))
        if tokens[-1] in target.end_ids or len(tokens) == max_new_tokens:
            return Decoded(tokens)
        ids = torch.tensor([tokens[-1:]], device=target.device)


@torch.no_grad()
def speculate(target: Target, drafter: DFlashDraftModel, prompt: list[int], *, max_new_tokens: int, temperature: float,
              generator: torch.Generator | None = None) -> Decoded:
    """Draft and verify; in exact arithmetic the same tokens (T = 0) or the same distribution (T > 0) as `plain`."""
    device = target.device
    cache = SlotCache(len(target.base.layers), len(prompt) + max_new_tokens + drafter.block_size)
    context = DraftContext(drafter)
    target_hidden, last = target.run(torch.tensor([prompt], device=device), cache=cache)
    context.append(target_hidden, 0)
    out = Decoded([int(pick(target.head(last[:, -1]), temperature, generator))])
    position = len(prompt)  # of the anchor, which is the newest token
    while out.tokens[-1] not in target.end_ids and len(out.tokens) < max_new_tokens:
        drafts, q = draft(drafter, target, context, out.tokens[-1], position, temperature=temperature, generator=generator)
        ids = torch.cat((torch.tensor(out.tokens[-1:], device=device), drafts))[None]
        target_hidden, last = target.run(ids, cache=cache)
        p = probabilities(target.head(last[0]), temperature)
        accepted, token = verify(drafts, q, p, generator)
        new = [*drafts[:accepted].tolist(), token][:max_new_tokens - len(out.tokens)]
        ended = next((i for i, t in enumerate(new) if t in target.end_ids), len(new) - 1)
        out.tokens += new[:ended + 1]
        out.lengths.append(ended + 1)
        context.append(target_hidden[:, :accepted + 1], position)
        cache.crop(position + accepted + 1)
        position += accepted + 1
    return out


def in_batches(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start:start + size]


def in_token_batches(order: list[int], lengths: list[int], size: int, tokens: int) -> Iterator[list[int]]:
    """Runs of `order` (indices, short to long) of at most `size` items and, when padded to their longest, `tokens` tokens.

    An item longer than that comes alone.
    """
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or (len(batch) + 1) * lengths[i] > tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def by_length(items: list, key: Callable) -> list[int]:
    """Indices of `items` from short to long, so that batches need little padding."""
    return sorted(range(len(items)), key=lambda i: key(items[i]))
