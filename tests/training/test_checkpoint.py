"""Checkpoints are whole or not there; the last K are kept; half-written ones are ignored and cleared away."""

import json

import pytest
import torch
from accelerate import Accelerator

from training.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint, write_text


class Counter:
    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.fixture
def job():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(optimizer)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    return accelerator, model, optimizer, counter


def save(job, folder, step, keep_last=2):
    job[3].value = step
    return save_checkpoint(job[0], folder, step, recipe_yaml="name: t\n", facts={"git_revision": "r"}, keep_last=keep_last)


def test_the_last_k_are_kept_and_the_newest_restores_everything(job, tmp_path):
    for step in (1, 2, 10):
        save(job, tmp_path, step)
        torch.nn.init.normal_(job[1].weight)
    kept = complete_checkpoints(tmp_path)
    assert [p.name for p in kept] == ["step-00000002", "step-00000010"]
    wanted = torch.load(tmp_path / "step-00000010" / "custom_checkpoint_0.pkl", weights_only=False)
    job[3].value = -1
    load_checkpoint(job[0], kept[-1])
    assert job[3].value == wanted["value"] == 10
    assert json.loads((kept[-1] / "complete.json").read_text()) == {"step": 10, "processes": 1, "git_revision": "r"}


def test_half_written_checkpoints_do_not_count_and_are_removed_by_the_next_save(job, tmp_path):
    save(job, tmp_path, 1)
    (tmp_path / "step-00000002.partial").mkdir()
    (tmp_path / "step-00000002.partial" / "optimizer.bin").write_bytes(b"half")
    (tmp_path / "step-00000003").mkdir()  # a folder without its last file
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000001"]
    save(job, tmp_path, 4)
    assert not list(tmp_path.glob("*.partial"))


def test_weights_keep_the_models_own_names(job, tmp_path):
    from safetensors.torch import load_file

    path = save(job, tmp_path, 1)
    assert load_file(path / "model.safetensors").keys() == {"weight", "bias"}


def test_a_failed_write_keeps_the_earlier_checkpoint_and_says_which(job, tmp_path, monkeypatch):
    save(job, tmp_path, 1)
    monkeypatch.setattr(job[0], "save_state", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="step 2 could not be written.*No space left.*last good checkpoint is .*step-00000001"):
        save(job, tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_text_files_are_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
