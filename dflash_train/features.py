"""The target's features of packed rows: computed in the loop, or once to disk (`training.state_cache`).

The target always sees each dialogue alone, padded on the right, where a causal model cannot see it: its features are
those of serving, not of whatever stands next to it in a packed row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dflash_train.dialogues import Dialogue, PackedRows
from dflash_train.reference_decoding import by_length, in_token_batches
from dflash_train.target import Target
from training.state_cache import StateCache, is_written, write_states

KINDS = ("taps", "last")
FORWARD_TOKENS = 8_192  # of one forward pass: larger ones need more memory and, on a CPU, up to 1.7 times the time


def run_dialogues(target: Target, token_lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, T, n * H] and last hidden states [B, T, H] of dialogues, padded on the right to the longest."""
    longest, pad = max(map(len, token_lists)), target.end_ids[0]
    ids = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens in token_lists], device=target.device)
    return target.run(ids)


class OnlineFeatures:
    """Runs the target for every batch of rows."""

    def __init__(self, target: Target, dialogues: list[Dialogue], rows: PackedRows):
        self.target, self.dialogues, self.rows = target, dialogues, rows

    def of_rows(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, S, n * H] and last hidden states [B, S, H] of the packed rows `indices`; zeros where nothing is."""
        placed = [(b, *member) for b, r in enumerate(indices) for member in self.rows.members[r]]
        lengths, shape = [size for *_, size in placed], (len(indices), self.rows.tokens.shape[1])
        out: tuple[torch.Tensor, ...] = ()
        for batch in in_token_batches(by_length(lengths, int), lengths, len(lengths), FORWARD_TOKENS):
            chosen = [placed[i] for i in sorted(batch)]
            both = run_dialogues(self.target, [self.dialogues[i].tokens[:size] for _, i, _, size in chosen])
            out = out or tuple(t.new_zeros(*shape, t.shape[-1]) for t in both)
            for whole, part in zip(out, both, strict=True):
                for source, (b, _, begin, size) in enumerate(chosen):
                    whole[b, begin:begin + size] = part[source, :size]
        return out


class DiskFeatures:
    """Features written once, then read from disk."""

    def __init__(self, target: Target, rows: PackedRows, folder: Path, accelerator=None):
        self.rows, self.device, self.states = rows, target.device, StateCache(folder, accelerator)

    def of_rows(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `OnlineFeatures.of_rows`, in bf16."""
        length, out = self.rows.tokens.shape[1], []
        for kind in KINDS:
            values = torch.zeros(len(indices), length, self.states.widths[kind], dtype=torch.bfloat16)
            for b, r in enumerate(indices):
                for i, begin, size in self.rows.members[r]:
                    values[b, begin:begin + size] = self.states.read(kind, i)
            out.append(values.to(self.device))
        return tuple(out)


def cached_features(target: Target, dialogues: list[Dialogue], rows: PackedRows, folder: Path, *, limit_gib: float,
                    batch_size: int, beside: int = 0, accelerator=None,
                    say: Callable[[str], None] = print) -> DiskFeatures:
    """The cache in `folder`, written first if it is not there; all ranks call it. beside: as of `write_states`.

    Raises:
        ValueError: it would be larger than `limit_gib` GiB (before anything is written); a damaged cache.
        OSError: no room for it on the disk (before the target runs).
    """
    if not is_written(folder):
        lengths = [min(len(d.tokens), rows.tokens.shape[1]) for d in dialogues]

        def compute(items: list[int]) -> dict[str, list[torch.Tensor]]:
            found: dict[str, dict[int, torch.Tensor]] = {kind: {} for kind in KINDS}
            for batch in in_token_batches(items, lengths, batch_size, FORWARD_TOKENS):
                both = run_dialogues(target, [dialogues[i].tokens[:lengths[i]] for i in batch])
                for kind, states in zip(KINDS, both, strict=True):
                    found[kind] |= {i: states[b, :lengths[i]].to("cpu", torch.bfloat16) for b, i in enumerate(batch)}
            return {kind: [states[i] for i in items] for kind, states in found.items()}

        widths = {"taps": len(target.target_layers) * target.hidden_size, "last": target.hidden_size}
        write_states(folder, items=by_length(dialogues, lambda d: len(d.tokens)), lengths=lengths, widths=widths,
                     dtype=torch.bfloat16, compute=compute, key="dflash.features_gib", limit_gib=limit_gib,
                     accelerator=accelerator, rest=target.rest, say=say, beside=beside, label="features")
    return DiskFeatures(target, rows, folder, accelerator)
