"""Text that a model finds unlikely: many tokens with a trainer's figures decide, few never, random weights are a note."""

import math
from types import SimpleNamespace

import pytest
import torch

from runtime_ref.validation.checks import decoding
from runtime_ref.validation.result import Check

TRAINED = {"a": 3.0}


@pytest.mark.parametrize(("tokens", "above", "trained", "status", "said"), [
    (1, 1.0, TRAINED, "passed", "1 token can decide nothing"), (63, 1.0, TRAINED, "passed", "63 tokens can decide nothing"),
    (64, 1.0, TRAINED, "failed", "less likely than a uniform guess"), (64, 1.0, None, "passed", "a model of random weights"),
    (64, -1.0, TRAINED, "passed", "")])
def test_a_few_tokens_decide_nothing_about_a_tokenizer(tokens, above, trained, status, said, monkeypatch):
    monkeypatch.setattr(decoding, "_nats", lambda engine, prompt: torch.full((len(prompt) - 1,), math.log(100) + above))
    engine = SimpleNamespace(backend=SimpleNamespace(config=SimpleNamespace(vocab_size=100)))
    check = Check("text", "")
    decoding.check_text(check, engine, decoding.Prompts({"a": [list(range(tokens + 1))]}), trained)
    lines = [*check.findings, *check.unchecked, *check.notes]
    assert check.status == status and (said in lines[0] if said else lines == [])
