"""Peers of the expert kernel, measured where they are installed: OpenAI's triton_kernels, humming-kernels, FlashInfer.

A peer gets what our kernel gets: one layer of MXFP4 experts in checkpoint form, bf16 tokens, and the router's choices. It
gives what our kernel gives: gate and up, silu(gate) * up, down, the weighted sum. Weights are brought into the peer's own
layout once, on the GPU, and not timed. Products are the peer's, with the tiles that it chooses itself for the number of tokens.
What a peer leaves to the engine around it takes as few launches as it can: a clumsy caller must not win this comparison for us.

*Routing.* Our kernel derives its work list from the router's choices inside its launch. A peer wants a list made before: for
each expert its rows. `route` makes it, `compute` does the rest. Every peer is timed without `route`, which is in its favour;
one that brings kernels for it, which never wait for the host, is timed with them as well.

*Correct before fast.* Every number of tokens is compared with float32 before any is timed; a peer that is wrong or that raises
is reported in words and loses its speeds, and only they. What this cannot contain is a fault of the device itself (an illegal
address ends the process's CUDA context), so peers come last, after what was measured is on disk.

Rejected: vLLM or SGLang as the caller (gigabytes, and their versions pin torch's); kernels of ours for a peer's routing (then
its time would be ours to choose); activations in FP8 or MXFP8, which the peers offer (another result, another error).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from mxfp4.format import BLOCK_SIZE
from runtime_ref.kernels.experts import MAX_TOKENS
from runtime_ref.kernels.repack import ExpertPages, unpack_pages

# Codes and scales of a stack of matrices, as a checkpoint holds them.
Stack = tuple[torch.Tensor, torch.Tensor]

# Relative error (Frobenius) against float32 above which a peer counts as wrong. One that is right rounds to bf16 up to four
# times, by 2^-9 each (measured 3.5e-3); weights in a wrong order are off by about 1.
LIMIT = 2.0**-5
# Of a peer's time, for its checks: they compile, while a measurement takes a fraction of a second.
CHECKING = 0.8
# By which a peer refuses a call: what it raises, what its checks raise, what its compilers raise.
REFUSALS = (RuntimeError, TritonError, AssertionError, ValueError, TypeError, AttributeError, LookupError, ImportError, OSError)


class Peer(ABC):
    """One peer, and after `prepare` one layer.

    name: of the variant. package: as it is imported. routed: what `route` is when it is timed, "" where it never is.
    timed: what `compute` is.
    """

    name: str
    package: str
    routed: str
    timed: str

    @abstractmethod
    def prepare(self, gate_up: Stack, down: Stack, device) -> None:
        """The layer into the peer's layout, on `device`.

        Args:
            gate_up: (codes uint8 [E, 2 I, H / 2], scales uint8 [E, 2 I, H / 32]), gate rows first.
            down: (codes uint8 [E, H, I / 2], scales uint8 [E, H, I / 32]).
        """

    @abstractmethod
    def route(self, index: torch.Tensor):
        """The peer's work list for choices int32 [N, A]."""

    @abstractmethod
    def compute(self, x: torch.Tensor, weight: torch.Tensor, routes) -> torch.Tensor:
        """Bf16 [N, H] from tokens bf16 [N, H], weights float32 [N, A] and what `route` made; never waits for the host."""

    def call(self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What our kernel does in its launch."""
        return self.compute(x, weight, self.route(index))


def available() -> list[tuple[str, Peer | str]]:
    """Every variant of every peer by its name, or the reason why there is none."""
    from runtime_ref.measure.gpu_suite.peer_flashinfer import FlashInfer

    found = []
    for names, make in ((tuple(f"triton_kernels, {n} warps" for n in TritonKernels.WARPS), TritonKernels.variants),
                        (("humming",), Humming.variants), ((FlashInfer.name,), FlashInfer.variants)):
        try:
            found += [(peer.name, peer) for peer in make()]
        except ImportError as error:
            found += [(name, f"not importable: {error}") for name in names]
        except (RuntimeError, OSError, AttributeError) as error:  # of another triton, or without a compiler or driver it needs
            found += [(name, f"its import failed: {type(error).__name__}: {error}") for name in names]
    return found


def measure_peers(gate_up: Stack, down: Stack, inputs_of: Callable[[int], list], tokens_list: Iterable[int],
                  time_graph: Callable[[list], dict], reference: Callable[..., torch.Tensor],
                  peers: list[tuple[str, Peer | str]] | None = None, seconds_left: Callable[[], float] = lambda: 1e9,
                  done: Callable[[dict], None] = lambda report: None) -> dict:
    """Each peer's errors, then its times; or in words what it lacks.

    A peer has an equal share of what the ones before it left of the time, and compiles when it is first called: numbers of
    tokens that it does not come to are neither compared nor timed, and said to be skipped.

    Args:
        gate_up, down: see `Peer.prepare`; their device is where everything runs.
        inputs_of: number of tokens -> list of (x, index, weight), the calls of one measurement.
        time_graph: calls -> {"seconds": of one call, ...}; see `gpu_suite`.
        reference: (x, index, weight) -> float32 [N, H], on the same weights.
        peers: by default `available()`.
        seconds_left: until everything has to be done.
        done: is given the report after each peer.

    Returns:
        name -> {"missing": why}, or {"version", "timed": what is, "checks": [{"tokens", "error" (None: not finite)}],
        "sweep": [{"tokens", "seconds", ..., where routing can be timed "routed": {"what", "seconds", ...}}], "skipped": numbers
        of tokens that found no time, "refused": why there is no more, or None}.
    """
    peers = available() if peers is None else peers
    report = {name: {"missing": peer} for name, peer in peers if isinstance(peer, str)}
    there, problems = [(name, peer) for name, peer in peers if isinstance(peer, Peer)], {}
    for tokens in tokens_list if there else ():
        inputs = inputs_of(tokens)[0]
        problems[tokens] = inputs, reference(*inputs)
    for i, (name, peer) in enumerate(there):
        until = seconds_left() - CHECKING * seconds_left() / (len(there) - i)
        row = {"version": _version(peer.package), "timed": peer.timed, "checks": [], "sweep": [], "skipped": [],
               "refused": None}
        report[name] = row
        try:
            _measure_peer(peer, row, (gate_up, down), problems, inputs_of, time_graph, seconds_left, until)
        except REFUSALS as error:
            row["refused"] = f"{type(error).__name__}: {error}"
        finally:
            vars(peer).pop("layer", None)  # the next one needs the memory
        done(report)
    return report


def _measure_peer(peer: Peer, row: dict, weights: tuple[Stack, Stack], problems: dict, inputs_of, time_graph,
                  seconds_left: Callable[[], float], until: float) -> None:
    """Fills a peer's row. until: what `seconds_left` says when no further number of tokens is to be compared; what was compared
    by then is still timed, unless no time at all is left."""
    if seconds_left() > until:
        peer.prepare(*weights, weights[0][0].device)
    for tokens, (inputs, expected) in problems.items():
        if seconds_left() > until:
            row["checks"].append({"tokens": tokens, "error": _error(peer, inputs, expected)})
    row["refused"] = _wrong(row["checks"])
    for tokens in [check["tokens"] for check in row["checks"]]:
        if row["refused"] is None and seconds_left() > 0:
            row["sweep"].append({"tokens": tokens, **_time(peer, inputs_of(tokens), time_graph)})
    if row["refused"] is None:
        row["skipped"] = [tokens for tokens in problems if tokens not in [timed["tokens"] for timed in row["sweep"]]]


def against(sweep: list[dict], peers: dict) -> list[dict]:
    """Per number of tokens of both sweeps, ours and the fastest peer (without its routing), and peer's time over ours.

    Args:
        sweep: ours, rows with "tokens" and "seconds".
        peers: what `measure_peers` returns.
    """
    rows = []
    for own in sweep:
        times = [(row["seconds"], name) for name, peer in peers.items() for row in peer.get("sweep", ())
                 if row["tokens"] == own["tokens"]]
        if times:
            seconds, name = min(times)
            rows.append({"tokens": own["tokens"], "seconds": own["seconds"], "peer": name, "peer_seconds": seconds,
                         "ratio": seconds / own["seconds"]})
    return rows


def checkpoint_layer(pages: ExpertPages) -> tuple[Stack, Stack]:
    """What `repack_experts` made the pages of, as (gate_up, down) in checkpoint form on their device; expert by expert, because
    unpacking takes 16 times the room."""
    rows, up, down = pages.up.shape[1] * pages.up_tile.rows, [], []
    for expert in range(pages.experts):
        alternating = unpack_pages(pages.up[expert], pages.up_tile, rows, pages.hidden)
        up.append([t.unflatten(0, (-1, 2, 8)).transpose(0, 1).flatten(1, 2)[:, :pages.inner].flatten(0, 1)
                   for t in alternating])
        down.append(unpack_pages(pages.down[expert], pages.down_tile, pages.hidden, pages.inner))
    return tuple(torch.stack(t) for t in zip(*up, strict=True)), tuple(torch.stack(t) for t in zip(*down, strict=True))


def _error(peer: Peer, inputs: tuple, expected: torch.Tensor) -> float | None:
    """Relative error of the worse of two calls; None if not finite."""
    errors = []
    for _ in range(2):
        out = peer.call(*inputs).float()
        assert out.shape == expected.shape, f"{list(out.shape)}; expected {list(expected.shape)}"
        errors.append(float((out - expected).norm() / expected.norm()))
    return max(errors) if all(error < float("inf") for error in errors) else None


def _wrong(checks: list[dict]) -> str | None:
    words = [f"{check['tokens']} tokens: " + ("not finite" if check["error"] is None else f"{check['error']:.2e}")
             for check in checks if check["error"] is None or check["error"] > LIMIT]
    return f"wrong, relative error above {LIMIT:.2e}: {'; '.join(words)}" if words else None


def _time(peer: Peer, inputs: list, time_graph) -> dict:
    routes = [peer.route(index) for _, index, _ in inputs]
    row = time_graph([lambda i=i, r=r: peer.compute(i[0], i[2], r) for i, r in zip(inputs, routes, strict=True)])
    if peer.routed:
        row = row | {"routed": {"what": peer.routed, **time_graph([lambda i=i: peer.call(*i) for i in inputs])}}
    return row


def _version(package: str) -> str:
    """Of whatever distributions bring the package."""
    names = importlib.metadata.packages_distributions().get(package, [])
    return ", ".join(sorted({f"{name} {importlib.metadata.version(name)}" for name in names})) or "unknown"


@triton.jit
def weighted_sum_kernel(rows, weight, out, H, A: tl.constexpr, BLOCK: tl.constexpr):
    """Of rows bf16 [N, A, H] with weight float32 [N, A]: out bf16 [N, H]. Grid (N, H / BLOCK)."""
    token, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range(A):
        row = tl.load(rows + (token * A + a) * H + column, mask=column < H, other=0.0)
        total += tl.load(weight + token * A + a) * row.to(tl.float32)
    tl.store(out + token * H + column, total, mask=column < H)


def weighted_sum(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Bf16 [N, H]: each token's rows bf16 [N A, H] times weight float32 [N, A], summed in float32."""
    (N, A), H, block = weight.shape, rows.shape[-1], 512
    out = torch.empty((N, H), dtype=torch.bfloat16, device=rows.device)
    weighted_sum_kernel[(N, triton.cdiv(H, block))](rows, weight, out, H, A=A, BLOCK=block)
    return out


@triton.constexpr_function
def is_hip_gfx1250():
    """The one name of later tritons' target_info that triton_kernels imports and triton 3.6 lacks; on no CUDA device true."""
    return False


@triton.jit
def silu_times(rows):
    """silu(gate) * up of columns that alternate: gate, up, gate, up."""
    gate, up = tl.split(tl.reshape(rows, (rows.shape[0], rows.shape[1] // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * up


def import_triton_kernels() -> SimpleNamespace:
    """The names that the adapter calls.

    Raises:
        ImportError: the package is not installed, or is another of that name.
    """
    from triton.language import target_info
    from triton.runtime.jit import JITFunction

    if not hasattr(target_info, "is_hip_gfx1250"):
        target_info.is_hip_gfx1250 = is_hip_gfx1250
    for name in ("def_file_line_number", "def_file_col_number"):  # for error messages of later tritons
        if not hasattr(JITFunction, name):
            setattr(JITFunction, name, 1)
    from triton_kernels.matmul import FnSpecs, FusedActivation, PrecisionConfig, matmul
    from triton_kernels.tensor import FP4, convert_layout, make_ragged_tensor_metadata, wrap_torch_tensor
    from triton_kernels.tensor_details import layout
    from triton_kernels.topk import topk

    return SimpleNamespace(FnSpecs=FnSpecs, FusedActivation=FusedActivation, PrecisionConfig=PrecisionConfig, matmul=matmul,
                           FP4=FP4, convert_layout=convert_layout, wrap=wrap_torch_tensor, layout=layout,
                           ragged=make_ragged_tensor_metadata, topk=topk)


class TritonKernels(Peer):
    """OpenAI's triton_kernels, each with weights laid out for so many warps (its own benchmark takes 4 for few tokens, else 8).

    `compute` is three launches: gate-up with rows gathered by expert and SwiGLU in its epilogue, down with rows scattered back
    to (token, choice), and a weighted sum of ours (the package's `reduce` does not compile with triton 3.6). SwiGLU is a
    function of ours handed to the epilogue, because the package's own is silu(gate) * (up + 1).

    `route` is the package's, six launches: `topk` given the choices (what it would pick values of is blank), the sorted indices
    that its bit matrix yields, the ragged metadata; and one division by A for the gather.
    """

    WARPS = (4, 8)
    package = "triton_kernels"
    routed = "with triton_kernels' own metadata kernels, given the choices"
    timed = "gate-up with SwiGLU, down, weighted sum (ours); routing made before"

    def __init__(self, warps: int, names: SimpleNamespace | None = None):
        self.name, self.warps, self.names = f"triton_kernels, {warps} warps", warps, names or import_triton_kernels()

    @classmethod
    def variants(cls) -> list[Peer]:
        names = import_triton_kernels()
        return [cls(warps, names) for warps in cls.WARPS]

    def prepare(self, gate_up, down, device) -> None:
        E, rows = gate_up[0].shape[:2]
        paired = [t.to(device).unflatten(1, (2, rows // 2)).transpose(1, 2).reshape(E, rows, -1) for t in gate_up]
        swiglu = self.names.FusedActivation(self.names.FnSpecs("silu_times", silu_times, (), reduction_n=2), ())
        blank = torch.zeros((MAX_TOKENS, E), dtype=torch.bfloat16, device=device)
        self.layer = SimpleNamespace(up=self._weights(*paired), down=self._weights(*(t.to(device) for t in down)),
                                     swiglu=swiglu, blank=blank)

    def _weights(self, codes: torch.Tensor, scales: torch.Tensor):
        """The package's tensor [E, K, n] and the precision that holds its scales [E, K / 32, n]."""
        names = self.names
        values = names.convert_layout(names.wrap(codes.mT, dtype=names.FP4),
                                      names.layout.make_default_matmul_mxfp4_w_layout(mx_axis=-2))
        scale = names.convert_layout(names.wrap(scales.mT),
                                     names.layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=-2, num_warps=self.warps))
        return values, names.PrecisionConfig(b_mx_scale=scale, b_microblock_size=BLOCK_SIZE, out_dtype=torch.bfloat16)

    def route(self, index: torch.Tensor):
        N, A = index.shape
        chosen = self.names.topk(self.layer.blank[:N], A, apply_softmax=False, y_indx=index).mask_metadata
        ragged = self.names.ragged(chosen.col_sum, N * A)
        return SimpleNamespace(ragged=ragged, gather=chosen.col_sorted_indx // A, scatter=chosen.col_sorted_indx)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, routes) -> torch.Tensor:
        layer, matmul = self.layer, self.names.matmul
        up, down = layer.up, layer.down
        inner = matmul(x, up[0], None, a_ragged_metadata=routes.ragged, gather_indx=routes.gather, precision_config=up[1],
                       fused_activation=layer.swiglu)
        rows = matmul(inner, down[0], None, a_ragged_metadata=routes.ragged, scatter_indx=routes.scatter,
                      precision_config=down[1])
        return weighted_sum(rows, weight)


def aligned_slots(index: torch.Tensor, experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choices sorted by expert, every expert's rounded up to whole blocks.

    Returns:
        int32: assignment of each place, N A where there is none [places]; expert of each block [places / block]; the number
        of places in use, a scalar. As many places as any choices of that shape may need.
    """
    chosen = index.flatten().long()
    count = torch.zeros(experts, dtype=torch.int64, device=index.device).scatter_add_(0, chosen, torch.ones_like(chosen))
    blocks = -(-count // block)
    last = blocks.cumsum(0)
    most = min(index.numel(), experts + index.numel() // block)
    order = chosen.argsort(stable=True)
    expert = chosen[order]
    within = torch.arange(index.numel(), device=index.device) - (count.cumsum(0) - count)[expert]
    slots = torch.full((most * block,), index.numel(), dtype=torch.int32, device=index.device)
    slots[(last - blocks)[expert] * block + within] = order.int()
    owner = torch.searchsorted(last, torch.arange(most, device=index.device), right=True).clamp_(max=experts - 1)
    return slots, owner.int(), (last[-1] * block).int()


def import_humming() -> SimpleNamespace:
    """The names that the adapter calls.

    Raises:
        ImportError: the package or one that it needs is not installed.
    """
    os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")  # its import would start a process of its own
    from humming import dtypes, ops
    from humming.forward import humming_forward
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_and_transform_humming_tensors
    from humming.tune import get_heuristics_config

    return SimpleNamespace(dtypes=dtypes, ops=ops, forward=humming_forward, Schema=HummingWeightSchema,
                           transform=prepare_and_transform_humming_tensors, heuristics=get_heuristics_config)


class Humming(Peer):
    """humming-kernels with its indexed grouped product, which reads rows where they lie; compiled when first called.

    `compute` is four launches: gate-up, humming's input kernel for silu(gate) * up, down, and a weighted sum of ours, which
    humming leaves to the engine. Tiles are those its heuristics choose for the number of assignments.

    `route` is made of torch's operations and never timed: humming leaves it to the engine, too.
    """

    name, package, routed = "humming", "humming", ""
    timed = "gate-up, SwiGLU, down, weighted sum (ours); routing made before"
    INDEXED = {"gemm_type": "indexed"}

    def __init__(self, names: SimpleNamespace | None = None):
        self.names = names or import_humming()

    @classmethod
    def variants(cls) -> list[Peer]:
        return [cls()]

    def prepare(self, gate_up, down, device) -> None:
        schema = self.names.Schema(b_dtype=self.names.dtypes.float4e2m1, bs_dtype=self.names.dtypes.float8e8m0,
                                   weight_scale_group_size=BLOCK_SIZE)
        products = []
        for codes, scales in (gate_up, down):
            E, n, half = codes.shape
            config, tensors = self.names.transform(
                {"weight": codes.to(device).view(torch.int32), "weight_scale": scales.to(device).view(torch.float8_e8m0fnu)},
                shape_n=n, shape_k=2 * half, weight_schema=schema, num_experts=E, torch_dtype=torch.bfloat16, device=device)
            locks = torch.zeros(2048, dtype=torch.int32, device=device)
            products.append(SimpleNamespace(config=config, tensors=tensors, locks=locks, tiles={}, n=n))
        self.layer = SimpleNamespace(products=products, experts=gate_up[0].shape[0], device=torch.device(device))

    def _tiles(self, product, assignments: int) -> dict:
        if assignments not in product.tiles:
            product.tiles[assignments] = self.names.heuristics(product.config, shape_m=assignments, device=self.layer.device,
                                                               **self.INDEXED)
        return product.tiles[assignments]

    def route(self, index: torch.Tensor) -> list:
        """Per product: its places, whose blocks are as tall as its tiles."""
        tall = [self._tiles(product, index.numel())["block_shape"][0] for product in self.layer.products]
        made = {block: aligned_slots(index, self.layer.experts, block) for block in set(tall)}
        return [made[block] for block in tall]

    def compute(self, x: torch.Tensor, weight: torch.Tensor, routes) -> torch.Tensor:
        N, A = weight.shape
        up, down = self.layer.products
        gate_up = self._product(up, x, routes[0], N, A, A)
        inner = self.names.ops.process_input(gate_up, activation_type="binary_split",
                                             activation_impl="a / (1.0f + __expf(-a)) * b")[0]
        rows = self._product(down, inner, routes[1], N, A, 1)
        return weighted_sum(rows, weight)

    def _product(self, product, x: torch.Tensor, routes, N: int, A: int, top_k: int) -> torch.Tensor:
        """Bf16 [N A, n]; row r of it is of row r / top_k of x."""
        slots, owner, used = routes
        out = torch.empty((N * A, product.n), dtype=torch.bfloat16, device=x.device)
        return self.names.forward(product.config, x, product.tensors["weight"], product.tensors["weight_scale"], outputs=out,
                                  sorted_ids=slots, expert_ids=owner, num_tokens_padded=used, locks=product.locks, top_k=top_k,
                                  valid_shape_m=N * A, compute_config=json.dumps(self.INDEXED),
                                  tuning_config=json.dumps(self._tiles(product, N * A)))
