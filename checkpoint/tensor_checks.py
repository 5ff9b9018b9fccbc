"""What is asked of every tensor of a checkpoint: read from disk once, by as many threads as there are cores.

    checksum      CRC-32 as recorded when the tensor was written
    values        finite floats, scale bytes in range, blocks as the scale rule leaves them
    training      contract C2: experts decode to the trained weights, bit for bit; all other tensors are the trained ones

Codes and their scales are read together. Reading, hashing and arithmetic on whole chunks let other threads go on meanwhile, so
threads do as well as processes would and share the tables. Tensors are taken in the order of the files, and a file's own
SHA-256 is made while its tensors are read: a disk reads it once.

Memory: a thread holds one matrix, what was trained in its place, and scratch. Two tensors above 256 MiB (embeddings, fused
experts of gpt-oss) are held at a time, however many threads there are.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import torch

from checkpoint.contradictions import difference
from checkpoint.findings import DAMAGE
from checkpoint.inventory import block_faults, scale_name, tensor_faults
from checkpoint.tensor_files import TensorFiles
from checkpoint.trained import Weights, decoded_expert
from mxfp4.exact_pack import decodes_to, unpack
from mxfp4.format import BLOCK_SIZE
from storage.reading import first_line

LARGE = 256 << 20
# Threads beyond these wait for memory and disk, and each may hold two matrices.
MOST_THREADS = 8


def usable_cores() -> int:
    """Threads that can work at once: the cores this process may use, at most 8."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, MOST_THREADS)


@dataclass
class Report:
    """Of one tensor with its scales: findings, experts compared with training, and why that could not be done."""

    findings: list[tuple[str, str]] = field(default_factory=list)  # (kind, text)
    experts: int = 0
    incomparable: str | None = None


class TensorChecks:
    """Checks of the tensors of one source; `report` may be called by several threads.

    Attributes:
        sums: CRC-32 (hex) by name; rule: the scale rule whose blocks are expected (None: even).
        promised: every tensor has a sum. zero_norms: norms may be zero (families that scale by 1 + weight).
        weights: what the tensors must equal, None = nothing to compare with.
        mask_row: row of the embedding that was not trained, if there is one.
    """

    def __init__(self, source: TensorFiles, layout: str, sums: dict[str, str], rule: str | None, *,
                 promised: bool = True, zero_norms: bool = False):
        self.source, self.layout, self.sums, self.rule, self.promised = source, layout, sums, rule, promised
        self.zero_norms = zero_norms
        self.weights: Weights | None = None
        self.mask_row: int | None = None
        self._large = threading.BoundedSemaphore(2)

    def units(self) -> list[tuple[str, ...]]:
        """Names of the tensors that are checked together, as they stand on disk: codes with their scales, others alone."""
        infos = self.source.infos
        scales = {name: scale for name in infos if (scale := scale_name(self.layout, name)) in infos}
        paired = set(scales.values())
        return [(name, scales[name]) if name in scales else (name,) for name in self.source.in_order() if name not in paired]

    def report(self, names: tuple[str, ...]) -> Report:
        """Reads a tensor (and its scales) and checks all there is to check."""
        report = Report()
        with self._large if self.source.bytes_of(names[0]) > LARGE else contextlib.nullcontext():
            tensors = [self._read(name, report) for name in names]
            if tensors[0] is not None and tensors[-1] is not None:
                self._check(names, tensors, report)
        return report

    def _read(self, name: str, report: Report) -> torch.Tensor | None:
        try:
            tensor = self.source.read(name)
            data = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
            if name not in self.sums and (self.sums or self.promised):
                report.findings.append(("checksum", f"{name}: no checksum in checksums.json"))
            elif self.sums and f"{zlib.crc32(data):08x}" != self.sums[name]:
                report.findings.append(("checksum", f"{name}: bytes changed since the export (CRC-32 differs)"))
            report.findings += [(kind, f"{name}: {fault}") for kind, fault in tensor_faults(
                name, tensor, zero_norms=self.zero_norms)]
        except DAMAGE as error:
            report.findings.append(("file", f"{name}: cannot be read: {first_line(error)}"))
            return None
        return tensor

    def _check(self, names: tuple[str, ...], tensors: list[torch.Tensor], report: Report) -> None:
        name, tensor, codes = names[0], tensors[0], len(names) == 2
        if codes and tensor.dtype in (torch.uint8, torch.int8):
            try:
                report.findings += [("blocks", f"{name}: {fault}") for fault in block_faults(
                    tensor.view(torch.uint8), tensors[1], self.rule or "even")]
            except DAMAGE as error:
                report.findings.append(("shape", f"{name}: blocks cannot be checked: {first_line(error)}"))
        weights = self.weights
        if weights is None:
            return
        try:
            if not codes and name in weights.names.experts:
                report.findings += [("training", text) for text in _unequal(name, tensor, decoded_expert(weights, name))]
                report.experts += 1
                return
            if not codes and name in weights.names.fused:
                for e, own in enumerate(tensor.mT if weights.names.fused[name].axis == 1 else tensor):
                    expected = decoded_expert(weights, f"{name}[{e}]")
                    report.findings += [("training", text) for text in _unequal(f"{name}[{e}]", own, expected)]
                    report.experts += 1
                return
            if not codes:
                found = difference(name, tensor, self.source, weights, self.mask_row)
                report.findings += [("training", text) for text in found]
                return
            for expert, matrix, scales in self._experts(name, tensor.view(torch.uint8), tensors[1]):
                report.findings += [("training", text) for text in expert_difference(
                    expert, matrix, scales, decoded_expert(weights, expert))]
                report.experts += 1
        except DAMAGE as error:
            report.incomparable = first_line(error)

    def _experts(self, name: str, codes: torch.Tensor, scales: torch.Tensor) -> Iterator[tuple]:
        """(published name, codes [out, in / 2], scales) of every expert matrix; "<fused>[e]" for gpt-oss."""
        if self.layout != "gpt-oss":
            yield name.removesuffix("_packed"), codes, scales
            return
        for e in range(codes.shape[0]):
            yield f"{name.removesuffix('_blocks')}[{e}]", codes[e].flatten(-2), scales[e]


