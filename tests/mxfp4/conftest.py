"""Blocks that have broken somebody's MXFP4 code, shared by the tests of codec, peers and fake quantization."""

import pytest
import torch

from mxfp4 import compiled
from storage.compiled import FLAGS


def _edge_blocks(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Name -> block [32]. Every value is finite and exact in `dtype`."""
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal * info.eps
    ramp = torch.linspace(-1, 1, 32, dtype=torch.float64)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2, dtype=torch.float64)
    blocks = {
        "zeros": torch.zeros(32),
        "negative zeros": torch.full((32,), -0.0),
        "signed ties": torch.cat([ties, -ties]),
        "ones among zeros": torch.eye(32)[5],
        "all equal": torch.full((32,), -0.3),
        "smallest normal": ramp.sign() * info.smallest_normal,
        "subnormals": (ramp * 31).round() * subnormal,
        "one subnormal": torch.eye(32, dtype=torch.float64)[0] * subnormal,
        "around the smallest scale": ramp * 8 * 2.0**-127 if dtype is not torch.float16 else ramp * 8 * 2.0**-24,
        "largest": ramp.sign() * info.max,
        "largest and small": torch.where(torch.arange(32) == 3, info.max, info.max / 64 * ramp),
        "tiny beside large": torch.where(torch.arange(32) == 31, 1024.0, subnormal),
    }
    for amax in (4, 5, 6, 6.03125, 6.25, 6.96875, 7, 7.03125, 7.5, 7.96875, 8):
        blocks[f"amax {amax}"] = torch.cat([torch.tensor([float(amax)]), torch.linspace(-6, 6, 31)])
    if dtype is torch.float32:
        for name, value in (("6", 6.0), ("7", 7.0), ("8", 8.0)):
            for side, end in (("below", 0.0), ("above", 9.0)):
                edge = torch.nextafter(torch.tensor(value), torch.tensor(end))
                blocks[f"one step {side} {name}"] = torch.cat([edge[None], torch.linspace(-4, 4, 31)])
    return {name: block.to(dtype) for name, block in blocks.items()}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=["floor", "rceil", "even", "mse"])
def rule(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def edge_blocks():
    return _edge_blocks


@pytest.fixture(scope="session")
def weights():
    """weights(dtype, *shape): Gaussian values whose blocks spread over many binades, with exact ties and zeros."""

    def make(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        w = torch.randn(shape, generator=g) * torch.exp2(torch.randint(-12, 6, (*shape[:-1], 1), generator=g).float())
        coarse = torch.rand(shape, generator=g) < 0.1
        w = torch.where(coarse, (w * 64).round() / 64, w)
        return w.masked_fill(torch.rand(shape, generator=g) < 0.02, 0.0).to(dtype)

    return make


@pytest.fixture(scope="session")
def same_bits():
    """same_bits(a, b): equal shape, dtype and every bit, so that -0.0 differs from 0.0."""

    def compare(a: torch.Tensor, b: torch.Tensor) -> bool:
        view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
            a.contiguous().view(view), b.contiguous().view(view)
        )

    return compare


@pytest.fixture(scope="module", params=["compiled", "compiled plainly", "torch"])
def way(request):
    """How a CPU computes: by blocks.c, for this processor or for any, or by torch where there is no compiler."""
    plainly = ("-O1", *(flag for flag in FLAGS if not flag.startswith(("-O", "-march"))))
    found = {"compiled": compiled.blocks, "compiled plainly": lambda: compiled.blocks(plainly), "torch": lambda: None}
    blocks = found[request.param]()
    if blocks is None and request.param != "torch":
        pytest.skip("no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "blocks", lambda: blocks)
        yield request.param
