"""What is in a folder's tensors, whatever their layout: finite numbers, scale bytes, the block invariant, copied experts.

A block's largest code is 4 or 6 units under both scale rules (the scale is the power of two below the largest magnitude), so
blocks whose codes all stay small say that codes and scales do not belong together. That, and scales of an impossible size, is
all that bytes tell by themselves; whether they are the *right* bytes takes a reference or the checksums of the export.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from checkpoint.tensor_files import TensorFiles
from mxfp4.format import BLOCK_SIZE, E8M0_NAN
from runtime_ref.validation.context import FINITE_CAUSE, ValidationContext
from runtime_ref.validation.quantities import Number
from runtime_ref.validation.result import Check

SCALE_CAUSE = "scale bytes are read as numbers: scales must be uint8 (E8M0), called weight_scale; a byte b means 2^(b - 127)"
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


def look_at_numbers(check: Check, context: ValidationContext, files: TensorFiles, infos: dict, names: Iterable[str]) -> None:
    """Tensors that are not packed: all finite?"""
    for name in names:
        if infos[name][1] not in ("U8", "F8_E4M3") and not bool(torch.isfinite(files.read(name)).all()):
            context.loadable = False  # whatever is computed with it is not finite either
            check.fail(f"{name}: not finite at index {_first_odd(files.read(name))}", FINITE_CAUSE)


def look_at_blocks(check: Check, context: ValidationContext, matrices: Iterable[Matrix],
                   scale_cause: str = SCALE_CAUSE) -> None:
    """One pass over all expert matrices."""
    low, high, blocks, odd = 255, 0, 0, 0
    seen: dict[tuple, str] = {}
    for m in matrices:
        top = int(m.scales.max())
        low, high = min(low, int(m.scales.min())), max(high, top)
        if top == E8M0_NAN:
            check.fail(f"{m.scale_name}: a scale byte is 255 (NaN)", "a block of an expert was not finite when it was exported")
        elif not 60 <= top <= 136:
            check.fail(f"{m.scale_name}: bytes reach {top} (2^{top - 127}), expected weights of ordinary size", scale_cause)
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
    """Two experts with the same codes, or one without any: nothing that was trained has that."""
    if not bool(m.codes.any()):
        check.notes.append(f"{m.name}: all codes are zero")
        return
    key = *m.group, hashlib.blake2b(m.codes.contiguous().numpy().tobytes(), digest_size=16).digest()
    if key in seen:
        check.fail(f"{m.name} has the codes of {seen[key]}", COPIES_CAUSE)
        context.explained = COPIES_CAUSE
    seen.setdefault(key, m.name)


def _first_odd(tensor: torch.Tensor) -> list[int]:
    return torch.nonzero(~torch.isfinite(tensor))[0].tolist()