def expert_difference(name: str, codes: torch.Tensor, scales: torch.Tensor, expected: torch.Tensor) -> Iterator[str]:
    """Where codes and scales do not decode to `expected` (bf16), bit for bit."""
    shape = [*codes.shape[:-1], 2 * codes.shape[-1]]
    if list(expected.shape) != shape:
        yield f"{name}: decodes to {shape}, trained {list(expected.shape)}"
    elif scales.dtype != torch.uint8 or scales.numel() * BLOCK_SIZE != expected.numel():
        yield f"{name}: {scales.dtype} scales {list(scales.shape)} decode nothing of shape {shape}"
    elif not decodes_to(codes, scales, expected):
        yield from _unequal(name, unpack(codes, scales), expected)


def _unequal(name: str, ours: torch.Tensor, expected: torch.Tensor) -> Iterator[str]:
    """Where bf16 values are not those of training, bit for bit."""
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        yield f"{name}: {ours.dtype} {list(ours.shape)}, trained {expected.dtype} {list(expected.shape)}"
        return
    off = (expected.contiguous().view(torch.int16) != ours.contiguous().view(torch.int16)).nonzero()
    if off.numel():
        yield (f"{name}: {off.shape[0]} of {expected.numel()} weights differ from training (contract C2), the first at "
               f"{off[0].tolist()}: {float(ours[tuple(off[0])]):.6g}, trained {float(expected[tuple(off[0])]):.6g}")


def side_by_side(pool: Executor, work: Callable, items: Iterable, ahead: int) -> Iterator:
    """`work` of each item, in their order, by the threads of a pool; at most `ahead` results are waiting."""
    waiting: collections.deque[Future] = collections.deque()
    for item in items:
        if len(waiting) == ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(work, item))
    while waiting:
        yield waiting.popleft().result()
