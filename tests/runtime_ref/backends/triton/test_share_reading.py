"""A rank reads its share of a checkpoint, a few experts at a time, and makes the pages of a whole layer from it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from checkpoint.tensor_files import TensorFiles
from runtime_ref.checkpoints import device_weights as kernel_weights
from runtime_ref.checkpoints.device_weights import load_kernel_weights
from runtime_ref.core.tensor_parallel import Ranks
from runtime_ref.kernels.repack import repack_experts
from tests.runtime_ref.backends.triton.conftest import small_config
from tests.runtime_ref.conftest import random_target, write_native

SHARED = {"num_attention_heads": 4, "num_key_value_heads": 2, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
          "moe_intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp("shared"), random_target(small_config(**SHARED)))


@pytest.fixture
def opened(monkeypatch):
    """The files that loaders open."""
    found = []

    class Kept(TensorFiles):
        def __init__(self, folder):
            super().__init__(folder)
            found.append(self)

    monkeypatch.setattr(kernel_weights, "TensorFiles", Kept)
    return found


def parts_read(name: str, count: int) -> int:
    """Into how many shares a tensor is cut."""
    cut = ".mlp.experts." in name or name.endswith(("lm_head.weight", "o_proj.weight"))
    return count if cut or ".mlp." in name and name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight")) else 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_rank_reads_its_share_and_nothing_twice(folder, opened, count):
    whole = load_file(folder / "model.safetensors")
    for rank in range(count):
        load_kernel_weights(folder, Ranks(rank, count))
        assert opened[-1].bytes_read == sum(t.nbytes // parts_read(name, count) for name, t in whole.items())
        assert not opened[-1].unused()


@pytest.mark.parametrize("group", [1, 50_000, 1 << 40])
@pytest.mark.parametrize("rank, count", [(0, 1), (0, 2), (1, 2)])
def test_pages_are_those_of_whole_layers_whatever_is_read_at_once(folder, monkeypatch, group, rank, count):
    monkeypatch.setattr(kernel_weights, "GROUP_BYTES", group)
    loaded, whole = load_kernel_weights(folder, Ranks(rank, count)), load_file(folder / "model.safetensors")
    for i in (1, 2):
        found = loaded.layers[i].pages

        def stacked(kind, suffix, i=i):
            return torch.stack([whole[f"model.layers.{i}.mlp.experts.{e}.{kind}_proj.weight{suffix}"] for e in range(4)])

        up = tuple(torch.cat((stacked("gate", s), stacked("up", s)), 1) for s in ("", "_scale"))
        expected = repack_experts(up, tuple(stacked("down", s) for s in ("", "_scale")), rank=rank, ranks=count,
                                  up_tile=found.up_tile, down_tile=found.down_tile, parts=found.parts)
        assert torch.equal(found.up, expected.up) and torch.equal(found.down, expected.down)


def test_pages_are_made_where_they_are_used(folder, monkeypatch):
    """The device that they are moved to before they are packed, here one without memory, is the one that was asked for."""
    asked = []

    def repacked(gate_up, down, **options):
        asked.extend(t.device.type for t in (*gate_up, *down))
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel_weights, "repack_experts", repacked)
    with pytest.raises(KeyboardInterrupt):
        load_kernel_weights(folder, device="meta")
    assert asked == ["meta"] * 4


def test_a_scale_that_pages_cannot_hold_names_its_tensor(folder, tmp_path):
    damaged = load_file(folder / "model.safetensors")
    damaged["model.layers.2.mlp.experts.3.down_proj.weight_scale"][5, 1] = 129
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(damaged, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.experts\.3\.down_proj\.weight_scale: scale byte 129"):
        load_kernel_weights(tmp_path)


def test_a_missing_tensor_is_named(folder):
    files = TensorFiles(folder)
    for read in (files.shape, lambda name: files.run(name, 0, 0, 1)):
        with pytest.raises(ValueError, match="model.layers.9.x is missing"):
            read("model.layers.9.x")
