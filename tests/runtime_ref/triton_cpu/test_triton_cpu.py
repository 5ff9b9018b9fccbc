"""The compiler for the CPU itself: small kernels against torch, programs as threads, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

import triton
import triton.language as tl

from runtime_ref.kernels.mxfp4_decode import DECODE_PTX
from runtime_ref.kernels.sync import grid_barrier
from runtime_ref.measure.static.ptx_emulator import run_ptx
from runtime_ref.triton_cpu import c_code, ptx_code, ttir
from runtime_ref.triton_cpu.backend import compile_c
from tests.runtime_ref.kernels.at_once import INTERPRETED

ROOT = Path(__file__).resolve().parents[3]
compiled = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here: make test-kernels")


@triton.jit
def round_trip(x, narrow, wide, fp8, decoded, N: tl.constexpr):
    i = tl.arange(0, N)
    half = tl.load(x + i).to(tl.bfloat16)
    tl.store(narrow + i, half)
    tl.store(wide + i, half.to(tl.float32))
    tl.store(decoded + i, tl.load(fp8 + i).to(tl.float8e4nv, bitcast=True).to(tl.bfloat16))


@compiled
def test_numbers_are_rounded_as_torch_rounds_them():
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3895e38, float("inf"), float("nan"), 0.0, -0.0, 1e-40,
                         2**-133])
    x = torch.cat((ties, torch.randn(246, generator=torch.Generator().manual_seed(0))))
    codes = torch.arange(256, dtype=torch.uint8)
    narrow, wide, decoded = torch.empty(256, dtype=torch.bfloat16), torch.empty(256), torch.empty(256, dtype=torch.bfloat16)
    round_trip[(1,)](x, narrow, wide, codes, decoded, N=256)
    torch.testing.assert_close(narrow, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(narrow.view(torch.int16)[6:8], torch.tensor([0, -32768], dtype=torch.int16))  # both zeros
    torch.testing.assert_close(wide, x.to(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(decoded, codes.view(torch.float8_e4m3fn).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@triton.jit
def integers(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, x * y + x)
    tl.store(out + N + i, x // y)
    tl.store(out + 2 * N + i, x % y)
    tl.store(out + 3 * N + i, ((x.to(tl.uint32) >> 3) // 7 < y.to(tl.uint32)).to(tl.int32))
    tl.store(out + 4 * N + i, x >> 3)
    tl.store(out + 5 * N + i, tl.minimum(x, y) ^ (x << 5))
    tl.store(out + 6 * N + i, x.to(tl.uint8).to(tl.int32))
    tl.store(out + 7 * N + i, tl.where((x < y) & (y != 3), -1, x.to(tl.int8).to(tl.int32)))


@compiled
def test_integers_wrap_and_divide_as_c_does():
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int32, generator=generator)
    b = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int32, generator=generator)
    a[:3], b[:3] = torch.tensor([-7, 7, 2**31 - 1]), torch.tensor([2, -2, 3])
    out = torch.empty(8, 64, dtype=torch.int32)
    integers[(1,)](a, b, out, N=64)
    x, y = a.numpy(), b.numpy()
    unsigned = (x.view(np.uint32) >> np.uint32(3)) // np.uint32(7) < y.view(np.uint32)
    with np.errstate(over="ignore"):
        expected = [x * y + x, np.fix(x / y.astype(np.float64)).astype(np.int32), np.fmod(x, y), unsigned.astype(np.int32),
                    x >> 3, np.minimum(x, y) ^ (x << 5), x.astype(np.uint8).astype(np.int32),
                    np.where((x < y) & (y != 3), -1, x.astype(np.int8))]
    for found, wanted in zip(out.numpy(), expected, strict=True):
        assert (found == wanted).all()


@triton.jit
def masked(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i, mask=i < n) + 1.0)
    tl.store(out + N + i, tl.load(x + i, mask=i < n, other=5.0), mask=i > 1)


@compiled
def test_what_a_masked_load_leaves_undefined_is_seen_and_nothing_beyond_a_mask_is_written():
    out = torch.full((16,), 7.0)
    masked[(1,)](torch.zeros(3), out, 3, N=8)
    assert out[:3].eq(1).all() and out[3:8].isnan().all()
    assert out[8:].tolist() == [7, 7, 0, 5, 5, 5, 5, 5]


@triton.jit
def along(x, sums, best, running, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    values = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(sums + m, tl.sum(values, 1))
    tl.store(sums + M + n, tl.sum(values, 0))
    tl.store(best + m, tl.argmax(values, 1, tie_break_left=True))
    tl.store(running + m[:, None] * N + n[None, :], tl.cumsum(values, 0))
    tl.store(sums + M + N, tl.max(tl.max(values, 1), 0))


@compiled
def test_reductions_and_scans_run_along_their_axis_and_ties_go_left():
    x = torch.randint(-2, 3, (4, 16), generator=torch.Generator().manual_seed(2)).float()
    sums, best, running = torch.empty(21), torch.empty(4, dtype=torch.int32), torch.empty(4, 16)
    along[(1,)](x, sums, best, running, M=4, N=16)
    assert torch.equal(sums, torch.cat((x.sum(1), x.sum(0), x.max()[None])))
    assert best.tolist() == [int((row == row.max()).nonzero()[0]) for row in x]
    assert torch.equal(running, x.cumsum(0))


@triton.jit
def shapes(x, y, product, halves, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    a = tl.load(x + m[:, None] * K + k[None, :])
    b = tl.trans(tl.load(y + n[:, None] * K + k[None, :]))
    acc = tl.dot(a, b, tl.full((M, N), 1.0, tl.float32))
    tl.store(product + m[:, None] * N + n[None, :], acc)
    left, right = acc.reshape(M, N // 2, 2).split()
    column = tl.arange(0, N // 2)
    tl.store(halves + m[:, None] * (N // 2) + column[None, :], left - right)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_matrices_are_summed_in_float32(dtype):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(16, 64, generator=generator).to(dtype), torch.randn(16, 64, generator=generator).to(dtype)
    product, halves = torch.empty(16, 16), torch.empty(16, 8)
    shapes[(1,)](x, y, product, halves, M=16, K=64, N=16)
    torch.testing.assert_close(product, (x.double() @ y.double().T + 1).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(halves, product[:, 0::2] - product[:, 1::2])


@triton.jit
def loops(out, n):
    a, b = 0, 1
    total = tl.zeros((4,), tl.int32)
    for i in range(0, n):
        a, b = b, a + b
        if i % 2 == 0:
            total += tl.arange(0, 4) * i
        else:
            total = -total
    steps = 0
    x = n
    while x != 1:
        x = tl.where(x % 2 == 0, x // 2, 3 * x + 1)
        steps += 1
    tl.store(out, a)
    tl.store(out + 1, steps)
    tl.store(out + 2 + tl.arange(0, 4), total)


@compiled
@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_values_carried_through_loops_change_at_once(n):
    out = torch.empty(6, dtype=torch.int32)
    loops[(1,)](out, n)
    a, b, total = 0, 1, np.zeros(4, dtype=np.int32)
    for i in range(n):
        a, b = b, a + b
        total = total + np.arange(4) * i if i % 2 == 0 else -total
    steps, x = 0, n
    while x != 1:
        x, steps = (x // 2 if x % 2 == 0 else 3 * x + 1), steps + 1
    assert out.tolist() == [a, steps, *total.tolist()]


@triton.jit
def meet(values, sums, counter, failed, EPOCHS: tl.constexpr, WAIT: tl.constexpr):
    """Each epoch: program p writes p + epoch, waits for all, sums what all wrote; an even number of values a program."""
    p, count = tl.program_id(0), tl.num_programs(0)
    for epoch in range(1, EPOCHS + 1):
        tl.store(values + (epoch % 2) * count + p, p + epoch)
        if WAIT:
            grid_barrier(counter, epoch, failed, 1 << 30)
        total = 0
        for other in range(0, count):
            total += tl.load(values + (epoch % 2) * count + other)
        tl.store(sums + p * EPOCHS + epoch - 1, total)


@compiled
def test_programs_of_a_cooperative_launch_run_at_once_and_others_one_by_one():
    programs, epochs = 5, 40

    def run(wait, **options):
        values, sums = torch.full((2 * programs,), -100, dtype=torch.int32), torch.zeros(programs, epochs, dtype=torch.int32)
        counter, failed = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        meet[(programs,)](values, sums, counter, failed, EPOCHS=epochs, WAIT=wait, **options)
        expected = torch.tensor([sum(p + e for p in range(programs)) for e in range(1, epochs + 1)], dtype=torch.int32)
        return bool((sums == expected).all())

    assert run(True, launch_cooperative_grid=True)
    assert not run(False)


@compiled
def test_a_launch_may_leave_out_pointers_and_pass_ones():
    x, out = torch.arange(8.0), torch.zeros(8)
    some[(2,)](x, None, out, 1, N=4)
    assert out.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    some[(2,)](x, x, out, 3, N=4)
    assert out.tolist() == [3 + 2 * i for i in range(8)]


@triton.jit
def some(x, y, out, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + i) + n
    if y is not None:
        value += tl.load(y + i)
    tl.store(out + i, value)


@triton.jit
def decode_words(codes, lower, upper, out, N: tl.constexpr, ASM: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r,r,r,r,r", [tl.load(codes + i), tl.load(lower + i), tl.load(upper + i)],
                                     dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4)
    tl.store(out + i, a)
    tl.store(out + N + i, b)


@compiled
def test_inline_assembly_is_what_the_emulator_says():
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 256, (1024,), dtype=torch.uint8, generator=generator)
    scales = [(torch.randint(0, 256, (1024,), generator=generator) << 7).to(torch.int16).view(torch.bfloat16) for _ in range(2)]
    out = torch.empty(2048, dtype=torch.bfloat16)
    decode_words[(1,)](codes, *scales, out, N=1024, ASM=DECODE_PTX)
    words = [t.view(torch.int32).numpy().view(np.uint32) for t in (codes, *scales)]
    inputs = {"$4": words[0], "$5": words[1][0::2], "$6": words[1][1::2], "$7": words[2][0::2], "$8": words[2][1::2]}
    registers = run_ptx(DECODE_PTX, inputs)
    expected = np.stack([np.stack((registers["$0"], registers["$1"]), 1).ravel(),
                         np.stack((registers["$2"], registers["$3"]), 1).ravel()])
    found = out.view(torch.int32).numpy().view(np.uint32).reshape(2, -1)
    numbers = lambda bits: np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16  # noqa: E731
    assert np.array_equal(numbers(found).view(np.float32), numbers(expected).view(np.float32), equal_nan=True)


def function(*lines: str) -> str:
    return "\n".join(("module {", "tt.func public @k(%arg0: !tt.ptr<f32>) attributes {noinline = false} {", *lines,
                      "tt.return", "}", "}"))


@pytest.mark.parametrize("text, said", [
    (function("%0 = arith.frobnicate %arg0 : i32"), "operation arith.frobnicate: no C for it"),
    (function("%0 = arith.constant dense<[1, 2]> : tensor<2xi32>"), "expected one value for all elements"),
    (function("%0 = tt.dot_scaled %arg0 scale %arg0, %arg0 scale %arg0, %arg0 lhs = e2m1 rhs = e2m1 {fastMath = false} : "
              "tensor<16x32xi8>, tensor<16x2xi8> * tensor<32x16xi8>, tensor<16x2xi8> -> tensor<16x16xf32>"),
     "expected lhs = e2m1 rhs = e4m3"),
    (function("%0 = arith.extf %arg0 : f32 to f4"), "type f4: expected one of i1"),
    ("module {\n}", "module of 0 functions"),
], ids=["operation", "constant", "scaled", "type", "module"])
def test_what_has_no_c_is_refused_by_name(text, said):
    with pytest.raises(ValueError) as error:
        c_code.c_source(ttir.parse(text))
    assert said in str(error.value)


def test_assembly_that_is_not_known_is_refused_by_name():
    with pytest.raises(ValueError, match=r"PTX popc.b32 in .*expected one of and.b32"):
        ptx_code.ptx_body("f", '"popc.b32 $0, $1;" {}', ["i32"], ["i32"], 1)


def test_c_that_does_not_compile_is_a_mistake_said_in_few_lines():
    with pytest.raises(RuntimeError, match="the C of a kernel does not compile") as error:
        compile_c("int launch(void) { return nothing; }")
    assert len(str(error.value).splitlines()) <= 5


@compiled
def test_an_access_outside_of_a_kernels_tensors_is_named_where_that_is_asked_for():
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("out_of_bounds.py"))], capture_output=True, text=True,
                          env=os.environ | {"FP4_KERNEL_BOUNDS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "nothing", "shifted, program (1, 0, 0): load of 4 bytes 4 bytes behind the end of x, the nearest tensor",
        "shifted, program (0, 0, 0): load of 4 bytes 8 bytes before the beginning of x, the nearest tensor",
        "shifted, program (2, 0, 0): store of 4 bytes 4 bytes behind the end of out, the nearest tensor",
        "counted, program (0, 0, 0): atomic of 4 bytes 4 bytes behind the end of counter, the nearest tensor", "nothing True"]


@pytest.mark.long
@compiled
def test_validate_judges_the_kernels_without_a_gpu(folder):
    """As a user types it: no interpreter, no GPU."""
    done = subprocess.run([sys.executable, "runtime_ref/validate.py", str(folder), "--backend", "triton", "--tokens", "16",
                           "--prompts-per-domain", "2"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "verdict: passed" in done.stdout
