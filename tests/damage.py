"""Ways to damage an exported checkpoint, and to make its checksums fit the damage."""

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoint.checksums import read_checksums, write_checksums

EXPERT = "model.layers.1.mlp.experts.0.gate_proj.weight"
FLOAT = "model.layers.2.self_attn.o_proj.weight"


def holder(folder: Path, name: str) -> Path:
    if not (folder / "model.safetensors.index.json").is_file():
        return folder / "model.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def change(name, edit):
    """Rewrites the file that holds `name` with `edit` applied to its tensors."""

    def damage(folder: Path) -> None:
        location = folder / "dflash" if name.startswith("dflash/") else folder
        path = holder(location, name.removeprefix("dflash/"))
        tensors = load_file(path)
        edit(tensors, name.removeprefix("dflash/"))
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})

    return damage


def tensor(name, edit):
    return change(name, lambda tensors, n: tensors.__setitem__(n, edit(tensors[n].clone())))


def flip_bit(t):
    t.view(-1).view(torch.uint8)[5] ^= 1
    return t


def put(t, value, index=0):
    t.view(-1)[index] = value
    return t


def swap_nibbles(t):
    return (t >> 4) | (t << 4)


def json_edit(file, edit):
    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        edit(value)
        (folder / file).write_text(json.dumps(value))

    return damage


def remove(file):
    return lambda folder: (folder / file).unlink()


def cut(file, keep):
    def damage(folder: Path) -> None:
        path = next(folder.glob(file))
        path.write_bytes(path.read_bytes()[:keep])

    return damage


def mask(edit):
    def damage(folder: Path) -> None:
        path = folder / "dflash/mask_embedding.pt"
        value = torch.load(path, weights_only=True)
        edit(value)
        torch.save(value, path)

    return damage


def swap_files(folder: Path) -> None:
    a, b = sorted(folder.glob("model-*.safetensors"))[:2]
    a.rename(folder / "x"), b.rename(a), (folder / "x").rename(b)


def rename_tensor(tensors, name):
    tensors["model." + name] = tensors.pop(name)


def shift_target_layers(config):
    config["dflash_config"]["target_layer_ids"] = [i + 1 for i in config["dflash_config"]["target_layer_ids"]]


def seal(folder: Path) -> None:
    """Makes the checksums fit what is there."""
    _, sums = read_checksums(folder)
    for prefix, files in (("", folder.glob("*.safetensors")), ("dflash/", folder.glob("dflash/dflash_draft*.safetensors"))):
        for file in files:
            for name, t in load_file(file).items():
                data = t.contiguous().view(-1).view(torch.uint8).numpy() if t.numel() else b""
                sums[prefix + name] = f"{zlib.crc32(data):08x}"
    write_checksums(folder, sums)
