"""States of a training job in files that cannot run code: tensors as safetensors, the rest as JSON in the file's header.

A state is what `state_dict()` gives: dictionaries, lists and tuples of tensors, numbers, strings, booleans and None, nested as
they like, with strings or integers as keys. It comes back equal, tuples as tuples and integer keys as integers; floats are
written with all their digits.

Rejected: `torch.save` (a pickle, even if it is read with `weights_only`), one file per tensor.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from storage.reading import first_line

_PLAIN = (bool, int, float, str, type(None))


def save_state(path: Path, state: object) -> None:
    """Writes `state`, not aside. Raises OSError: the disk is full or not writable. TypeError: a value of another kind."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.dumps(_taken_apart(state, tensors))
    write_tensors(path, tensors, {"state": skeleton})


def load_state(path: Path) -> object:
    """What `save_state` wrote, on the CPU.

    Raises:
        ValueError: no such file, damaged, or something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            skeleton = json.loads((file.metadata() or {})["state"])
            return _joined(skeleton, {name: file.get_tensor(name) for name in file.keys()})
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the state of a training job: {first_line(error)}") from None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file with the rights of any other new file (the library's own are its owner's alone).

    Raises OSError: the disk is full or not writable.
    """
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor  # the library refuses shared memory
        seen.add(tensor.data_ptr())
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(apart, path, metadata=metadata)
    except (SafetensorError, RuntimeError) as error:  # a full disk, among others
        raise OSError(first_line(error)) from error
    path.chmod(mode)


def host_copy(state: object) -> object:
    """A copy of a state whose tensors are the CPU's own: what is written while training goes on."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: host_copy(value) for key, value in state.items()}
    return type(state)(map(host_copy, state)) if isinstance(state, (list, tuple)) else state


def _taken_apart(value: object, tensors: dict[str, torch.Tensor]) -> object:
    """JSON that holds `value` but for its tensors, which go into `tensors`."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_taken_apart(k, tensors), _taken_apart(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_taken_apart(v, tensors) for v in value]}
    if not isinstance(value, _PLAIN):
        raise TypeError(f"a {type(value).__name__} in a state, expected tensors and plain data")
    return value


def _joined(value: object, tensors: dict[str, torch.Tensor]) -> object:
    if not isinstance(value, dict):
        return value
    (kind, content), = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_joined(k, tensors): _joined(v, tensors) for k, v in content}
    return {"list": list, "tuple": tuple}[kind](_joined(v, tensors) for v in content)


def random_state() -> dict:
    """The states of this process's generators: Python's, NumPy's, torch's, and those of the accelerators it sees."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {"python": random.getstate(), "torch": torch.get_rng_state(),
             "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)]}
    if torch.accelerator.is_available():
        state["devices"] = _devices().get_rng_state_all()
    return state


def set_random_state(state: dict) -> None:
    """Undoes what happened since `random_state`. Raises ValueError if it was another kind of machine's."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    devices = state.get("devices", [])
    if len(devices) != (torch.accelerator.device_count() if torch.accelerator.is_available() else 0):
        raise ValueError(f"generators of {len(devices)} accelerators, this machine has {torch.accelerator.device_count()}")
    if devices:
        _devices().set_rng_state_all(devices)


def _devices():
    return torch.get_device_module(torch.accelerator.current_accelerator())
