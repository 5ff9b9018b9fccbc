"""Where weights come from: a checkpoint folder of any kind the trainers leave, tensor by tensor and row by row.

    *.safetensors             one file or shards (`checkpoint.tensor_files`): a Hugging Face folder (published names, one matrix
                              per expert) or a checkpoint of training (its names, fused experts)
    pytorch_model*.bin        what `zero_to_fp32.py` and older tools write; mapped from disk, not read whole
    .metadata + *.distcp      torch.distributed.checkpoint (FSDP), also one folder down (`checkpoint.distributed`)
    *_optim_states.pt         DeepSpeed ZeRO 1 to 3, also below the folder that `latest` names (`checkpoint.zero_shards`)

Nothing is gathered: a matrix of one expert is a slice of the file, or of the piece that a rank wrote. Several threads may read
from one source. Nothing of a file is run: see `checkpoint.pickles`.
"""

from __future__ import annotations

import difflib
import threading
from pathlib import Path
from typing import BinaryIO

import torch

from checkpoint.pickles import load_torch_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
          "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "BOOL": torch.bool, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


NEAR = 2000  # names that are compared to find the one that was meant


class LastFile(threading.local):
    """The file that a thread read last, left open for the next tensor; every thread has its own place in a file."""

    path: Path | None = None
    file: BinaryIO

    def fill(self, path: Path, start: int, view: memoryview, name: str) -> None:
        """Reads into all of `view`, from byte `start` on; ValueError where the file ends within tensor `name`."""
        if self.path != path:
            file = path.open("rb", buffering=0)
            if self.path is not None:
                self.file.close()
            self.path, self.file = path, file
        self.file.seek(start)
        while view.nbytes:
            got = self.file.readinto(view)
            if not got:
                raise ValueError(f"{path}: ends within tensor {name}")
            view = view[got:]


class Source:
    """Named tensors of one checkpoint. `infos`: name -> (shape, dtype name as safetensors writes it).

    `masters`: None where the tensors are what the forward pass computed with; otherwise they are float32 masters, and this is
    the dtype to which they were rounded first (experts then were fake-quantized on every step).
    """

    masters: torch.dtype | None = None

    def __init__(self, folder: Path, infos: dict[str, tuple[tuple[int, ...], str]]):
        self.folder, self.infos = folder, infos
        self._touched: set[str] = set()

    def leave(self, name: str) -> None:
        """Counts a tensor as read, also one that this process need not read; ValueError if it is not in the checkpoint."""
        if name not in self.infos:
            raise self._missing(name)
        self._touched.add(name)

    def unused(self) -> set[str]:
        """Names that nobody asked for."""
        return set(self.infos) - self._touched

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it. Raises ValueError if it is missing."""
        self.leave(name)
        return self.infos[name][0]

    def read(self, name: str) -> torch.Tensor:
        """The tensor; ValueError if it is missing or its file is damaged."""
        raise NotImplementedError

    def read_rows(self, name: str, expert: int, rows: slice) -> torch.Tensor:
        """`tensor[expert, rows]` of a fused tensor, without reading the rest where the format allows."""
        return self.read(name)[expert, rows]

    def run(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        """Entries start .. start + length - 1 of dimension `dim`, without reading the rest where the format allows."""
        return self.read(name).narrow(dim, start, length)

    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes_of(name) for name in self.infos)

    def bytes_of(self, name: str) -> int:
        shape, dtype = self.infos[name]
        return torch.Size(shape).numel() * DTYPES[dtype].itemsize

    def _missing(self, name: str) -> ValueError:
        near = difflib.get_close_matches(name, [n for n in self.infos if n.count(".") == name.count(".")][:NEAR], n=1)
        return ValueError(f"{self.folder}: tensor {name} is missing{f' (nearest: {near[0]})' if near else ''}")


class TorchSource(Source):
    """pytorch_model*.bin, mapped from disk.

    Attributes:
        left_out: tensors in the files that the index says are in another, or nowhere.
    """

    def __init__(self, folder: Path, files: list[str], listed: dict[str, str] | None = None):
        self._tensors: dict[str, torch.Tensor] = {}
        self.left_out = 0
        for file in files:
            state = load_torch_file(folder / file, mmap=True)
            if not isinstance(state, dict):
                raise ValueError(f"{folder / file}: holds a {type(state).__name__}, expected tensors by name")
            held = {str(name): t for name, t in state.items() if isinstance(t, torch.Tensor)}
            own = {n: t for n, t in held.items() if listed is None or listed.get(n) == file}
            self._tensors |= own
            self.left_out += len(held) - len(own)
        if lost := sorted((listed or {}).keys() - self._tensors.keys()):
            raise ValueError(f"{folder}: the index says that tensor {lost[0]} is in {listed[lost[0]]}, and it is not")
        for name, tensor in self._tensors.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise ValueError(f"{folder}: {name}: dtype {tensor.dtype}, expected one of {', '.join(DTYPES)}")
        super().__init__(folder, {n: (tuple(t.shape), DTYPE_NAMES[t.dtype]) for n, t in self._tensors.items()})

    def read(self, name: str) -> torch.Tensor:
        self.leave(name)
        return self._tensors[name]
