"""Properties of the seed's pretraining and evaluation code; no training happens here."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tools.seed import build_tokenizer, evaluate, pretrain
from tools.seed.packing import STREAMS, RowLoader

LENGTH = 16


@pytest.fixture
def streams(tmp_path):
    for index, stream in enumerate(STREAMS):
        np.save(tmp_path / f"{stream}.npy", np.arange(LENGTH * (3 + index) + 1, dtype=np.uint16))
    return tmp_path


def test_a_restored_loader_gives_the_batches_of_an_uninterrupted_one(streams):
    rows = {"code": 2, "tasks": 3}
    whole, first = RowLoader(streams, rows, LENGTH, seed=1), RowLoader(streams, rows, LENGTH, seed=1)
    for _ in range(4):
        whole.next_batch(), first.next_batch()
    second = RowLoader(streams, rows, LENGTH, seed=1)
    second.restore(first.state())
    for _ in range(5):
        expected, given = whole.next_batch(), second.next_batch()
        assert np.array_equal(expected[0], given[0]) and expected[1] == given[1] == ["code"] * 2 + ["tasks"] * 3


def test_each_pass_visits_every_row_once_and_another_seed_in_another_order(streams):
    def order(seed):
        loader = RowLoader(streams, {"tasks": 1}, LENGTH, seed=seed)
        return [int(loader.next_batch()[0][0, 0]) for _ in range(12)]

    assert sorted(order(1)[:6]) == sorted(order(1)[6:]) == [LENGTH * i for i in range(6)]
    assert len({tuple(order(seed)) for seed in range(8)}) > 1


def test_a_row_holds_inputs_and_shifted_targets(streams):
    batch, _ = RowLoader(streams, {"code": 1}, LENGTH, seed=0).next_batch()
    assert batch.shape == (1, LENGTH + 1) and batch.dtype == np.int64 and (np.diff(batch[0]) == 1).all()


def test_the_learning_rate_warms_up_and_ends_at_zero():
    shares = [pretrain.learning_rate_share(i / 1000) for i in range(1001)]
    peak = shares.index(1.0)
    assert shares[0] == 0.0 and shares[1000] == 0.0 and max(shares) == 1.0
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert pretrain.learning_rate_share(1.1) == 0.0


def test_only_the_user_turn_is_weighted_down():
    user, assistant = (build_tokenizer.SPECIALS.index(s) for s in (build_tokenizer.USER, build_tokenizer.ASSISTANT))
    tokens = torch.tensor([[9, user, 9, 9, assistant, 9, 0, user, 9], [9, assistant, 9, 9, 9, 9, 9, 9, 9]])
    low = pretrain.INSTRUCTION_WEIGHT
    expected = torch.tensor([[1, low, low, low, 1, 1, 1, low], [1.0] * 8])  # the role tokens themselves: by what precedes
    assert torch.equal(pretrain.target_weights(tokens), expected)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 32), (1, 32, 100)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    result = pretrain.orthogonalise(torch.randn(shape, generator=generator)).float()
    values = torch.linalg.svdvals(result)
    assert result.shape == shape
    assert float(values[:, : min(shape[1:]) // 2].min()) > 0.6 and float(values.max()) < 1.7


class _Gate(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(4))

    def forward(self, chosen):
        return chosen, torch.ones_like(chosen, dtype=torch.float32)


def test_the_bias_moves_against_the_load_and_not_at_all_at_rate_zero():
    gate = _Gate()
    balance = pretrain.RouterBalance(gate)
    gate(torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]]))  # loads 4, 3, 1, 0 about a mean of 2
    assert balance.step(0.0) == 2.0 and not gate.e_score_correction_bias.any()
    balance.step(1.0)
    assert torch.equal(gate.e_score_correction_bias.sign(), torch.tensor([-1.0, -1.0, 1.0, 1.0]))


def test_a_parameter_or_expert_without_gradient_is_named():
    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.Parameter(torch.ones(3, 2, 2))

    model = Stack()
    (model.experts[0].sum() + model.experts[2].sum()).backward()
    with pytest.raises(ValueError, match=r"experts\[1\]"):
        pretrain.require_gradients(model)


def test_a_non_finite_gradient_stops_the_run_and_names_the_tensor():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    optimizer = pretrain.MasterOptimizer(model, 0.01, 0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[0].weight.grad[1, 1] = float("nan")
    before = model[0].weight.detach().clone()
    with pytest.raises(FloatingPointError, match="0.weight"):
        optimizer.step(1.0)
    assert torch.equal(model[0].weight, before)


def test_the_seed_geometry_splits_over_eight_ranks_on_block_boundaries():
    config = pretrain.seed_config()
    assert config.num_attention_heads % 8 == config.swa_num_attention_heads % 8 == 0
    assert config.moe_intermediate_size % (8 * 32) == 0 and config.hidden_size % 32 == 0
    assert config.n_routed_experts >= 8 and config.num_experts_per_tok == 2
    assert {0, 1} == set(config.hybrid_layer_pattern) == set(config.moe_layer_freq)


@pytest.mark.parametrize("length", [1, 2, 63, 100, 256, 511, 512, 513, 768, 769, 2000])
def test_every_token_after_the_first_is_scored_once_with_enough_context(length):
    scored = []
    for begin, end, first in evaluate.score_windows(length):
        assert end - begin <= evaluate.WINDOW and begin < first
        assert begin == 0 or first - begin >= evaluate.STRIDE
        scored += range(first, end)
    assert scored == list(range(1, length))


class _Uniform(torch.nn.Module):
    def forward(self, input_ids, use_cache):
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, build_tokenizer.VOCAB_SIZE)})


def test_a_model_that_knows_nothing_needs_eleven_bits_a_token():
    tokenizer = Tokenizer.from_file(str(evaluate.ROOT / "recipes" / "seed" / "model" / "tokenizer.json"))
    texts = ["def f(x):\n    return x\n" * 60, "a", "12 + 34"]
    tokens = sum(len(tokenizer.encode(t).ids) for t in texts)
    expected = 11 * tokens / sum(map(len, texts))
    assert evaluate.bits_per_byte(_Uniform(), tokenizer, texts) == pytest.approx(expected)
