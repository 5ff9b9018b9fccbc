"""Counters of arrivals are made once: repeated calls clear none, and a call that broke off leaves zeros for the next."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from runtime_ref.kernels import counters, launches
from runtime_ref.kernels.attention import attend
from runtime_ref.kernels.sampling import verify
from tests.runtime_ref.kernels.at_once import INTERPRETED

CPU = torch.device("cpu")
TILING = launches.Tiling(columns=32, depth=64, experts=16, block=64, float_dot=INTERPRETED)


@pytest.fixture
def made(monkeypatch):
    """An empty store, and how many counters were cleared for it."""
    monkeypatch.setattr(counters, "_kept", type(counters._kept)(list))
    sizes, zeros = [], counters.zeros

    def counted(size, device):
        sizes.append(size)
        return zeros(size, device)

    monkeypatch.setattr(counters, "zeros", counted)
    return sizes


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def run_attend():
    def column(*values):
        return torch.tensor(values, dtype=torch.int32)

    q, keys, values = (random(*shape).to(torch.bfloat16) for shape in ((2, 3, 16), (1, 192, 16), (1, 192, 16)))
    return attend(q, keys, values, None, column(1, 2)[None], column(0), column(70), column(3), column(0), rows=8, window=None,
                  longest=73, chunk=1, float_dot=INTERPRETED)


def run_route():
    router = launches.Router(random(20, 32), torch.zeros(20), 2)
    return launches.route(random(9, 32).to(torch.bfloat16), router, TILING)[1]


def run_verify():
    return verify(random(5, 130), *torch.zeros((3, 5), dtype=torch.int32), chunk=64)[0]


@pytest.mark.parametrize("run", [run_attend, run_route, run_verify])
def test_repeated_calls_clear_no_counters_and_leave_zeros(made, run):
    first = run()
    assert made == [counters.LEAST]
    assert torch.equal(run(), first) and len(made) == 1
    assert not any(kept.any() for group in counters._kept.values() for kept in group)


def test_a_call_that_broke_off_does_not_poison_the_next(made):
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt), counters.arrivals(5, CPU) as own:
        own[2] = 7
        raise KeyboardInterrupt
    with counters.arrivals(64, CPU) as own:
        assert made == [64] and own.shape == (64,) and not own.any()


def test_calls_at_the_same_time_have_counters_of_their_own_and_sizes_their_own_buffers(made):
    with counters.arrivals(5, CPU) as own, counters.arrivals(5, CPU) as other:
        assert own.data_ptr() != other.data_ptr()
    with counters.arrivals(65, CPU) as longer:
        assert longer.shape == (65,)
    assert made == [64, 64, 128]


def test_what_a_graph_clears_for_itself_is_kept_by_nobody_else(made, monkeypatch):
    """Its zeros are written by replays, not by the capture."""
    monkeypatch.setattr(counters, "captured", lambda device: True)
    with counters.arrivals(5, CPU) as own:
        assert own.shape == (5,) and not own.any()
    assert made == [5] and not any(counters._kept.values())
