"""What is in a folder's expert tensors, whatever their layout: copied experts, experts without any code, scales that belong to
other codes.

Names, shapes, dtypes, finite values and the block invariant are the verifier's. That two experts are copies of each other it
does not ask: nothing that was trained has that, and exporters have written it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mxfp4.format import BLOCK_SIZE
from runtime_ref.validation.context import ValidationContext
from runtime_ref.validation.quantities import Number
from runtime_ref.validation.result import Check

COPIES_CAUSE = "experts of a layer are copies of each other: the exporter wrote one expert under several names"


@dataclass
class Matrix:
    """One packed expert matrix: codes [rows, K / 2] and scales [rows, K / 32] uint8, and the names that they have in the file.

    `group` is what its copies share: the layer and the kind of projection.
    """

    name: str
    scale_name: str
    group: tuple
    codes: torch.Tensor
    scales: torch.Tensor


def look_at_experts(check: Check, context: ValidationContext, matrices: Iterable[Matrix]) -> None:
    """One pass over all expert matrices."""
    low, high, blocks, odd = 255, 0, 0, 0
    seen: dict[tuple, str] = {}
    for m in matrices:
        low, high = min(low, int(m.scales.min())), max(high, int(m.scales.max()))
        magnitudes = torch.maximum(m.codes & 7, (m.codes >> 4) & 7).reshape(-1, BLOCK_SIZE // 2).amax(1)
        used = magnitudes > 0
        blocks += int(used.sum())
        odd += int((used & (magnitudes < 6)).sum())
        _note_copy(check, context, seen, m)
    check.measure(Number.SCALE_BYTES, f"{low} to {high}")
    check.measure(Number.BLOCKS, blocks)
    if blocks and odd / blocks > 0.2:
        context.suspicions.append((f"{odd} of {blocks} blocks have a largest value below 4 units",
                                   "scales and codes do not belong together, or the scale rule is not floor or even"))


def _note_copy(check: Check, context: ValidationContext, seen: dict[tuple, str], m: Matrix) -> None:
    """Two experts with the same codes, or one without any."""
    if not bool(m.codes.any()):
        check.notes.append(f"{m.name}: all codes are zero")
        return
    key = *m.group, hashlib.blake2b(m.codes.contiguous().numpy().tobytes(), digest_size=16).digest()
    if key in seen:
        check.fail(f"{m.name} has the codes of {seen[key]}", COPIES_CAUSE)
        context.explained = COPIES_CAUSE
    seen.setdefault(key, m.name)
