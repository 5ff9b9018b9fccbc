"""Float32 masters out of a raw DeepSpeed checkpoint (ZeRO 1, 2 or 3), tensor by tensor, without DeepSpeed.

    <tag>/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt     one per rank: its part of the float32 masters, and the moments
    <tag>/mp_rank_00_model_states.pt                             ZeRO 1 and 2: shapes, buffers, frozen and compute weights
    <tag>/zero_pp_rank_<r>_mp_rank_00_model_states.pt            ZeRO 3: the same per rank, frozen weights in fragments

`<tag>` is `global_step<n>`, or `pytorch_model` within what Accelerate's `save_state` writes; `latest` beside it names it.

ZeRO 1 and 2 lay the parameters of one optimizer group end to end, with padding, and cut the whole evenly, so that a tensor
may run over from one rank into the next. The files say where each rank's piece lies (`param_slice_mappings`); these maps are
followed, because with `round_robin_gradients` the order is not that of the shapes. ZeRO 3 cuts every tensor by itself into
ceil(n / ranks) values a rank, and lays a rank's pieces end to end over all groups.

How it is read. The pickles are loaded with `weights_only` under FakeTensorMode: no storage is touched, every tensor knows its
place in the file, and classes of DeepSpeed, which only describe loss scaling and the like, become empty records. Values are
then read from the files directly, the pieces of one tensor (or of some rows of one expert) at a time.

Rejected: importing DeepSpeed (gathers the model, needs its version and a compiler); unpickling freely (a checkpoint could run
code); mapping the files (their pages count as this process's memory for as long as they stay mapped).

Layout: DeepSpeed 0.19 as written by two ranks, and its own zero_to_fp32.py read for the older versions without maps.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.pickles import UNREADABLE, require_stored
from checkpoint.sources import DTYPE_NAMES, DTYPES, LastFile, Source
from storage.reading import first_line, require_file
from storage.terminal import counted

OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")


@dataclass(frozen=True)
class Piece:
    """`count` consecutive values in a file, the first at byte `start`."""

    path: Path
    start: int
    count: int


class Record:
    """What a class of DeepSpeed becomes when it is read: the arguments and the state it was pickled with."""

    def __new__(cls, *arguments):  # a pickle may leave __init__ out
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


class ZeroSource(Source):
    """A raw DeepSpeed checkpoint; trained tensors are float32 masters, frozen ones and buffers have the dtype they had.

    `masters` is the dtype in which the forward pass saw the masters.
    """

    def __init__(self, folder: Path):
        """Raises ValueError: ranks missing, damaged files, expert or tensor parallel shards, an unknown layout."""
        self.tag = folder
        optimizer, model = _rank_files(folder, OPTIMIZER), _rank_files(folder, MODEL)
        if not model:
            raise ValueError(f"{folder}: no *_model_states.pt beside the optimizer's shards")
        self._states = [_load(path) for path in model]
        self._pieces: dict[str, list[Piece]] = {}
        self._last = LastFile()
        infos: dict[str, tuple[tuple[int, ...], str]] = {}
        first = self._states[0]
        if any("autoep" in key and value for key, value in first.items()):
            raise ValueError(f"{folder}: experts divided among ranks by DeepSpeed itself; only data parallel shards are read")
        shards = [_part(path, _load(path), "optimizer_state_dict") for path in optimizer]
        stage = _stage(optimizer[0], shards[0])
        groups = _part(model[0], first, "param_shapes")
        self._check_ranks(optimizer, shards, stage)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        parts = [[Piece(path, _place(t), t.numel()) for t in _part(path, shard, key)]
                 for path, shard in zip(optimizer, shards, strict=True)]
        shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        self._pieces = (_cut_each if stage == 3 else _cut_groups)(folder, groups, parts, shards)
        infos |= {name: (shape, "F32") for name, shape in shapes.items()}
        infos |= self._frozen(model, stage)
        for name, owner in (first.get("shared_params") or {}).items():
            if owner in infos:
                infos[name], self._pieces[name] = infos[owner], self._pieces[owner]
        super().__init__(folder, infos)
        self.masters = next((t.dtype for n, t in _part(model[0], first, "module").items() if n in shapes), torch.float32)
        self._states.clear()

    def _check_ranks(self, files: list[Path], shards: list[dict], stage: int) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"{files[0]}: ZeRO stage {stage}, expected 1, 2 or 3")
        count = _part(files[0], shards[0], "partition_count")
        ranks = max(count) if isinstance(count, list) else count
        if ranks != len(files):
            raise ValueError(f"{self.tag}: written by {counted(ranks, 'rank')}, {len(files)} *_optim_states.pt are there")
        if stage == 3 and len(self._states) != ranks:
            raise ValueError(f"{self.tag}: written by {counted(ranks, 'rank')}, {len(self._states)} *_model_states.pt are "
                             "there")
        if isinstance(count, list) and len(set(count)) > 1:
            raise ValueError(f"{self.tag}: groups of parameters over {sorted(set(count))} ranks (expert parallel); only data "
                             "parallel shards are read")

    def _frozen(self, files: list[Path], stage: int) -> dict:
        """Tensors without a master: frozen parameters, and buffers; fills in their pieces."""
        infos = {}
        module, buffers = _part(files[0], self._states[0], "module"), set(self._states[0].get("buffer_names") or ())
        for name, tensor in module.items():
            if name not in self._pieces and (stage < 3 or name in buffers):
                infos[name] = tuple(tensor.shape), DTYPE_NAMES[tensor.dtype]
                self._pieces[name] = [Piece(files[0], _place(tensor), tensor.numel())]
        if stage < 3:  # the module holds them whole
            return infos
        for name, shape in (self._states[0].get("frozen_param_shapes") or {}).items():
            fragments = [_part(path, state, "frozen_param_fragments")[name]
                         for path, state in zip(files, self._states, strict=True)]
            pieces = [Piece(path, _place(t), t.numel()) for path, t in zip(files, fragments, strict=True)]
            infos[name] = tuple(shape), DTYPE_NAMES[fragments[0].dtype]
            self._pieces[name] = _first(self.tag, name, pieces, math.prod(shape))
        return infos

    def read(self, name: str) -> torch.Tensor:
        if name not in self.infos:
            raise self._missing(name)
        return self._read(name, self.infos[name][0], 0)

    def read_rows(self, name: str, expert: int, rows: slice) -> torch.Tensor:
        if name not in self.infos:
            raise self._missing(name)
        _, height, *rest = self.infos[name][0]
        first, last, _ = rows.indices(height)
        return self._read(name, (last - first, *rest), (expert * height + first) * math.prod(rest))

    def _read(self, name: str, shape: tuple[int, ...], skipped: int) -> torch.Tensor:
        """`shape` values of a tensor, from its value number `skipped` on."""
        out = torch.empty(shape, dtype=DTYPES[self.infos[name][1]])
        width, expected = out.itemsize, out.numel()
        view, done = memoryview(out.view(-1).view(torch.uint8).numpy()) if expected else memoryview(b""), 0
        for piece in self._pieces[name]:
            within = min(skipped, piece.count)
            skipped -= within
            count = min(piece.count - within, expected - done)
            if count:
                self._last.fill(piece.path, piece.start + within * width, view[done * width:(done + count) * width], name)
                done += count
        if done != expected:
            raise ValueError(f"{self.tag}: tensor {name} has {done} of {expected} values in the shards")
        return out


def zero_folder(folder: Path) -> Path | None:
    """The folder of DeepSpeed's shards in a checkpoint folder, or None if there are none.

    Raises:
        ValueError: several saved steps and no `latest` that chooses one, or a `latest` without its folder.
    """
    if any(folder.glob("*_optim_states.pt")):
        return folder
    latest = folder / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        if tag and any((folder / tag).glob("*_optim_states.pt")):
            return folder / tag
        raise ValueError(f"{latest}: names {tag!r}, expected a folder beside it with *_optim_states.pt")
    tags = sorted({p.parent for p in folder.glob("*/*_optim_states.pt")})
    if len(tags) > 1:
        raise ValueError(f"{folder}: DeepSpeed shards of {', '.join(t.name for t in tags)}, expected one of these folders "
                         "or a file `latest` that names it")
    return tags[0] if tags else None


def _rank_files(folder: Path, pattern: re.Pattern) -> list[Path]:
    """Files of all ranks in order; ValueError if one is missing or the model itself was divided."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*.pt")):
        if re.match(r"(layer_|expp_rank_)", path.name):
            raise ValueError(f"{path}: experts or pipeline stages in files of their own; only data parallel shards are read")
        match = pattern.match(path.name)
        if match:
            if int(match[2]):
                raise ValueError(f"{path}: a model divided among ranks (mp_rank {match[2]}); only data parallel shards are "
                                 "read")
            rank = int(match[1] or 0)
            if rank in found:
                raise ValueError(f"{path}: rank {rank} is also in {found[rank].name}")
            found[rank] = path
    missing = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if missing:
        raise ValueError(f"{folder}: the shard of rank {missing[0]} is missing, {len(found)} of {max(found) + 1} are there")
    return [found[rank] for rank in sorted(found)]


