"""Text of others on a terminal: names of files and tensors can hold escape sequences that clear the screen, set the window's
title, or write text backwards. And counts as one says them."""

from __future__ import annotations

import re

# C0 and C1 controls but the line end and the tab, DEL, line and paragraph separators, marks that turn the writing direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """`text` with control characters written out (`\\x1b`), so that a terminal shows them and does not obey."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}",
                        str(text))


def printable_line(text: object) -> str:
    """`printable`, and on one line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def readable_size(count: float) -> str:
    """Bytes as "564 GB", "4.98 MB", "780 bytes": powers of ten, three digits."""
    unit, factor = next(((unit, factor) for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= factor),
                        ("bytes", 1))
    if unit != "GB" and round(count / factor) >= 1000:
        unit, factor = {"bytes": ("kB", 1e3), "kB": ("MB", 1e6), "MB": ("GB", 1e9)}[unit]
    value = count / factor
    if factor == 1:
        return f"{value:.0f} {unit}"
    return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:#.3g} {unit}"


def counted(count: int, noun: str, many: str | None = None) -> str:
    """"1 file", "1,200 files". many: the plural, where it is not the noun and an s."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"
