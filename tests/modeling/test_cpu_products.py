"""bf16 products by way of float32: rounded once, float32 untouched. In a process of its own: torch's kernels are replaced."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = '''
import torch
import torch.nn.functional as F

torch.manual_seed(0)
shapes = [((5, 64), (64, 7)), ((1, 3), (3, 1)), ((0, 8), (8, 4)), ((6, 0), (0, 4)), ((33, 96), (96, 65))]
pairs = [(torch.randn(a), torch.randn(b)) for a, b in shapes]
strided = [(torch.randn(64, 5).T, torch.randn(9, 64).T), (torch.randn(10, 64)[::2], torch.randn(64, 18)[:, ::2])]


def all_products(a, b):
    bias, rows = torch.linspace(-1, 1, b.shape[1]).to(a.dtype), torch.linspace(-1, 1, a.shape[0]).to(a.dtype)[:, None]
    wide_a, wide_b = a.expand(3, *a.shape), b.expand(3, *b.shape)
    return [a @ b, torch.bmm(wide_a, wide_b), torch.addmm(bias, a, b), torch.addmm(rows, a, b, beta=0.5, alpha=-2),
            F.linear(a, b.T, bias), F.linear(a, b.T), torch.baddbmm(bias.expand(3, a.shape[0], -1), wide_a, wide_b, beta=2),
            torch.mm(a, b, out=torch.empty(a.shape[0], b.shape[1], dtype=a.dtype)), torch.einsum("ik,kj->ij", a, b)]


def with_gradients(a, b):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    (F.linear(a, b.T) * 3).sum().backward()
    return [a.grad, b.grad]


before = [all_products(a, b) + with_gradients(a, b) for a, b in pairs + strided]
slow = [all_products(a.bfloat16(), b.bfloat16()) for a, b in pairs + strided]
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False
from modeling.cpu_products import speed_up_bf16_products
assert speed_up_bf16_products() and speed_up_bf16_products()
for (a, b), floats, halves in zip(pairs + strided, before, slow, strict=True):
    assert all(torch.equal(x, y) for x, y in zip(all_products(a, b) + with_gradients(a, b), floats, strict=True))
    a, b = a.bfloat16(), b.bfloat16()
    exact = all_products(a.double(), b.double())
    for ours, theirs, right in zip(all_products(a, b), halves, exact, strict=True):
        assert ours.dtype is torch.bfloat16 and ours.shape == theirs.shape and ours.is_contiguous()
        size = float(right.abs().max()) if right.numel() else 0.0
        assert ours.numel() == 0 or (ours.double() - right).abs().max() <= size * 2 ** -8, (ours, right)
    for ours, right in zip(with_gradients(a, b), with_gradients(a.double(), b.double()), strict=True):
        assert ours.dtype is torch.bfloat16
        assert ours.numel() == 0 or (ours.double() - right).abs().max() <= right.abs().max() * 2 ** -8
assert torch.equal(torch.arange(6).view(2, 3) @ torch.arange(3).view(3, 1), torch.tensor([[5], [14]]))
x, w = torch.randn(8, 6).bfloat16(), torch.randn(6, 7).bfloat16()
for out in (torch.empty(0, dtype=torch.bfloat16), torch.empty(7, 8, dtype=torch.bfloat16).T):
    assert torch.equal(torch.mm(x, w, out=out), x @ w) and out.shape == (8, 7)
x, w = torch.randn(2, 3), torch.randn(3, 5)
try:
    torch.mm(x, torch.tensor(1.0))
except RuntimeError as error:
    assert "2-D" in str(error) or "2D" in str(error) or "matri" in str(error), error
for a, b, word in [(x.bfloat16(), w[:2].bfloat16(), "shape"), (x.bfloat16(), w, "dtype"), (x, w.bfloat16(), "dtype")]:
    for product in (torch.mm, lambda x, y: torch.addmm(torch.zeros(5, dtype=x.dtype), x, y)):
        try:
            product(a, b)
        except RuntimeError as error:
            assert word in str(error), error
        else:
            raise AssertionError(f"multiplied: {a.dtype} {a.shape}, {b.dtype} {b.shape}")
'''


def test_products_are_rounded_once_and_everything_else_is_torchs_own():
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