def _load(path: Path) -> dict:
    """A pickled state whose tensors have no values, only their places in the file."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    require_file(path)
    try:
        with path.open("rb") as file:
            require_stored(file)  # values are read from their places: they must stand there as they are
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a whole torch file: {first_line(error)}") from None
    strange = [name for name in foreign if not name.startswith("deepspeed.")]
    if strange:
        raise ValueError(f"{path}: holds {strange[0]}, which is neither a tensor nor DeepSpeed's; not read, because that could "
                         "run code")
    try:
        with torch.serialization.safe_globals([(Record, name) for name in foreign]), FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a whole torch file: {first_line(error)}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected DeepSpeed's dictionary")
    return state


def _part(path: Path, state: dict, key: str):
    if state.get(key) is None:
        raise ValueError(f"{path}: {key} is missing: not the layout of a ZeRO checkpoint")
    return state[key]


def _stage(path: Path, shard: dict) -> int:
    """Stage of a shard; the optimizer for bf16 with float32 gradients is ZeRO 1 and does not say so."""
    if "zero_stage" not in shard and "single_partition_of_fp32_groups" in shard:
        return 1
    stage = _part(path, shard, "zero_stage")
    return int(stage.arguments[0] if isinstance(stage, Record) else stage)


def _place(tensor: torch.Tensor) -> int:
    """First byte of a tensor in the file it was loaded from; ValueError where its values are not one run of bytes."""
    if not tensor.is_contiguous():
        raise ValueError(f"a stored tensor of shape {list(tensor.shape)} is not contiguous")
    return tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.itemsize


def _cut_groups(folder: Path, groups: list[dict], parts: list[list[Piece]], shards: list[dict]) -> dict[str, list[Piece]]:
    """ZeRO 1 and 2: where the values of each parameter lie, by the ranks' own maps if they wrote them."""
    pieces: dict[str, list[Piece]] = {}
    for number, shapes in enumerate(groups):
        if any(len(part) <= number for part in parts):
            raise ValueError(f"{folder}: {len(groups)} groups of parameters, shards have {len(parts[0])}")
        runs = [part[number] for part in parts]
        maps = [shard["param_slice_mappings"][number] for shard in shards if shard.get("param_slice_mappings")]
        if len(maps) == len(shards):
            for name, shape in shapes.items():
                mine = [_within(run, at[name].start, at[name].numel)
                        for run, at in zip(runs, maps, strict=True) if name in at]
                pieces[name] = _exactly(folder, name, mine, math.prod(shape))
            continue
        paddings = (shards[0].get("param_alignment_paddings") or {number: [0] * len(shapes)})[number]
        start = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            pieces[name] = _first(folder, name, _skip(runs, start), math.prod(shape))
            start += math.prod(shape) + padding
        rest = sum(run.count for run in runs) - start
        if not 0 <= rest < 2 * len(parts) * max(1, len(shapes)):
            raise ValueError(f"{folder}: group {number} has {rest} values more than its parameters: not a layout known here")
    return pieces


