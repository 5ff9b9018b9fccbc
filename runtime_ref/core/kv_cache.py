"""Keys and values of all sequences, in pages of PAGE positions.

Three kinds of pages, each with its own pool: `full` (layers of full attention keep every page), `window` (window layers) and
`draft` (the drafter's context). A page id of a kind stands for the same positions in all layers of that kind. A sequence's
table for a window kind is a ring: pages that no later query can see go back to the pool, so its memory is constant.

Rollback costs nothing: rejected tokens lie behind the committed length, are masked by position, and are overwritten by the
next step before anything reads them. That is safe because a page is only dropped, or shared, up to the committed length.

Prefix cache: a page that is full and committed is known by the hash of all tokens up to its end. A later prompt with the
same beginning takes the pages over (reference counts), at page boundaries, if each kind still has what a query after the
boundary may see. A page that only the cache holds is given up, oldest use first, when a pool runs out.

Pages are read in the order of their positions, and each is reduced by itself (see `model.attend`): this is what makes the
result independent of how much of a table is empty, and of where a ring begins.

Rejected: a ring indexed by position modulo its size, which cannot share pages between sequences; a contiguous cache per
sequence, which cannot grow.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

PAGE = 64


def untouched_zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros that take no memory before they are written to: a server reserves for its worst day, which may not come."""
    count = math.prod(shape)
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    size = count * dtype.itemsize
    try:
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no room for {size / 2**30:,.1f} GiB of keys or values of one layer ({error})") from None
    return torch.frombuffer(room, dtype=dtype).view(shape)


class OutOfPages(Exception):
    """A pool has no page left: the scheduler preempts a sequence and tries again."""


class Pool:
    """Pages of one kind: storage of every layer of it, a free list, reference counts.

    Args:
        layers: layer number -> (key heads K, key width D, value width V).
        pages: number of pages besides page 0, which stays empty: tables are padded with it.
        dtype: to which stored values are rounded (they are held in float32, see `model`).
    """

    def __init__(self, layers: dict[int, tuple[int, int, int]], pages: int, dtype: torch.dtype, window: int | None):
        self.window, self.pages, self.dtype = window, pages, dtype
        self.keys = {i: untouched_zeros(K, (pages + 1) * PAGE, D) for i, (K, D, _) in layers.items()}
        self.values = {i: untouched_zeros(K, (pages + 1) * PAGE, V) for i, (K, _, V) in layers.items()}
        self.free = list(range(pages, 0, -1))
        self.references = [0] * (pages + 1)

    @property
    def cache_bytes(self) -> int:
        """What the storage takes once every page was written to."""
        return sum(t.nbytes for store in (self.keys, self.values) for t in store.values())

    def take(self) -> int:
        page = self.free.pop()
        self.references[page] = 1
        return page

    def share(self, page: int) -> None:
        self.references[page] += 1

    def give_back(self, page: int) -> None:
        self.references[page] -= 1
        assert self.references[page] >= 0
        if not self.references[page]:
            self.free.append(page)

    def first_needed(self, position: int) -> int:
        """Logical page of the first key that a query at `position` or later can see."""
        return 0 if self.window is None else max(0, position - self.window + 1) // PAGE


