"""The checks of `bench.py --suite gpu`, on the GPU that is to be measured, and the cases that checks and measurements share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache

import torch

from mxfp4 import dequantize, quantize
from mxfp4.format import BLOCK_SIZE
from mxfp4.mxfp8 import dequantize_mxfp8, quantize_mxfp8
from runtime_ref.backends.torch.ops import attend_pages
from runtime_ref.kernels.attention import PAGE, attend
from runtime_ref.kernels.experts import Launch, Workspace, run_experts
from runtime_ref.kernels.mxfp4_decode import decode_kernel
from runtime_ref.kernels.repack import MAX_SCALE_BYTE, ExpertPages, Tile, pack_pages, repack_experts, unpack_pages
from runtime_ref.measure.gpu_suite import steps as gpu_steps
from runtime_ref.measure.gpu_suite.plan import Plan, checked, kept

# Relative error (Frobenius) against float32: see EXPERTS_KERNEL in the tests' tolerances.
TOLERANCE = 2.0**-8
VARIANT_SECONDS = 10  # of a launch variant's check, which is mostly its compilation


def up_tiles() -> list[Tile]:
    """Pages to compare: decoded ones, and hw_fp4 ones where tensor cores read E2M1 (they round activations to MXFP8)."""
    hw_fp4 = torch.cuda.get_device_capability()[0] == 10
    return [Tile(), Tile(128, 256), *([Tile(128, 256, hw_fp4=True)] if hw_fp4 else [])]


def down_tile(up: Tile) -> Tile:
    """Of the down projection, beside `up`."""
    return up if up.hw_fp4 else Tile()


def launches(count: int, page_rows: int) -> list[Launch]:
    """Launch variants for a GPU with `count` multiprocessors and pages of so many rows, the expected one first."""
    plain = Launch(programs=4 * count)
    # Eight warps need eight times 16 rows, or each decodes what another has decoded.
    wide = [replace(plain, warps=8, programs=2 * count)] if page_rows >= 128 else []
    return [plain, replace(plain, programs=3 * count), replace(plain, programs=2 * count), replace(plain, stages=4),
            replace(plain, stages=2), replace(plain, chunk_tiles=2), replace(plain, chunk_tiles=8), replace(plain, prefetch=0),
            replace(plain, ahead=4096), replace(plain, packed=False), replace(plain, tickets=False, programs=3 * count), *wide]


def dispatches(launch: Launch, count: int) -> dict[str, Launch]:
    """Ways to hand out the work of a call, of which the best depends on the number of tokens: tickets or a static order of
    slots that tokens share, and a slot for every choice."""
    resident = min(launch.programs, 3 * count)  # of a cooperative launch
    return {"tickets": replace(launch, tickets=True, packed=True),
            "static": replace(launch, tickets=False, packed=True, programs=resident),
            "a slot a choice": replace(launch, tickets=True, packed=False)}


def variants(count: int) -> list[tuple[Tile, Launch]]:
    """Everything that is compared, pages by pages."""
    return [(tile, launch) for tile in up_tiles() for launch in launches(count, tile.rows)]


def words(tile: Tile, launch: Launch) -> str:
    """What a variant is called."""
    sizes = ", ".join(f"{key} {value}" for key, value in asdict(launch).items() if key not in ("ptx", "float_dot", "polls"))
    return f"{tile.rows} rows{', hw_fp4' if tile.hw_fp4 else ''}, {sizes}"


def random_weights(experts: int, hidden: int, inner: int):
    """((codes, scales) of gate and up [experts, 2 * inner, hidden], the same of down [experts, hidden, inner]) on the host."""
    generator = torch.Generator().manual_seed(1)
    return (quantize(torch.randn(experts, 2 * inner, hidden, generator=generator) * hidden**-0.5),
            quantize(torch.randn(experts, hidden, inner, generator=generator) * inner**-0.5))


def random_tokens(tokens: int, hidden: int, experts: int, choices: int, seed: int, device):
    """x bfloat16 [tokens, hidden]; index int32 and weight float32 [tokens, choices], distinct experts for a token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
    index = torch.stack([torch.randperm(experts, generator=generator)[:choices] for _ in range(tokens)]).to(torch.int32)
    return x.to(device), index.to(device), torch.rand(tokens, choices, generator=generator).to(device)


