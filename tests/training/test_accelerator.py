"""Launches: what the trainers cannot do is refused, what is shipped works, and processes wait for a long tokenization."""

from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState

from training.accelerator import make_accelerator

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Accelerate keeps the first launch of a process; each of these is a first one, and the last is forgotten."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def launched_with(config: dict, monkeypatch) -> None:
    """The variables that `accelerate launch --config_file` sets, of those that matter here."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", config["mixed_precision"])
    if config["distributed_type"] in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        monkeypatch.setenv(f"ACCELERATE_USE_{config['distributed_type']}", "true")


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda f: f.stem)
def test_a_shipped_launch_works(file, monkeypatch):
    launched_with(yaml.safe_load(file.read_text()), monkeypatch)
    assert make_accelerator().mixed_precision == "no"


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_model_sharded_by_accelerate_is_refused_with_the_key_that_shards_it(kind, monkeypatch):
    launched_with({"mixed_precision": "no", "distributed_type": kind}, monkeypatch)
    with pytest.raises(ValueError, match="cluster.sharding: fsdp2.*torchrun --nproc-per-node N.*accelerate launch --multi_gpu"):
        make_accelerator()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_autocast_around_one_of_the_models_is_refused(precision, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(ValueError, match=f"mixed_precision {precision}, but.* set model.dtype.*--mixed_precision no"):
        make_accelerator()


def test_processes_wait_longer_than_a_corpus_takes_to_tokenize():
    assert make_accelerator().init_handler.timeout >= timedelta(hours=12)