@dataclass
class Table:
    """Pages of one sequence and kind: logical pages first .. first + len(pages) - 1."""

    first: int = 0
    pages: list[int] = field(default_factory=list)

    def page(self, logical: int) -> int:
        return self.pages[logical - self.first]

    def slot(self, position: int) -> int:
        """Where a position's keys and values lie in the pool."""
        return self.page(position // PAGE) * PAGE + position % PAGE

    @property
    def end(self) -> int:
        """First logical page that is not held."""
        return self.first + len(self.pages)


@dataclass
class _Entry:
    """A known page: ids by kind."""

    pages: dict[str, int]


class KvCache:
    """All pools, the tables' bookkeeping and the prefix cache."""

    def __init__(self, pools: dict[str, Pool], *, prefix: bool = True):
        self.pools, self.prefix = pools, prefix
        self._known: OrderedDict[bytes, _Entry] = OrderedDict()
        self.prefix_hits = 0

    def tables(self) -> dict[str, Table]:
        return {kind: Table() for kind in self.pools}

    def extend(self, tables: dict[str, Table], kinds: list[str], end: int) -> None:
        """Gives each of the kinds pages for positions before `end`.

        Raises:
            OutOfPages: not enough, even after giving up what only the prefix cache holds. Nothing is taken then.
        """
        missing = {kind: -(-end // PAGE) - tables[kind].end for kind in kinds}
        for kind, count in missing.items():
            if count > 0 and not self._make_room(kind, count):
                raise OutOfPages(kind)
        for kind, count in missing.items():
            tables[kind].pages.extend(self.pools[kind].take() for _ in range(count))

    def _make_room(self, kind: str, count: int) -> bool:
        pool = self.pools[kind]
        while len(pool.free) < count and self._known:
            _, entry = self._known.popitem(last=False)
            for held, page in entry.pages.items():
                self.pools[held].give_back(page)
        return len(pool.free) >= count

    def evict_outside_window(self, tables: dict[str, Table], lengths: dict[str, int]) -> None:
        """Drops pages that queries from position `lengths[kind]` on cannot see."""
        for kind, length in lengths.items():
            pool, table = self.pools[kind], tables[kind]
            while table.pages and table.first < pool.first_needed(length):
                pool.give_back(table.pages.pop(0))
                table.first += 1

    def release(self, tables: dict[str, Table]) -> None:
        """Gives everything back."""
        for kind, table in tables.items():
            for page in table.pages:
                self.pools[kind].give_back(page)
            table.pages, table.first = [], 0

    def cache_page(self, tables: dict[str, Table], hashes: list[bytes], logical: int, kinds: list[str]) -> None:
        """Makes the committed full page `logical` known under `hashes[logical]`, for the kinds that hold it."""
        if not self.prefix:
            return
        key = hashes[logical]
        entry = self._known.setdefault(key, _Entry({}))
        for kind in kinds:
            table = tables[kind]
            if kind not in entry.pages and table.first <= logical < table.end:
                entry.pages[kind] = table.page(logical)
                self.pools[kind].share(table.page(logical))
        self._known.move_to_end(key)

    def match_prefix(self, tables: dict[str, Table], hashes: list[bytes], kinds: list[str]) -> int:
        """Fills empty tables with the longest known prefix; returns its length in positions (0 = nothing known).

        Args:
            hashes: of the prompt's full pages (the last token must not lie in them: it has to be computed).
            kinds: which must be there.
        """
        entries = []
        for key in hashes if self.prefix else []:
            if key not in self._known:
                break
            entries.append(self._known[key])
        for count in range(len(entries), 0, -1):
            first = {kind: self.pools[kind].first_needed(count * PAGE) for kind in kinds}
            if not all(kind in entries[i].pages for kind in kinds for i in range(first[kind], count)):
                continue
            for kind in kinds:
                tables[kind].first = first[kind]
                tables[kind].pages = [entries[i].pages[kind] for i in range(first[kind], count)]
                for page in tables[kind].pages:
                    self.pools[kind].share(page)
            for key in hashes[:count]:
                self._known.move_to_end(key)
            self.prefix_hits += 1
            return count * PAGE
        return 0

    def clear_prefixes(self) -> None:
        """Empties the prefix cache."""
        while self._known:
            _, entry = self._known.popitem()
            for kind, page in entry.pages.items():
                self.pools[kind].give_back(page)

    def entries(self) -> Iterable[_Entry]:
        """Known pages."""
        return self._known.values()

    def used(self) -> dict[str, int]:
        """Pages in use by kind (sequences and prefix cache)."""
        return {kind: pool.pages - len(pool.free) for kind, pool in self.pools.items()}


def extend_hashes(hashes: list[bytes], tokens: list[int]) -> None:
    """Appends the chained hashes of the full pages of `tokens` that are not there yet."""
    while (len(hashes) + 1) * PAGE <= len(tokens):
        begin = len(hashes) * PAGE
        page = ",".join(map(str, tokens[begin:begin + PAGE])).encode()
        hashes.append(hashlib.blake2b((hashes[-1] if hashes else b"") + page, digest_size=16).digest())
