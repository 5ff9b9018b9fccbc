"""Predicted acceptance is what the loop counts; lookup, intervals and rejection sampling do what they say."""

import itertools
import json
import random

import pytest
import torch
from tolerance import C7_ACCEPTANCE, FOUR_SIGMA
from torch.overrides import TorchFunctionMode

from dflash_train.acceptance import (
    Text,
    answer_all,
    distinct_8gram,
    expected_rounds,
    groups,
    judge,
    lookup_beta,
    per_position,
    summarize,
    table,
    wall_clock,
    without_nan,
)
from dflash_train.dialogues import read_jsonl, row_prompt
from dflash_train.reference_decoding import DraftContext, best_path, draft, generate, plain, probabilities, speculate, verify
from dflash_train.target import load_target
from recipes.load import load_recipe
from recipes.schema import DraftOptimizer
from training.intervals import ratio_interval


def rounds_by_enumeration(beta, tokens, anchor=0):
    """The mean number of rounds over all outcomes, by recursion on the first round."""
    if anchor >= tokens:
        return 0.0
    drafts = beta[anchor][:tokens - anchor]
    total = 1.0
    for n in range(len(drafts) + 1):
        chance = 1.0
        for accept in drafts[:n]:
            chance *= accept
        if n < len(drafts):
            chance *= 1 - drafts[n]
        total += chance * rounds_by_enumeration(beta, tokens, anchor + n + 1)
    return total


@pytest.mark.parametrize("tokens", [1, 2, 7, 9])
def test_expected_rounds_are_those_of_all_outcomes(tokens):
    rng = random.Random(tokens)
    beta = [[rng.random() for _ in range(3)] for _ in range(tokens)]
    assert expected_rounds(beta, tokens) == pytest.approx(rounds_by_enumeration(beta, tokens))


def test_perfect_drafts_give_full_blocks_and_hopeless_ones_single_tokens():
    assert expected_rounds([[1.0] * 7] * 24, 24) == 3
    assert expected_rounds([[1.0] * 7] * 25, 25) == 4
    assert expected_rounds([[0.0] * 7] * 24, 24) == 24


def test_lookup_copies_what_followed_the_most_recent_occurrence():
    prompt, answer = [1, 2, 3, 4, 9, 1, 2, 5], [1, 2, 5, 1, 7]
    beta = lookup_beta(prompt, answer, 4)
    # anchor 1: its last occurrence was followed by "2 5 1", which is the text; more had not been said
    assert beta[0] == [1.0, 1.0, 1.0, 0.0]
    # anchor 2 after "5 1": last "1 2" was followed by "5 1 2", of which "5 1" is the text
    assert beta[1] == [1.0, 1.0, 0.0, 0.0]
    assert beta[3] == [0.0, 0.0, 0.0, 0.0]  # the text went elsewhere


def test_lookup_without_any_match_proposes_nothing():
    assert lookup_beta([1, 2], [3, 4, 5], 3) == [[0.0] * 3] * 2


def test_distinct_8grams_tell_loops_from_text():
    assert distinct_8gram([[1, 2] * 20]) == 2 / 33 and distinct_8gram([list(range(50))]) == 1.0


def test_intervals_hold_the_ratio_and_shrink_with_more_texts():
    rng = random.Random(0)
    tokens = [rng.randint(20, 60) for _ in range(200)]
    rounds = [t / rng.uniform(2, 6) for t in tokens]
    few, many = (ratio_interval([list(zip(tokens[:n], rounds[:n], strict=True))]) for n in (20, len(tokens)))
    assert many[0] < sum(tokens) / sum(rounds) < many[1]
    assert many[1] - many[0] < few[1] - few[0]


def test_position_table_is_the_running_product():
    assert per_position([[[1.0, 0.5], [0.0, 1.0]]]) == [0.5, 0.25]


def test_rejection_sampling_has_the_targets_distribution():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(3, 5, generator=generator).softmax(-1) for _ in range(2))
    draws, counts, second = 20_000, torch.zeros(5), torch.zeros(5)
    for _ in range(draws):
        drafts = torch.multinomial(q[:2], 1, generator=generator)[:, 0]
        accepted, token = verify(drafts, q[:2], p, generator)
        emitted = [*drafts[:accepted].tolist(), token]
        counts[emitted[0]] += 1
        if len(emitted) > 1:
            second[emitted[1]] += 1
    for observed, expected in ((counts, p[0]), (second, p[1])):
        n = observed.sum()
        deviation = (observed / n - expected).abs() / (expected * (1 - expected) / n).sqrt()
        assert deviation.max() < FOUR_SIGMA


