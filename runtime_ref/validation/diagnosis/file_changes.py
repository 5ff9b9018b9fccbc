"""What was done to a file after the export, proved by the checksums that the export wrote.

A checksum that does not fit says that something changed. Which bug changed it can be proved without any model: undo the change
that a bug would make, and see whether the checksum fits again. `checksums.json` has a CRC-32 of each tensor's bytes, so swapped
nibbles, shifted scale bytes, exchanged tensors and the like are told apart tensor by tensor; config.json is written in one
canonical form, so that setting one key back to another plausible value and hashing the text says which key was edited.

This needs no stored reference outputs, no float32 model, and works for every layout. It cannot name what it does not know, and
says nothing of folders whose checksums were made after the damage. A wrong candidate fits a CRC-32 once in four billion.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

NIBBLE_CAUSE = "nibbles are swapped: the low nibble of a byte holds the even column"
SHIFT_CAUSE = "expert scales are off by 2^{power:+d}: a scale byte b means 2^(b - 127)"
# What each configuration key is for, where the name does not say it.
MEANINGS = {"norm_topk_prob": "routing weights are not normalised, or are although they should not be (norm_topk_prob)",
            "rope_theta": "wrong rotary base (rope_theta)", "swa_rope_theta": "wrong rotary base of the window layers "
            "(swa_rope_theta)", "sliding_window": "the window of the window layers has another size (sliding_window)",
            "partial_rotary_factor": "wrong rotary width (partial_rotary_factor)",
            "num_experts_per_tok": "another number of experts per token (num_experts_per_tok)",
            "rms_norm_eps": "wrong epsilon of the norms (rms_norm_eps)",
            "layernorm_epsilon": "wrong epsilon of the norms (layernorm_epsilon)",
            "swiglu_limit": "the clamp of gpt-oss's SwiGLU has another limit (swiglu_limit)",
            "tie_word_embeddings": "embedding and head are taken for the same matrix, or are not (tie_word_embeddings)"}
BASES = (1e3, 5e3, 1e4, 1e5, 1.5e5, 5e5, 1e6, 5e6, 1e7)
SMALL = (1e-4, 1e-5, 1e-6, 1e-8, 1e-12)
FACTORS = (0.25, 1 / 3, 0.334, 0.5, 0.612, 0.7, 0.707, 1.0, 2.0, 2.5, 4.0, 7.0, 8.0, 16.0, 32.0)
TRIED = 200


def crc(tensor: torch.Tensor) -> str:
    """CRC-32 of a tensor's bytes, as checksums.json has it."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return f"{zlib.crc32(data):08x}"


def _nibbles(t: torch.Tensor) -> torch.Tensor:
    return (t >> 4) | (t << 4)


def _halves(t: torch.Tensor) -> torch.Tensor:
    """Alternating rows of the last but one row dimension as halves (gpt-oss's gate_up [E, 2 I, ...])."""
    return torch.cat((t[:, ::2], t[:, 1::2]), dim=1)


def _alternating(t: torch.Tensor) -> torch.Tensor:
    return torch.stack(t.chunk(2, 1), dim=2).flatten(1, 2)


def _undoings(name: str) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """(cause, the change that undoes it) of one tensor that does not fit."""
    if name.endswith(("_scale", "_scales")):
        for power in (1, -1, 2, -2, 127, -127):
            yield SHIFT_CAUSE.format(power=power), lambda t, p=power: t - p
        yield "scale bytes are in another order of blocks", lambda t: t.flip(-1)
    else:
        yield NIBBLE_CAUSE, _nibbles
        yield "expert codes are in another order of bytes", lambda t: t.flip(-1)
    if name.endswith(("gate_up_proj_blocks", "gate_up_proj_scales")):
        cause = "gate and up rows alternate in gpt-oss: they are stored as halves"
        yield cause, _alternating
        yield cause, _halves
        yield "gate and up projections of the experts are exchanged", lambda t: t.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
    for by in (1, -1):
        yield "rows are off by one (experts in another order than their routers count them)", lambda t, n=by: t.roll(n, 0)
    yield "rows are in reverse order", lambda t: t.flip(0)


def _undoings_of_floats(name: str) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    for by in (1, -1):
        yield f"rows of {_short(name)} are off by one", lambda t, n=by: t.roll(n, 0)
        if "norm" in name:
            yield "norm weights are stored as differences from 1, or taken for that", lambda t, n=by: t + n
    yield f"the sign of {_short(name)} is reversed", lambda t: -t
    for factor in (2.0, 0.5):
        yield f"{_short(name)} is multiplied by {1 / factor:g}", lambda t, f=factor: t * f
    yield f"{_short(name)} has another dtype than exported", lambda t: t.to(torch.bfloat16)
    yield f"{_short(name)} has another dtype than exported", lambda t: t.to(torch.float32)


