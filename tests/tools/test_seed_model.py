"""Properties of the trained seed itself: it loads, it is healthy, it is as good as its results page says, roughly."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM
from tests.tolerance import SEED_SLICE_SLACK
from tools.seed import build_tokenizer, evaluate
from tools.seed.corpus import DOMAINS, read_frozen
from tools.seed.packing import read_prompts

SEED = evaluate.ROOT / "recipes" / "seed" / "model"
PUBLISHED = evaluate.ROOT / "docs" / "results" / "seed.json"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(SEED / "tokenizer.json"))


@pytest.fixture(scope="module")
def loaded():
    return MiMoV2ForCausalLM.from_pretrained(SEED, dtype=torch.bfloat16, output_loading_info=True)


@pytest.fixture(scope="module")
def published():
    return json.loads(PUBLISHED.read_text())["domains"]


def test_no_tensor_is_missing_unexpected_or_of_another_shape(loaded):
    info = loaded[1]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_every_weight_is_finite_and_no_expert_is_dead(loaded):
    for name, parameter in loaded[0].named_parameters():
        assert torch.isfinite(parameter).all(), name
        for part in parameter if parameter.ndim == 3 else [parameter]:
            assert part.float().std() > 0 or part.numel() == 1, name


def test_the_model_has_five_to_twelve_million_parameters(loaded):
    assert 5e6 <= sum(p.numel() for p in loaded[0].parameters()) <= 12e6


def test_end_and_padding_tokens_of_model_and_tokenizer_agree(loaded, tokenizer):
    for settings in (loaded[0].config, loaded[0].generation_config):
        assert settings.eos_token_id == tokenizer.token_to_id(build_tokenizer.END)
        assert settings.pad_token_id == tokenizer.token_to_id(build_tokenizer.PAD)


def test_every_expert_of_every_layer_gets_heldout_tokens(loaded, tokenizer):
    counts: dict[str, torch.Tensor] = {}

    def count(name):
        def hook(gate, _, output):
            chosen = next(t for t in output if torch.is_tensor(t) and not t.is_floating_point())
            counts[name] = torch.bincount(chosen.flatten(), minlength=len(gate.e_score_correction_bias))
        return hook

    gates = {n: m for n, m in loaded[0].named_modules() if hasattr(m, "e_score_correction_bias")}
    hooks = [module.register_forward_hook(count(name)) for name, module in gates.items()]
    texts = [read_frozen(domain, "heldout")[0]["text"] for domain in DOMAINS]
    with torch.no_grad():
        loaded[0](input_ids=torch.tensor([tokenizer.encode(t).ids[:256] for t in texts]), use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(counts) == 4
    for name, used in counts.items():
        assert used.min() > 0, f"{name}: {used.tolist()}"


@pytest.mark.parametrize("domain", DOMAINS)
def test_bits_per_byte_of_a_slice_is_near_the_published_figure(domain, loaded, tokenizer, published):
    texts = [d["text"][:1500] for d in read_frozen(domain, "heldout")[:12]]
    assert evaluate.bits_per_byte(loaded[0], tokenizer, texts) < SEED_SLICE_SLACK * published[domain]["bits_per_byte"]


def test_most_greedy_task_answers_end_by_themselves(loaded, tokenizer):
    tasks = [p for p in read_prompts() if p["kind"] == "task"]
    lengths = [len(tokenizer.encode(p["prompt"]).ids) for p in tasks]
    common = max(set(lengths), key=lengths.count)
    prompts = [p["prompt"] for p, length in zip(tasks, lengths, strict=True) if length == common]
    ended = [end for _, end in evaluate.greedy(loaded[0], tokenizer, prompts)]
    assert sum(ended) >= 0.9 * len(ended)