def _cut_each(folder: Path, groups: list[dict], parts: list[list[Piece]], shards: list[dict]) -> dict[str, list[Piece]]:
    """ZeRO 3: every parameter is cut by itself; a rank's pieces lie end to end over all its groups."""
    pieces, start, ranks = {}, 0, len(parts)
    for shapes in groups:
        for name, shape in shapes.items():
            count = -(-math.prod(shape) // ranks)
            own = [piece for part in parts for piece in _first(folder, name, _skip(part, start), count)]
            pieces[name] = _first(folder, name, own, math.prod(shape))
            start += count
    held = [sum(piece.count for piece in part) for part in parts]
    if min(held) != max(held) or not 0 <= held[0] - start < 2 * ranks:
        raise ValueError(f"{folder}: ranks hold {sorted(set(held))} values, the parameters need {start}: not a layout known "
                         "here (masters kept on another device are not in the checkpoint's files)")
    return pieces


def _within(run: Piece, start: int, count: int) -> Piece:
    if start < 0 or start + count > run.count:
        raise ValueError(f"{run.path}: a parameter at {start} to {start + count} of {run.count} values")
    return Piece(run.path, run.start + start * 4, count)


def _skip(runs: list[Piece], start: int) -> list[Piece]:
    """The runs without their first `start` float32 values."""
    left = []
    for run in runs:
        within = min(start, run.count)
        start -= within
        left.append(Piece(run.path, run.start + within * 4, run.count - within))
    return left


def _first(folder: Path, name: str, pieces: list[Piece], count: int) -> list[Piece]:
    """The first `count` values of `pieces`; ValueError if there are fewer."""
    taken = []
    for piece in pieces:
        part = Piece(piece.path, piece.start, min(piece.count, count))
        count -= part.count
        if part.count:
            taken.append(part)
    if count:
        raise ValueError(f"{folder}: the shards end {count} values before the end of tensor {name}")
    return taken


def _exactly(folder: Path, name: str, pieces: list[Piece], count: int) -> list[Piece]:
    held = sum(piece.count for piece in pieces)
    if held != count:
        raise ValueError(f"{folder}: the shards hold {held} values of tensor {name}, expected {count}")
    return pieces
