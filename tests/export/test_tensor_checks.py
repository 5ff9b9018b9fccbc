"""Tensors are checked by several threads at once: nothing is mixed up, nothing is read twice, nothing is overlooked."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from damage import seal
from toy_export import put_on_grid, toy_config, toy_model, toy_weights

from checkpoint import distributed
from checkpoint.detect_format import open_source
from checkpoint.tensor_checks import side_by_side
from checkpoint.tensor_files import TensorFiles
from checkpoint.trained import expert_values
from checkpoint.verify import verify


def trained(toy_run) -> Path:
    return toy_run.parent / "runs/toy/qat/model"


@pytest.mark.parametrize("sealed", [False, True])
def test_a_flipped_bit_is_found_wherever_it_lies_in_a_weight_file(sealed, toy_run, exported, tmp_path):
    """Also with checksums that fit the damage: then training tells. Left out: the padding of headers, which says nothing."""
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    places = torch.Generator().manual_seed(7)
    for path in sorted(folder.glob("model-*.safetensors")):
        whole = path.read_bytes()
        begin = 8 + int.from_bytes(whole[:8], "little")
        for place in torch.randint(begin, len(whole), (2,), generator=places).tolist():
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            if sealed:
                seal(folder)
            assert verify(folder, trained(toy_run)).findings, (path.name, place)
        path.write_bytes(whole)
    if sealed:
        seal(folder)
    assert verify(folder, trained(toy_run)).findings == []


def test_every_tensor_is_read_once_to_be_verified_alone(exported, monkeypatch):
    reads, read = [], TensorFiles.read
    monkeypatch.setattr(TensorFiles, "read", lambda self, name: (reads.append(name), read(self, name))[1])
    assert verify(exported).findings == []
    experts = [name for name in reads if ".experts." in name]
    assert len(experts) == len(set(experts)) == 90


def test_threads_that_read_one_source_get_their_own_bytes(exported):
    source = open_source(exported)
    names = source.in_order()[::-1] * 3
    expected = {name: source.read(name) for name in set(names)}
    with ThreadPoolExecutor(8) as threads:
        for name, tensor in zip(names, threads.map(source.read, names), strict=True):
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_fused_tensors_of_a_distributed_checkpoint_are_loaded_once_each(tmp_path, monkeypatch):
    from torch.distributed import checkpoint

    state = {n: t.contiguous() for n, t in put_on_grid(toy_model(toy_config())).state_dict().items()}
    checkpoint.save({"model": state}, checkpoint_id=str(tmp_path / "fsdp"), no_dist=True)
    source, loads, load = open_source(tmp_path), [], distributed.load_torch_bytes
    monkeypatch.setattr(distributed, "load_torch_bytes", lambda *args, **kwargs: (loads.append(1), load(*args, **kwargs))[1])
    prefix = "model.layers.1.mlp.experts"
    for expert in range(state[f"{prefix}.down_proj"].shape[0]):
        for part in ("down", "gate", "up"):
            expert_values(toy_weights(source), f"{prefix}.{expert}.{part}_proj.weight")
    assert len(loads) == 2


def test_work_side_by_side_keeps_its_order_and_never_runs_far_ahead():
    begun, lock, ahead = [], threading.Lock(), []

    def work(item: int) -> int:
        with lock:
            begun.append(item)
        return item

    with ThreadPoolExecutor(4) as threads:
        for done, item in enumerate(side_by_side(threads, work, range(100), 6)):
            assert item == done
            ahead.append(len(begun) - done)
    assert max(ahead) <= 7
