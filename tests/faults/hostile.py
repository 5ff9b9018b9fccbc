"""Folders as nobody would write them by accident: one random change of what a folder says, files and formats kept readable."""

import json
import os
import random
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

VALUES = [None, True, False, 0, 1, -1, 2, 7, 10**6, 10**9, 10**12, 2**63, 2**64 + 1, 10**400, 0.5, -0.0, 1e-320, 1e308,
          float("nan"), float("inf"), "", "x", "4", "../../etc/passwd", "/etc/passwd", "a" * 100_000, "\x1b[2J\x1b]0;x\x07",
          "\ud800", "mimo_v2", "bfloat16", "sliding_attention", [], {}, [[]], [None], [1, 2, 3], ["x"], [10**9], [-1], [1e9],
          {"a": {}}, {"": None},
          [[[[[[[[[[]]]]]]]]]], list(range(1000)), {"quant_method": "fp8"}, {"rope_type": "yarn"}, {"rope_type": "default",
          "rope_theta": "x"}]


def _paths(value, path=()):
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(4, len(value))):
            yield from _paths(value[i], (*path, i))


def _within(value, path):
    for key in path:
        value = value[key]
    return value


def change_json(rng: random.Random, file: Path) -> str:
    """One value, key or element of a JSON file."""
    value = json.loads(file.read_text())
    path = rng.choice([p for p in _paths(value) if p and len(p) < 7 and "vocab" not in p])
    home, key, new = _within(value, path[:-1]), path[-1], rng.choice(VALUES)
    how = rng.choice(["value"] * 6 + ["removed", "added", "wrapped", "scaled"])
    if how == "removed":
        home.pop(key)
    elif how == "added" and isinstance(home, dict):
        key = rng.choice(["hidden_size", "head_dim", "layer_types", "auto_map", "quantization_config", "text_config", "dtype",
                          "torch_dtype", "rope_scaling", "sliding_window", "tie_word_embeddings", "x"])
        home[key] = new
    elif how == "wrapped":
        home[key] = [home[key]]
    elif how == "scaled" and type(home[key]) in (int, float):
        home[key] = new = home[key] * rng.choice([-1, 2, 3, 1000, 10**9, 0.5])
    else:
        home[key] = new
    file.write_text(json.dumps(value))
    return f"{file.name}:{'.'.join(map(str, path))} {how} {str(new)[:40]!r}"


def change_index(rng: random.Random, file: Path) -> str:
    value = json.loads(file.read_text())
    names = value["weight_map"]
    how = rng.choice(["out", "absolute", "another", "swapped", "many", "folder", "removed", "number"])
    one, other = rng.sample(sorted(names), 2)
    if how == "swapped":
        names[one], names[other] = names[other], names[one]
    elif how == "many":
        value["weight_map"] |= {f"model.layers.{i}.x": names[one] for i in range(100_000)}
    elif how == "removed":
        del names[one]
    else:
        names[one] = {"out": "../../../etc/passwd", "absolute": "/etc/passwd", "another": "none.safetensors",
                      "folder": "dflash", "number": 3}[how]
    file.write_text(json.dumps(value))
    return f"{file.name}: {how}"


