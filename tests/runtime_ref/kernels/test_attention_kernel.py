"""The attention kernel against the runtime's torch attention: rings, sinks, odd sizes, and bits that ignore other rows."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from tolerance import ATTENTION_KERNEL

from runtime_ref.backends.torch.ops import attend_pages
from runtime_ref.kernels.attention import PAGE, attend
from tests.runtime_ref.kernels.at_once import INTERPRETED

K, G, D, V, POOL = 2, 3, 24, 20, 14


class Case:
    """Blocks of sequences with the given (first position, tokens) over a pool whose unwritten positions are NaN."""

    def __init__(self, blocks, window=None, sink=False, seed=0, d=D, v=V):
        generator = torch.Generator().manual_seed(seed)
        self.blocks, self.window = blocks, window
        self.keys = torch.full((K, POOL * PAGE, d), float("nan"), dtype=torch.bfloat16)
        self.values = torch.full((K, POOL * PAGE, v), float("nan"), dtype=torch.bfloat16)
        free = torch.randperm(POOL - 1, generator=generator).add_(1).tolist()
        self.first, self.pages = [], []
        for start, count in blocks:
            low = 0 if window is None else max(0, start - window + 1) // PAGE
            self.first.append(low)
            self.pages.append([free.pop() for _ in range(low, (start + count - 1) // PAGE + 1)])
            for position in range(low * PAGE, start + count):
                slot = self.pages[-1][position // PAGE - low] * PAGE + position % PAGE
                self.keys[:, slot] = torch.randn(K, d, generator=generator).to(torch.bfloat16)
                self.values[:, slot] = torch.randn(K, v, generator=generator).to(torch.bfloat16)
        self.rows = [sum(count for _, count in blocks[:i]) for i in range(len(blocks))]
        self.R = sum(count for _, count in blocks)
        self.q = torch.randn(K * G, self.R, d, generator=generator).to(torch.bfloat16) * 0.5
        self.sink = torch.randn(K * G, generator=generator) if sink else None

    def run(self, blocks=None, **options):
        """Output of all blocks, or of other cuts (sequence, first position, tokens) of them."""
        blocks = blocks or [(i, *block) for i, block in enumerate(self.blocks)]
        out = torch.full((K * G, self.R, self.values.shape[2]), float("nan"))
        attend(self.q, self.keys, self.values, self.sink, *self.places(blocks), rows=8, window=self.window,
               longest=max(s + c for _, s, c in blocks), out=out, float_dot=INTERPRETED, **options)
        return out

    def places(self, blocks=None):
        """tables, first, start, count, row."""
        blocks = blocks or [(i, *block) for i, block in enumerate(self.blocks)]
        width = max(len(p) for p in self.pages)
        columns = [[self.pages[i] + [0] * (width - len(self.pages[i])) for i, _, _ in blocks],
                   [self.first[i] for i, _, _ in blocks], [s for _, s, _ in blocks], [c for _, _, c in blocks],
                   [self.rows[i] + s - self.blocks[i][0] for i, s, _ in blocks]]
        return [torch.tensor(c, dtype=torch.int32) for c in columns]

    def expected(self):
        """`attend_pages`, block by block, in float32."""
        parts = []
        for (start, count), first, pages, row in zip(self.blocks, self.first, self.pages, self.rows, strict=True):
            held = torch.tensor(pages)
            keys, values = (s.float().nan_to_num().view(K, -1, PAGE, s.shape[2])[:, held] for s in (self.keys, self.values))
            query = (start + torch.arange(count))[:, None]
            there = first * PAGE + torch.arange(len(pages) * PAGE)[None]
            seen = (there <= query) if self.window is None else (there <= query) & (there > query - self.window)
            hidden = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
            hidden = hidden.view(1, count, len(pages), PAGE).transpose(1, 2)
            q = self.q[:, row:row + count].float().reshape(K, 1, 1, G * count, -1)
            parts.append(attend_pages(q, keys, values, hidden, self.sink).view(K * G, count, -1))
        return torch.cat(parts, 1)


def error(case, **options):
    expected = case.expected()
    return float((case.run(**options) - expected).norm() / expected.norm())


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("window", [None, 40, 128])
def test_equals_the_torch_attention(window, sink):
    case = Case([(0, 1), (63, 8), (129, 7), (250, 3)], window, sink)
    assert error(case, chunk=2) < ATTENTION_KERNEL


@pytest.mark.parametrize("d, v", [(16, 16), (48, 32), (64, 24)])
def test_head_sizes(d, v):
    assert error(Case([(70, 8)], None, True, d=d, v=v)) < ATTENTION_KERNEL


def test_many_chunks_are_joined():
    assert error(Case([(600, 8)]), chunk=1) < ATTENTION_KERNEL


@pytest.mark.parametrize("window", [None, 40])
def test_a_row_alone_has_the_bits_it_has_among_eight(window):
    """Blocks across a page and a chunk boundary: rows see different pages and chunks."""
    case = Case([(124, 8), (5, 8)], window, sink=True)
    together = case.run(chunk=1)
    assert not together.isnan().any()
    for i in (0, 3, 4, 7):
        alone = case.run([(0, 124 + i, 1)], chunk=1)
        assert same_bits(alone[:, i], together[:, i])


def test_key_heads_must_divide_query_heads():
    case = Case([(0, 1)])
    case.q = case.q[:5]
    with pytest.raises(ValueError, match="5 query heads over 2 key heads"):
        case.run()


def test_many_query_heads_share_a_key_head_in_several_tiles():
    """3 query heads of 24 rows would fit; 12 of 96 are split into tiles of at most 64."""
    case = Case([(70, 8), (3, 2)], 40, sink=True)
    generator = torch.Generator().manual_seed(4)
    case.q = (torch.randn(K * 12, case.R, D, generator=generator) * 0.5).to(torch.bfloat16)
    case.sink = torch.randn(K * 12, generator=generator)
    found = torch.full((K * 12, case.R, V), float("nan"))
    attend(case.q, case.keys, case.values, case.sink, *case.places(), rows=8, window=40, longest=78, out=found,
           float_dot=INTERPRETED)
    for h in range(4):  # three query heads of each key head at a time, as the other tests have them
        own = torch.tensor([k * 12 + 3 * h + g for k in range(K) for g in range(3)])
        part = Case([(70, 8), (3, 2)], 40, sink=True)
        part.q, part.sink = case.q[own], case.sink[own]
        expected = part.expected()
        assert float((found[own] - expected).norm() / expected.norm()) < ATTENTION_KERNEL
