"""Drafters with a Markov head or a convolution: the model's own numbers and choices, and still no token changed."""


import pytest
import torch
from tolerance import MODEL_FP32

from modeling.drafter import DFlashDraftModel, drafter_config, load_drafter, save_drafter
from runtime_ref.backends.c.backend import CBackend
from runtime_ref.backends.c.structs import compiled_ops
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.checkpoints.load import load_target
from runtime_ref.core.batch import DraftRequest
from runtime_ref.core.kv_cache import KvCache
from runtime_ref.core.markov import MarkovHead
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.engine import Engine, EngineOptions
from runtime_ref.engine.speculative import propose

OPTIONS = [{"convolution_rank": 4}, {"markov_rank": 6}, {"markov_rank": 6, "selector_top_k": 3, "convolution_rank": 2}]


def drafter(**options):
    torch.manual_seed(4)
    model = DFlashDraftModel(drafter_config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=264, target_layer_ids=[0, 3], num_target_layers=4, mask_token_id=262, rotary_base=1e4, window=24,
        partial_rotary_factor=0.5, attention_value_scale=0.7, **options)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [TorchBackend, CBackend])
def test_logits_of_a_block_are_the_models(folder, tmp_path, options, kind):
    if kind is CBackend and compiled_ops()[0] is None:
        pytest.skip(compiled_ops()[1])
    save_drafter(drafter(**options), tmp_path)
    model = load_drafter(tmp_path, torch.float32)
    backend = kind(load_target(folder), dtype=torch.float32, pages={"full": 8, "window": 8})
    ours = backend.load_drafter(tmp_path, 8, 256)
    target_hidden, n = torch.randn(30, 128, generator=torch.Generator().manual_seed(0)), 30
    cache = KvCache({"draft": ours.pool})
    tables, other = cache.tables(), cache.tables()
    for t in (tables, other):
        cache.extend(t, ["draft"], 50)
    ours.extend_tables(target_hidden, 0, tables["draft"])
    found = ours.logits([DraftRequest(other, 9, 0, 3, None), DraftRequest(tables, 7, n, 7, None)])[1]
    with torch.no_grad():
        positions = torch.arange(n)[None]
        context = model.context_keys_values(model.fuse(target_hidden[None]), positions)
        block = backend.weights.embed[torch.tensor([7])]
        hidden = model.block_hidden(torch.cat((block[None], model.mask_embedding.expand(1, 7, -1)), dim=1),
                                    torch.arange(n, n + 8)[None], context, positions)[0, 1:]
        expected = (hidden @ backend.weights.head.transpose(1, 2).flatten(0, 1).T)
    torch.testing.assert_close(found, expected, **MODEL_FP32)


def test_a_path_is_the_best_of_all_paths():
    generator = torch.Generator().manual_seed(1)
    head = MarkovHead(torch.randn(9, 4, generator=generator), torch.randn(4, 9, generator=generator), candidates=3)
    for _ in range(5):
        logits = torch.randn(4, 9, generator=generator)
        options = logits.topk(3).indices.tolist()
        best = max(((a, b, c, d) for a in options[0] for b in options[1] for c in options[2] for d in options[3]),
                   key=lambda p: sum(float((logits[i] + head.bias(torch.tensor([before]))[0]).log_softmax(-1)[t])
                                     for i, (before, t) in enumerate(zip((2, *p), p, strict=False))))
        assert head.path(logits, 2) == list(best)
        assert propose(logits, SamplingParams(), 5, head, 2).tokens == list(best)


def test_a_chain_conditions_each_draft_on_the_one_before():
    generator = torch.Generator().manual_seed(1)
    head = MarkovHead(torch.randn(9, 4, generator=generator), torch.randn(4, 9, generator=generator))
    logits = torch.randn(5, 9, generator=generator)
    tokens, before = [], 2
    for row in logits:
        before = int((row + head.previous[before] @ head.next).argmax())
        tokens.append(before)
    assert propose(logits, SamplingParams(), 5, head, 2).tokens == tokens != logits.argmax(-1).tolist()
    sampled = propose(logits, SamplingParams(temperature=0.9, rule="rejection", seed=3), 5, head, 2)
    for i, before in enumerate([2, *sampled.tokens[:-1]]):
        expected = ((logits[i] + head.previous[before] @ head.next).double() / 0.9).softmax(-1)
        torch.testing.assert_close(sampled.q[i], expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_no_token_changes(folder, tmp_path, options, prompts):
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_drafter(drafter(**options), tmp_path / "dflash")
    engine = Engine.from_folder(tmp_path, options=EngineOptions(max_context=256))
    plain = SamplingParams(max_tokens=16, ignore_eos=True, speculate=False)
    drafting = SamplingParams(max_tokens=16, ignore_eos=True)
    expected = engine.generate(prompts[:6], plain)
    assert engine.generate(prompts[:6], drafting) == expected
    assert [engine.generate([p], drafting)[0] for p in prompts[:6]] == expected
    sampled = SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.9, rule="rejection")
    assert all(len(answer) == 16 for answer in engine.generate(prompts[:6], sampled))