def check_kernels(plan: Plan, refused: dict[str, str]) -> Iterator[dict]:
    """Correctness on the GPU, check by check: decoding bit for bit, the experts against float32, invariance of bits, whole
    steps; last the launch variants, while there is time for them.

    Args:
        refused: is told, by its `words`, why a variant is not to be measured. A variant is there to be compared: one that this
            card cannot launch makes nothing red. What a backend launches by default must pass.
    """
    count = torch.cuda.get_device_properties(0).multi_processor_count
    weights = random_weights(5, 6144, 256)

    @cache
    def of(tile: Tile) -> ExpertPages:
        return repack_experts(*weights, up_tile=tile, down_tile=down_tile(tile)).to("cuda")

    def needed(tile: Tile, launch: Launch) -> bool:
        return launch == Launch(programs=4 * count) and (tile == Tile() or tile.hw_fp4)

    yield from checked("decoding equals the codec", _check_decoding)
    for tile, launch in variants(count):
        if needed(tile, launch):
            name = f"6144-256, {words(tile, launch)}"
            yield from checked(f"experts {name}", lambda n=name, t=tile, l=launch: check_experts(
                n, of(t), l, (1, 7, 8, 9, 63, 64)))
    yield from checked("experts 160-96", lambda: check_experts(
        "160-96", repack_experts(*random_weights(4, 160, 96), up_tile=Tile(64, 128), down_tile=Tile(32, 64)).to("cuda"),
        Launch(programs=count), (1, 8, 64)))
    for window in (None, 128):
        yield from checked(f"attention, window {window}", lambda w=window: check_attention(w, "cuda"))
    yield from checked("fused fake quantization equals the reference", lambda: gpu_steps.check_fake_quantize("cuda"))
    yield from checked("steps", lambda: gpu_steps.check_steps("cuda", count))
    for tile, launch in variants(count):
        name, why = words(tile, launch), []
        if needed(tile, launch):
            continue
        if plan.seconds_left() < VARIANT_SECONDS:
            refused[name] = "not checked: no time"
            continue
        found = kept(lambda n=name, t=tile, l=launch: check_experts(f"6144-256, {n}", of(t), l, (8,)), name, why)
        if why:
            refused[name] = why[0].removeprefix(f"{name}: ")
        yield from found or ()


