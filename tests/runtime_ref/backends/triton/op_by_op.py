"""Every op of a program on the kernels against its torch reference."""

import torch
from tolerance import ROW_KERNEL

from runtime_ref.core.batch import SequenceChunk
from runtime_ref.core.kv_cache import KvCache

BY_HEAD = ("q", "k", "v", "heads", "partial")


def relative(found, expected):
    assert not found.isnan().any()
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def check_each_op(backend, torch_backend, program, ids) -> set[str]:
    """Runs `tasks` over `ids`; the torch op gets the buffers of the Triton run, so errors do not add up and no choice of
    experts flips. Returns the ops that ran."""
    caches = [KvCache(b.pools) for b in (backend, torch_backend)]
    tables = [cache.tables() for cache in caches]
    for cache, own in zip(caches, tables, strict=True):
        cache.extend(own, list(own), len(ids))
    theirs = torch_backend.plan([SequenceChunk(tables[1], 0, ids)])
    held, seen, R = {"ids": theirs.ids}, set(), theirs.ids.shape[0]

    def rows_of(name, value):
        """A Triton buffer as torch's, with torch's padding."""
        if name not in BY_HEAD:
            value = value[None]
        value = value if name == "index" else value.float()
        value = torch.cat((value, value[:, -1:].expand(-1, R - value.shape[1], -1)), 1)
        return value if name in BY_HEAD else value[0]

    def watch(op, buffers):
        inputs = [held[name] for name in op.reads]
        found = torch_backend.ops[op.name](theirs, op.layer, *inputs)
        for name, expected in zip(op.writes, found if len(op.writes) > 1 else (found,), strict=True) if op.writes else ():
            mine = rows_of(name, buffers[name])
            if name == "partial":
                expected, mine = expected.sum(0), mine.sum(0)
            real = slice(0, len(ids))
            if name == "index":
                assert torch.equal(mine[real].long(), expected[real]), str(op)
            else:
                assert relative(mine[..., real, :], expected[..., real, :]) < 2 * ROW_KERNEL, str(op)
        for name in op.writes:
            held[name] = rows_of(name, buffers[name])
            held[name] = held[name].long() if name == "index" else held[name]
        seen.add(op.name)

    backend.run(program, backend.plan([SequenceChunk(tables[0], 0, ids)]), watch)
    assert seen == {op.name for op in program}
    return seen
