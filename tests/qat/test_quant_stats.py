"""Health reports are JSON, count the tokens of all processes, and survive a checkpoint that is read to another device."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qat.expert_quantizer import ExpertQuantizer
from qat.oscillation import OscillationControl
from qat.quant_stats import Health
from qat.state import TrainingState
from recipes.schema import Oscillation


@pytest.mark.parametrize("method", ["ema", "freeze"])
def test_a_state_read_to_the_cpu_is_put_beside_the_weights(model, method):
    """The meta device stands for a GPU: what is loaded must be where the weights are."""
    quantizer = ExpertQuantizer(model)
    control = OscillationControl(quantizer, Oscillation(method=method, start=0.0), 10)
    control.requantize(0)
    state = TrainingState(quantizer, control, Health(model, quantizer), step=3, averaged_steps=1,
                          average=[m.data.clone() for m in quantizer.masters])
    saved = state.state_dict()
    quantizer.masters = [nn.Parameter(m.to("meta")) for m in quantizer.masters]
    quantizer.tensors = [replace(t, parameter=nn.Parameter(t.parameter.to("meta"))) for t in quantizer.tensors]
    state.load_state_dict(saved)
    packed = [part for parts in state.health._last for part in parts]
    loaded = [*state.average, *packed, *(control.means if method == "ema" else [*control.flips, *control.frozen])]
    assert len(loaded) == (4 if method == "ema" else 5) * len(quantizer.masters)
    assert {t.device.type for t in loaded} == {"meta"}
    assert control.means is None or control.flips is None


def test_a_ratio_without_signal_or_error_is_null(model):
    quantizer = ExpertQuantizer(model)
    with torch.no_grad():
        quantizer.masters[0][1] = 0.0  # no signal
        quantizer.masters[0][2] = 4e20  # no error
    quantizer.requantize()
    records = Health(model, quantizer).report()
    text = json.dumps(records, allow_nan=False)
    assert [v is None for v in json.loads(text)[0]["sqnr_db"]] == [False, True, True, False]


def processes(count: int, first: bool):
    """An accelerator of `count` processes that all have the same tensors."""
    return SimpleNamespace(device=torch.device("cpu"), is_main_process=first, num_processes=count,
                           reduce=lambda tensor, reduction: count * tensor)


@pytest.mark.parametrize("first", [True, False])
def test_tokens_are_those_of_all_processes_once_also_after_a_resume(model, first):
    quantizer = ExpertQuantizer(model)
    health = Health(model, quantizer, processes(2, first))
    ids = torch.arange(20)[None]
    model(input_ids=ids)
    saved = health.state_dict()
    assert all(int(c.sum()) == (80 if first else 0) for c in saved["routed"].values())  # 2 processes x 20 tokens x top-2
    health.load_state_dict(health.state_dict() | {"routed": {n: torch.full_like(c, 20) for n, c in saved["routed"].items()}})
    health.accelerator = processes(1, first)
    assert all(sum(record["tokens"]) == (80 if first else 0) for record in health.report())