def test_at_temperature_zero_verification_is_equality():
    p = probabilities(torch.eye(4)[[2, 1, 3]], 0.0)
    assert p.argmax(-1).tolist() == [2, 1, 3] and p.sum() == 3
    drafts = torch.tensor([2, 3])
    assert verify(drafts, torch.nn.functional.one_hot(drafts, 4).float(), p, None) == (1, 1)


def trained(loaded, steps=150):
    """A drafter that is often right: a few steps on the target's own greedy answers."""
    from dflash_train.optimizer import make_optimizer
    from dflash_train.trainer import Trainer

    trainer = Trainer(loaded[0], resume=False)
    trainer.optimizer = make_optimizer(trainer.drafter, DraftOptimizer(learning_rate=1e-2))
    for _ in range(steps):
        index = [(trainer.state.step + i) % len(trainer.rows) for i in range(4)]
        loss, _ = trainer._loss(index)
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.step += 1
    trainer.close()
    return trainer.drafter.eval()


@pytest.mark.parametrize("options", [
    [], pytest.param(["drafter.markov_rank=8", "drafter.convolution_rank=4"], marks=pytest.mark.slow),
    ["drafter.markov_rank=8", "drafter.selector_top_k=4"],
    pytest.param(["drafter.causal=true", "drafter.window=null", "drafter.block_size=5"], marks=pytest.mark.slow)],
                         ids=lambda o: "-".join(o) or "plain")
def test_predicted_length_is_the_loops_count_and_text_is_unchanged(draft_recipe, options):
    """Contract C7, in float32 at temperature 0, where both are exact."""
    recipe = load_recipe(draft_recipe, options)
    target = load_target(recipe)
    drafter = trained([recipe])
    rows = read_jsonl(recipe.dflash.regenerate.prompts, "k")[:12]  # what it was trained on: often right
    prompts = [row_prompt(row, "prompt", target.tokenizer, "k") for row in rows]
    texts = [t for t in answer_all(target, prompts, 40, 0.0, seed=0) if len(t.answer) > 1]
    in_one_piece = []  # what is not becomes a product per anchor, each with a copy of the head
    watch = target.head.register_forward_pre_hook(lambda head, given: in_one_piece.append(given[0].is_contiguous()))
    judge(target, drafter, texts, 0.0)
    watch.remove()
    assert in_one_piece and all(in_one_piece)
    lengths = []
    for text in texts:
        told = plain(target, text.prompt, max_new_tokens=40, temperature=0.0)
        looped = speculate(target, drafter, text.prompt, max_new_tokens=40, temperature=0.0)
        assert told.tokens == looped.tokens == text.answer
        assert sum(looped.lengths) == len(text.answer) - 1
        lengths += looped.lengths
    predicted = summarize([t.beta for t in texts], [len(t.answer) - 1 for t in texts])
    assert predicted["rounds"] == len(lengths)
    assert predicted["length"] == pytest.approx(sum(lengths) / len(lengths), rel=C7_ACCEPTANCE)
    assert max(lengths) >= 3, "a drafter that is never right tests no rollback"
    seen, first = {}, [t.beta for t in texts]
    judge(target, drafter, texts, 0.0, seen)
    target.run = None  # what it computed is at hand
    judge(target, drafter, texts, 0.0, seen)
    assert [t.beta for t in texts] == first


def test_prediction_at_temperature_one_lies_within_the_loops_noise(loaded):
    recipe, target, _ = loaded
    drafter, prompt = trained(loaded), groups(recipe, target)["alpha", "open_t1"][0]
    generator = torch.Generator().manual_seed(0)
    measured = [speculate(target, drafter, prompt, max_new_tokens=24, temperature=1.0, generator=generator) for _ in range(60)]
    lengths = [n for run in measured for n in run.lengths]
    texts = answer_all(target, [prompt] * 60, 24, 1.0, seed=1)
    judge(target, drafter, texts, 1.0)
    predicted = summarize([t.beta for t in texts], [len(t.answer) - 1 for t in texts])["length"]
    spread = torch.tensor(lengths).float()
    assert abs(predicted - spread.mean()) < FOUR_SIGMA * float(spread.std()) * (2 / len(lengths)) ** 0.5