def _short(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2] if "." in name else name


def causes_of_tensors(wrong: dict[str, torch.Tensor], sums: dict[str, str]) -> list[str]:
    """Causes that are proved for tensors whose bytes are not the exported ones, the most frequent first.

    Args:
        wrong: what is there. sums: CRC-32 by name, of all tensors of the export.
    """
    names: dict[str, list[str]] = {}
    for name, value in sums.items():
        names.setdefault(value, []).append(name)
    found: Counter[str] = Counter()
    for name in sorted(wrong)[:TRIED]:
        tensor = wrong[name]
        owners = names.get(crc(tensor), [])
        if owners:
            found[_exchanged(name, owners[0])] += 1
            continue
        undoings = _undoings(name) if tensor.dtype in (torch.uint8, torch.int8) else _undoings_of_floats(name)
        cause = next((cause for cause, undo in undoings if _fits(tensor, undo, sums[name])), None)
        if cause is not None:
            found[cause] += 1
    return [cause for cause, _ in found.most_common(4)]


def _fits(tensor: torch.Tensor, undo, expected: str) -> bool:
    return tensor.ndim > 0 and crc(undo(tensor)) == expected


def _exchanged(name: str, owner: str) -> str:
    """What it means that `name` has the bytes that were exported as `owner`."""
    kinds = {"gate_proj", "up_proj"}
    if {k for k in kinds if k in name} | {k for k in kinds if k in owner} == kinds and len(name) - len(owner) in (-2, 0, 2):
        return "gate and up projections of the experts are exchanged"
    if ".experts." in name and ".experts." in owner and name.split(".experts.")[0] == owner.split(".experts.")[0]:
        return "experts are in another order than their routers count them"
    return f"tensors are exchanged: {name} holds what was exported as {owner}"


def edited_keys(file: Path, expected: str) -> list[str]:
    """Which one key of config.json, set back to another value, gives the exported file: "key: found, exported with value".

    Args:
        expected: SHA-256 of the exported file.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(raw, dict):
        return []
    if _sha(raw) == expected:
        return ["only its form was edited: every value is the exported one"]
    holders = [(raw, ""), *((v, f"{k}.") for k, v in raw.items() if isinstance(v, dict))]
    for holder, prefix in holders:
        for key, value in list(holder.items()):
            same = [h for h, _ in holders if h is not holder and key in h and h[key] == value]
            for other in _others(key, value, raw):
                for group in ([holder], [holder, *same]) if same else ([holder],):  # what is said twice is edited twice
                    before = [one[key] for one in group]  # 10000 and 10000.0 are equal, and written otherwise
                    for one in group:
                        one[key] = other
                    if _sha(raw) == expected:
                        return [f"{prefix}{key}: {value!r}, exported with {other!r}"]
                    for one, own in zip(group, before, strict=True):
                        one[key] = own
    return []


def meaning_of(edited: str) -> str:
    """The cause behind a line of `edited_keys`."""
    key = edited.partition(":")[0].rpartition(".")[2]
    return MEANINGS.get(key, f"config.json was edited after the export ({key})")


def _sha(raw: dict) -> str:
    """Of the form in which the exporter writes JSON."""
    return hashlib.sha256((json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()).hexdigest()


def _others(key: str, value: object, raw: dict) -> Iterator[object]:
    """Plausible other values of a key."""
    if isinstance(value, bool):
        yield not value
        return
    if isinstance(value, int | float):
        near = *(value + d for d in (-2, -1, 1, 2)), *(value * f for f in (2, 0.5, 4, 0.25, 8, 0.125, 10, 0.1, 100, 0.01))
        numbers = {*(v for v in raw.values() if isinstance(v, int | float) and not isinstance(v, bool)), *BASES, *SMALL,
                   *FACTORS, *near}
        for n in sorted(numbers):
            if n != value:
                yield n
                yield int(n) if float(n).is_integer() and isinstance(n, float) else float(n)
    elif isinstance(value, str):
        yield from (v for v in raw.values() if isinstance(v, str) and v != value)
    elif value is None:
        yield from (True, False, *BASES, *map(int, BASES), *FACTORS)
    if value is not None:
        yield None