def change_header(rng: random.Random, file: Path) -> str:
    """One entry of a safetensors header; the data stays."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    how = rng.choice(["dtype", "shape", "offsets", "name", "metadata", "entry", "rank", "zero"])
    if how == "dtype":
        entry["dtype"] = rng.choice(["F64", "F16", "I64", "BOOL", "F8_E4M3", "F4", "x", "", None, 3])
    elif how == "shape":
        entry["shape"] = rng.choice([[0], [-1], [2**62, 4], [2**31], [], [1.5], ["x"], None, [1] * 100])
    elif how == "offsets":
        entry["data_offsets"] = rng.choice([[0, 0], [0, 2**60], [-8, 0], [5, 3], [0], None, [0, 10**30]])
    elif how == "name":
        header[rng.choice(["../x", "", "a" * 10_000, "\x1b[2J", "model.layers.999999999.x", name + ".x"])] = header.pop(name)
    elif how == "metadata":
        header["__metadata__"] = rng.choice([{"format": "x"}, {"reference": "[" * 50_000}, {"reference": "3"}, {"a": 3}, [], 3])
    elif how == "rank":
        entry["shape"] = [1, *entry["shape"]] if rng.random() < 0.5 else [torch.Size(entry["shape"]).numel()]
    elif how == "zero":
        header[name + "2"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    else:
        header[name] = rng.choice([None, [], {}, "x", 3])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size:])
    return f"{file.name}: header's {how} of {name}"


def change_tensor(rng: random.Random, file: Path) -> str:
    """Values, shape or dtype of one tensor, well written."""
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    t = tensors[name].clone()
    how = rng.choice(["nan", "inf", "huge", "zeros", "ones", "transposed", "cut", "float64", "gone", "doubled"])
    if how in ("nan", "inf", "huge") and t.is_floating_point() and t.numel():
        t.view(-1)[rng.randrange(t.numel())] = {"nan": float("nan"), "inf": float("inf"), "huge": 3e38}[how]
    elif how in ("zeros", "ones"):
        t.view(torch.uint8).fill_(0 if how == "zeros" else 255)
    elif how == "transposed":
        t = t.T.contiguous() if t.ndim == 2 else t[None]
    elif how == "cut":
        t = t[:-1].contiguous() if t.ndim else t
    elif how == "float64":
        t = t.double()
    elif how == "doubled":
        t = torch.cat((t, t)) if t.ndim else t
    tensors[name] = t
    if how == "gone":
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{file.name}: {name} {how}"


def change_mask(rng: random.Random, file: Path) -> str:
    held = torch.load(file, weights_only=True)
    vector = held["embedding"]
    changes = {"mask_token_id": [10**12, -1, "x", True, None, 2.5],
               "embedding": [vector[None], vector.to(torch.complex64), [1, 2], vector.to_sparse(), vector * float("nan"),
                             torch.zeros(10**6), torch.zeros(0), vector.expand(10**6, -1), None, "x"]}
    key = rng.choice(["mask_token_id", "embedding", "whole"])
    value = rng.choice([[held], vector, {}, 3, None]) if key == "whole" else held | {key: rng.choice(changes[key])}
    what = f"{key} another {type(value).__name__}"
    torch.save(value, file)
    return f"{file.name}: {what}"


def change_entries(rng: random.Random, folder: Path) -> str:
    """What lies in the folder, whatever it holds."""
    name = rng.choice(["x", "x.safetensors", "x.py", "x.json", "dflash/x.safetensors", "dflash/y.bin", ".metadata",
                       "model.bin", "y"])
    path, how = folder / name, rng.choice(["link out", "link up", "pipe", "socket", "deep", "long name", "many", "empty"])
    if how == "link out":
        path.symlink_to("/etc/passwd")
    elif how == "link up":
        path.symlink_to("..")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as made:
            os.chdir(path.parent)
            made.bind(path.name)
    elif how == "deep":
        Path(folder, *["d"] * 200).mkdir(parents=True)
    elif how == "long name":
        (path.parent / ("n" * 250)).touch()
    elif how == "many":
        for i in range(3000):
            (path.parent / f"{i}.safetensors").touch()
    else:
        path.touch()
    return f"{name}: {how}"


def make_hostile(rng: random.Random, folder: Path) -> str:
    """One random change of an exported folder; what it was."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    texts = [p for p in files if p.suffix == ".json" and p.stat().st_size < 2_000_000]
    configs = [p for p in texts if p.name == "config.json"]
    weights = [p for p in files if p.suffix == ".safetensors"]
    how = rng.random()
    if how < 0.3:
        return change_json(rng, rng.choice(configs))
    if how < 0.5:
        return change_json(rng, rng.choice(texts))
    if how < 0.57:
        return change_index(rng, rng.choice([p for p in files if p.name == "model.safetensors.index.json"]))
    if how < 0.72:
        return change_header(rng, rng.choice(weights))
    if how < 0.85:
        return change_tensor(rng, rng.choice(weights))
    if how < 0.92:
        return change_mask(rng, folder / "dflash" / "mask_embedding.pt")
    return change_entries(rng, folder)