def test_batched_answers_are_those_of_each_prompt_alone(loaded):
    """Left padding, positions and the shrinking batch change nothing (float32, temperature 0)."""
    _, target, _ = loaded
    prompts = [[5, 6, 7], [9], [30, 31, 32, 33, 34, 35, 36], [50, 51]]
    together = generate(target, prompts, max_new_tokens=30, temperature=0.0)
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer == plain(target, prompt, max_new_tokens=30, temperature=0.0).tokens


def test_the_drafter_keeps_only_its_window_of_context(loaded):
    _, target, drafter = loaded
    target_hidden, _ = target.run(torch.randint(0, 200, (1, 70)))
    pieces, whole = DraftContext(drafter), DraftContext(drafter)
    for begin, end in itertools.pairwise([0, 1, 9, 40, 63, 70]):
        pieces.append(target_hidden[:, begin:end], begin)
    whole.append(target_hidden, 0)
    assert pieces.positions.tolist() == [list(range(70 - 23, 70))]
    settings = dict(temperature=0.0)
    with torch.no_grad():
        a, b = (draft(drafter, target, c, 7, 70, **settings)[0] for c in (pieces, whole))
    assert torch.equal(a, b)


def test_the_selector_finds_the_best_of_all_paths(loaded):
    from modeling.drafter import DFlashDraftModel, drafter_config

    torch.manual_seed(0)
    config = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                  head_dim=16, vocab_size=12, target_layer_ids=[0], num_target_layers=2, mask_token_id=0, rotary_base=1e4,
                  window=8, block_size=4, markov_rank=3, selector_top_k=12)
    drafter = DFlashDraftModel(drafter_config(**config))
    with torch.no_grad():
        drafter.markov_next.weight.normal_()
        drafter.markov_previous.weight.normal_()
        logits = torch.randn(3, 12)
        scores = {}
        for path in itertools.product(range(12), repeat=3):
            total, previous = 0.0, 5
            for row, token in zip(logits, path, strict=True):
                total += float((row + drafter.markov_bias(torch.tensor(previous))).log_softmax(-1)[token])
                previous = token
            scores[path] = total
        assert tuple(best_path(drafter, logits[None], torch.tensor([5]))[0].tolist()) == max(scores, key=scores.get)


def test_answers_of_one_token_have_nothing_to_accept():
    assert Text([1], [0]).beta == [] and lookup_beta([1], [0], 7) == []


class DrawsWhereTheGeneratorIs(TorchFunctionMode):
    """What is drawn with a generator has its device from a tensor or by name: on a card, the default (the CPU) is an error."""

    draws = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None:
            type(self).draws += 1
            given = [a.device for a in args if isinstance(a, torch.Tensor)] or [kwargs.get("device")]
            assert given == [generator.device], f"{function.__name__}: generator on {generator.device}, result on {given[0]}"
        return function(*args, **kwargs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_draws_on_the_generators_device(loaded, temperature):
    recipe, target, drafter = loaded
    prompts = groups(recipe, target)["alpha", "open_t1"][:2]
    DrawsWhereTheGeneratorIs.draws = 0
    with DrawsWhereTheGeneratorIs():
        texts = [t for t in answer_all(target, prompts, 12, temperature, seed=0) if len(t.answer) > 1]
        judge(target, drafter, texts, temperature)
        wall_clock(target, drafter, texts, 12, temperature, seed=0)
    assert DrawsWhereTheGeneratorIs.draws > 0


def test_answers_too_short_for_8grams_have_no_share_of_them():
    assert distinct_8gram([[1, 2, 3], []]) is None
    row = {"drafter": {"length": 1.0, "interval": [1.0, 1.0]}, "lookup": {"length": 1.0}}
    summary = {"detail": {"a": {"task_t0": row}}, "speedup": {}, "acceptance": {"a": {"distinct_8gram": None}}}
    assert list(table(summary).columns[-1].cells) == ["-"]


def test_a_summary_is_valid_json_whatever_was_measured():
    made = without_nan({"a": [1.0, float("nan"), {"b": (float("inf"), 2, None, "text", True)}]})
    assert made == {"a": [1.0, None, {"b": [None, 2, None, "text", True]}]}
    json.dumps(made, allow_nan=False)
