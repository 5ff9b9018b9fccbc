"""Checkpoints are whole or not there; the last K are kept; half-written ones are ignored and cleared away."""

import json
import os
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from storage.files import write_text
from training import checkpoint
from training.checkpoint import complete_checkpoints, newest_whole, read_states, require_whole, save_checkpoint, state_writer
from training.state_files import load_state, save_state


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
    return accelerator, model, optimizer, Counter()


def states(job):
    return {"model": job[1], "states": {"optimizer": job[2], "job": job[3]}}


def save(job, folder, step, keep_last=2):
    job[3].value = step
    return save_checkpoint(job[0], folder, step, recipe_yaml="name: t\n", facts={"git_revision": "r"}, keep_last=keep_last,
                           write=state_writer(job[0], **states(job), copied=False))


def train(job):
    job[1](torch.randn(3, 4)).square().sum().backward()
    job[2].step()
    job[2].zero_grad()


def test_the_last_k_are_kept_and_the_newest_restores_everything(job, tmp_path):
    for step in (1, 2, 10):
        train(job)
        save(job, tmp_path, step)
    kept = complete_checkpoints(tmp_path)
    assert [p.name for p in kept] == ["step-00000002", "step-00000010"]
    weight, drawn = job[1].weight.detach().clone(), (torch.rand(2), random.random(), np.random.rand())
    train(job)
    later = job[1].weight.detach().clone()
    job[3].value = -1
    assert newest_whole(job[0], tmp_path, print) == kept[-1]
    read_states(job[0], kept[-1], **states(job))
    assert job[3].value == 10 and torch.equal(job[1].weight, weight)
    assert torch.equal(torch.rand(2), drawn[0]) and (random.random(), np.random.rand()) == drawn[1:]
    train(job)
    assert torch.equal(job[1].weight, later)  # moments and generators, too
    facts = json.loads((kept[-1] / "complete.json").read_text())
    assert facts.pop("sum")
    assert facts.pop("sha256").keys() == {p.name for p in kept[-1].iterdir()} - {"complete.json"}
    assert facts == {"step": 10, "processes": 1, "git_revision": "r"}


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
    monkeypatch.setattr(checkpoint, "write_json", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="step 2 could not be written.*No space left.*last good checkpoint is .*step-00000001"):
        save(job, tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_text_files_are_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


DAMAGE = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
FILES = ["model.safetensors", "training_state.safetensors", "random_states_0.safetensors", "resolved.yaml", "complete.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(name, damage, job, tmp_path):
    for step in (1, 2):
        train(job)
        save(job, tmp_path, step)
    DAMAGE[damage](tmp_path / "step-00000002" / name)
    said: list[str] = []
    assert newest_whole(job[0], tmp_path, said.append) == tmp_path / "step-00000001"
    finished = name != "complete.json" or damage in ("flipped", "cut", "empty")  # without that file it never was a checkpoint
    assert len(said) == finished
    if finished:
        assert name in said[0] and "step-00000002" in said[0] and "trying step-00000001 instead" in said[0]
        assert (tmp_path / "step-00000002.damaged").is_dir()
    save(job, tmp_path, 3)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000001", "step-00000003"]


OTHERS = [{}, {"step": 2}, {"step": 2, "processes": 1, "sha256": {}}, {"sha256": None}, {"sha256": [1]}]


@pytest.mark.parametrize("other", OTHERS)
def test_a_mark_without_its_sums_is_a_damaged_one(other, job, tmp_path):
    """Another JSON file's content in its place: the sums of nothing would let any damage pass."""
    for step in (1, 2):
        save(job, tmp_path, step)
    (tmp_path / "step-00000002" / "complete.json").write_text(json.dumps(other))
    assert newest_whole(job[0], tmp_path, print) == tmp_path / "step-00000001"
    require_whole(tmp_path / "step-00000001"), require_whole(tmp_path)
    with pytest.raises(ValueError, match=r"complete.json: not what was written[^\n]*expected a whole checkpoint$"):
        require_whole(tmp_path / "step-00000002.damaged")


def test_without_a_whole_checkpoint_nothing_is_taken_and_nothing_removed(job, tmp_path):
    for step in (1, 2):
        save(job, tmp_path, step)
        (tmp_path / f"step-0000000{step}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="step-00000001/model.safetensors.*no earlier whole checkpoint"):
        newest_whole(job[0], tmp_path, print)
    assert len(list(tmp_path.iterdir())) == 2


def test_pickled_states_of_an_earlier_version_are_refused_unread(job, tmp_path):
    path = save(job, tmp_path, 1)
    (path / "training_state.safetensors").unlink()
    (path / "custom_checkpoint_0.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match="could run code"):
        read_states(job[0], path, **states(job))


def test_states_come_back_as_they_were(tmp_path):
    shared = torch.arange(5)
    state = {"a": [1, 2.5, float("inf"), -0.0, None, True, "text\n", 1 << 80], 3: (shared, shared[:0], torch.tensor(7.0)),
             "nested": {"x": {"y": ()}}, "same": shared, "turned": torch.arange(6).view(2, 3).mT,
             "narrow": torch.randn(3, dtype=torch.bfloat16), "flags": torch.tensor([True, False])}
    save_state(tmp_path / "s.safetensors", state)
    found = load_state(tmp_path / "s.safetensors")
    assert repr(found) == repr(state) and list(found) == list(state)
    assert (tmp_path / "s.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(TypeError, match="a object in a state"):
        save_state(tmp_path / "t.safetensors", {"x": object()})
    for text in (b"", b"x" * 100):
        (tmp_path / "s.safetensors").write_bytes(text)
        with pytest.raises(ValueError, match="not the state"):
            load_state(tmp_path / "s.safetensors")


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def test_a_tied_head_is_written_once_and_restored(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    accelerator, model = Accelerator(cpu=True), Tied()
    path = save_checkpoint(accelerator, tmp_path, 1, recipe_yaml="", facts={}, keep_last=1,
                           write=state_writer(accelerator, model=model, states={}, copied=False))
    from safetensors.torch import load_file

    assert load_file(path / "model.safetensors").keys() == {"embed.weight"}
    other = Tied()
    read_states(accelerator, path, model=other, states={})
    assert torch.equal(other.head.weight, model.embed.weight) and other.head.weight is other.embed.weight