def _check_decoding() -> dict:
    """All 16 codes under all allowed scale bytes, on the hardware's own bf16 products (subnormals included)."""
    tile, count = Tile(16, 64), MAX_SCALE_BYTE + 1
    element = (torch.arange(tile.depth)[None] + torch.arange(tile.rows)[:, None]) % 16
    codes = (element[:, 0::2] | element[:, 1::2] << 4).to(torch.uint8).expand(count, -1, -1).contiguous()
    scales = torch.arange(count, dtype=torch.uint8)[:, None, None].expand(-1, tile.rows, tile.depth // BLOCK_SIZE).contiguous()
    out = torch.full((2, count, tile.rows, tile.depth // 2), float("nan"), device="cuda")
    decode_kernel[(count,)](pack_pages(codes, scales, tile).cuda(), out[0], out[1], ROWS=tile.rows, DEPTH=tile.depth, PTX=True)
    expected = dequantize(codes, scales, dtype=torch.float32)
    wrong = int((torch.cat((out[0], out[1]), -1).cpu().view(torch.int32) != expected.view(torch.int32)).sum())
    return {"name": "decoding equals the codec", "passed": wrong == 0, "detail": f"{wrong} of {expected.numel()} values differ"}


def reference(x, index, weight, pages: ExpertPages) -> torch.Tensor:
    """Float32 experts on a shard's pages, expert by expert, between rounded activations where pages are hw_fp4; the kernel's
    oracle here, where shards are too big to copy."""
    def entering(rows: torch.Tensor) -> torch.Tensor:
        return dequantize_mxfp8(*quantize_mxfp8(rows)) if pages.hw_fp4 else rows

    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in index.unique().tolist():
        token, choice = (index == expert).nonzero(as_tuple=True)
        rows = pages.up.shape[1] * pages.up_tile.rows
        up = dequantize(*unpack_pages(pages.up[expert], pages.up_tile, rows, pages.hidden), dtype=torch.float32)
        gate, up = up.unflatten(0, (-1, 2, 8)).unbind(1)
        down = dequantize(*unpack_pages(pages.down[expert], pages.down_tile, pages.hidden, pages.inner), dtype=torch.float32)
        rows_x = entering(x[token].float())
        hidden = entering(torch.nn.functional.silu(rows_x @ gate.flatten(0, 1).T) * (rows_x @ up.flatten(0, 1).T))
        out.index_add_(0, token, weight[token, choice][:, None] * (hidden[:, :pages.inner] @ down.T))
    return out


def check_experts(name: str, pages: ExpertPages, launch: Launch, token_counts) -> list[dict]:
    """Error against float32, a second call on the same scratch, and one row against the same row among others."""
    checks, device = [], pages.up.device
    torch.backends.cuda.matmul.allow_tf32 = False
    for tokens in token_counts:
        x, index, weight = random_tokens(tokens, pages.hidden, pages.experts - 1, 3, tokens, device)
        space = Workspace(pages, tokens, 3, launch)
        space.inner.fill_(0x7F if pages.hw_fp4 else float("nan"))
        space.partial.fill_(float("nan"))
        first, again = (run_experts(x, index, weight, pages, space, torch.full_like(x, float("nan"), dtype=torch.float32))
                        for _ in range(2))
        alone = run_experts(x[-1:].contiguous(), index[-1:].contiguous(), weight[-1:].contiguous(), pages, space,
                            torch.empty((1, pages.hidden), device=device))
        expected = reference(x, index, weight, pages)
        error = float((first - expected).norm() / expected.norm())
        failed = space.failed()
        same = torch.equal(first, again) and torch.equal(first[-1:], alone)
        checks.append({"name": f"experts {name}, {tokens} tokens", "passed": error < TOLERANCE and same and not failed,
                       "detail": f"relative error {error:.2e}, repeated and single-row bits {'equal' if same else 'DIFFER'}"
                                 f"{', a wait was given up' if failed else ''}"})
    return checks


def check_attention(window: int | None, device: str, **options) -> dict:
    """Two blocks of one of eight ranks' heads against the torch attention, and rows alone against rows among eight."""
    heads, d, v, ends = 16, 192, 128, (1500, 333)
    generator = torch.Generator().manual_seed(2)
    size = (sum(ends) // PAGE + len(ends)) * PAGE
    q = (torch.randn(heads, 16, d, generator=generator) * d**-0.5).to(torch.bfloat16)
    keys, values = (torch.randn(1, size, width, generator=generator).to(torch.bfloat16) for width in (d, v))
    sink = None if window is None else torch.randn(heads, generator=generator)
    pages, firsts, expected = [], [], []
    for i, end in enumerate(ends):
        first = 0 if window is None else max(0, end - 8 - window + 1) // PAGE
        held = torch.arange(first, -(-end // PAGE)) + (0 if i == 0 else -(-ends[0] // PAGE))
        query, there = torch.arange(end - 8, end)[:, None], torch.arange(first * PAGE, (first + len(held)) * PAGE)[None]
        seen = (there <= query) if window is None else (there <= query) & (there > query - window)
        hidden = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).view(1, 8, len(held), PAGE).transpose(1, 2)
        own = (store.float().view(1, -1, PAGE, store.shape[2])[:, held] for store in (keys, values))
        rows = q[:, 8 * i:8 * i + 8].float().reshape(1, 1, 1, heads * 8, d)
        expected.append(attend_pages(rows, *own, hidden, sink).view(heads, 8, v))
        pages.append(held.tolist())
        firsts.append(first)

    def run(blocks):
        """Blocks are (sequence, first row, rows)."""
        width = max(map(len, pages))
        columns = [[pages[i] + [0] * (width - len(pages[i])) for i, _, _ in blocks], [firsts[i] for i, _, _ in blocks],
                   [ends[i] - 8 + r for i, r, _ in blocks], [n for *_, n in blocks], [8 * i + r for i, r, _ in blocks]]
        tables = (torch.tensor(c, dtype=torch.int32, device=device) for c in columns)
        out = torch.full((heads, 16, v), float("nan"), device=device)
        moved = (t if t is None else t.to(device) for t in (q, keys, values, sink))
        return attend(*moved, *tables, rows=8, window=window, longest=max(ends), out=out, **options).cpu()

    out, whole = run([(0, 0, 8), (1, 0, 8)]), torch.cat(expected, 1)
    error = float((out - whole).norm() / whole.norm())
    same = all(torch.equal(run([(i, r, 1)])[:, 8 * i + r], out[:, 8 * i + r]) for i, r in ((0, 0), (0, 7), (1, 3)))
    return {"name": f"attention, {f'window {window} with sinks' if window else 'all positions'}",
            "passed": error < TOLERANCE and same,
            "detail": f"relative error {error:.2e}, single-row bits {'equal' if same else 'DIFFER'}"}
