"""The final comparison: equal weights show no damage, the model is left as it was, sums do not depend on batching."""

import pytest
import torch
from tolerance import EVALUATION_KL

from mxfp4 import fake_quantize
from qat.evaluate import HeldOut, compare, comparison_table, doubt, evaluate_domains, helped, summarized
from qat.expert_quantizer import ExpertQuantizer
from qat.trainer import make_teacher


@pytest.fixture
def domains():
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randint(0, 250, (5, 24), generator=generator), "b": torch.randint(0, 250, (3, 24), generator=generator)}


@pytest.fixture
def attached(model):
    model.requires_grad_(False)
    teacher = make_teacher(model)
    quantizer = ExpertQuantizer(model)
    return model, teacher, quantizer, [teacher.get_parameter(t.name).data for t in quantizer.tensors]


def test_a_teacher_shares_what_is_frozen_and_keeps_the_original_experts(attached):
    model, teacher, quantizer, originals = attached
    assert teacher.get_parameter("lm_head.weight") is model.get_parameter("lm_head.weight")
    for tensor, original in zip(quantizer.tensors, originals, strict=True):
        assert torch.equal(tensor.parameter, fake_quantize(original)) and not torch.equal(tensor.parameter, original)


@pytest.mark.parametrize("dtype", ["model", "float32"])
def test_untrained_qat_weights_are_plain_rounding(attached, domains, dtype):
    model, teacher, quantizer, originals = attached
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    summary = compare(model, teacher, quantizer, originals, domains, batch_size=2, dtype=dtype)
    assert summary["bf16"]["kl"] == 0 and summary["bf16"]["top1_agreement"] == 1
    assert summary["qat"] == summary["ptq"] and summary["ptq"]["kl"] > 0 and summary["kl_gap_closed"] == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert comparison_table(summary).row_count == 9


def test_held_out_rows_are_those_of_the_evaluation_each_on_its_own(attached, domains):
    model, teacher, quantizer, _ = attached
    for tensor in quantizer.tensors:
        tensor.parameter.data.mul_(-20)
    found = HeldOut(teacher, domains, sequences=4, batch_size=3, chunk_tokens=7).measure(model)
    for name, rows in domains.items():
        alone = [evaluate_domains(model, teacher, {name: row[None]}, batch_size=1)[name]["kl"] for row in rows[:4]]
        assert found["row_kl"][name] == pytest.approx(alone, rel=1e-3)
    every = [kl for rows in found["row_kl"].values() for kl in rows]
    assert found["kl"] == pytest.approx(sum(every) / len(every), rel=1e-3) and found["eval_tokens"] == 7 * 23


def test_original_weights_close_the_whole_gap(attached, domains):
    model, teacher, quantizer, originals = attached
    with torch.no_grad():
        for tensor, original in zip(quantizer.tensors, originals, strict=True):
            tensor.parameter.copy_(original)
    summary = compare(model, teacher, quantizer, originals, domains, batch_size=2)
    assert summary["qat"]["kl"] == pytest.approx(0, abs=EVALUATION_KL)
    assert summary["kl_gap_closed"] == pytest.approx(1, abs=1e-3)
    assert "kl_gap_closed_interval" not in summary and "rows" not in comparison_table(summary).title  # three of one domain


SHOWN = {"loss": 1.0, "kl": 0.1, "top1_agreement": 0.9, "domains": {}}


def summary_of(*domains: list[tuple[float, float, float]]) -> dict:
    """What `summarized` says of rows (plain KL, KL after training, tokens), a list of them per domain."""
    found = {}
    for name, place in (("bf16", None), ("ptq", 0), ("qat", 1)):
        kl = [[0.0 if place is None else row[place] for row in rows] for rows in domains]
        tokens = [[row[2] for row in rows] for rows in domains]
        total = sum(k * n for of, counts in zip(kl, tokens, strict=True) for k, n in zip(of, counts, strict=True))
        found[name] = {"all": {"kl": total / sum(map(sum, tokens))}} | {
            str(i): {"row_kl": of, "row_tokens": counts} for i, (of, counts) in enumerate(zip(kl, tokens, strict=True))}
    return summarized(found)


def test_the_interval_is_of_the_gap_that_is_said_and_a_run_that_may_be_noise_is_said_to_be():
    mixed = summary_of([(0.1, 0.05, 20), (0.2, 0.3, 20), (0.1, 0.02, 20), (0.2, 0.1, 20)] * 2)
    low, high = mixed["kl_gap_closed_interval"]
    assert low < 0 < mixed["kl_gap_closed"] < high
    assert helped(mixed) and "cannot be told" in doubt(mixed)
    assert "over rows" in comparison_table(mixed | {name: SHOWN for name in ("bf16", "ptq", "qat")}).title
    weighted = summary_of([(0.2, 0.1, 1000)] * 10 + [(0.2, 0.5, 10)] * 10)
    low, high = weighted["kl_gap_closed_interval"]
    assert 0.3 < low < weighted["kl_gap_closed"] < high < 0.5 and doubt(weighted) is None
    whole = summary_of([(0.3, 0.0, 5)] * 4, [(0.1, 0.0, 7)] * 5)
    assert whole["kl_gap_closed_interval"] == [1, 1]
    for few in (summary_of([(0.2, 0.1, 5)] * 8, [(0.2, 0.1, 5)]), summary_of([(0.2, float("nan"), 5)] * 8)):
        assert "kl_gap_closed_interval" not in few


@pytest.mark.parametrize("dtype", ["model", "float32"])
def test_plain_rounding_is_of_the_original_model_whatever_else_was_trained(model, domains, dtype):
    teacher = make_teacher(model)  # nothing is frozen: all of it is the teacher's own
    quantizer = ExpertQuantizer(model)
    originals = [teacher.get_parameter(t.name).data for t in quantizer.tensors]
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    untrained = compare(model, teacher, quantizer, originals, domains, batch_size=2, dtype=dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
        model.get_parameter("model.layers.0.self_attn.o_proj.weight").mul_(0.5)
    trained = compare(model, teacher, quantizer, originals, domains, batch_size=2, dtype=dtype)
    assert trained["ptq"] == untrained["ptq"] and trained["bf16"] == untrained["bf16"]
    assert trained["qat"]["kl"] > 2 * trained["ptq"]["kl"]
    assert all(torch.equal(p, before[n]) for n, p in teacher.named_parameters())


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_sums_do_not_depend_on_the_batch_size(attached, domains, batch_size):
    model, teacher, _, _ = attached
    reference = evaluate_domains(model, teacher, domains, batch_size=3)
    other = evaluate_domains(model, teacher, domains, batch_size=batch_size, chunk_tokens=17)
    for domain, row in reference.items():
        for key in () if domain == "all" else ("row_kl", "row_tokens"):
            assert other[domain].pop(key) == pytest.approx(row.pop(key), rel=1e-4, abs=EVALUATION_KL)
        assert other[domain] == pytest.approx(row, rel=1e-4, abs=EVALUATION_KL)
    assert reference["all"]["eval_tokens"] == 8 * 23


@pytest.mark.parametrize(("plain", "trained", "said"), [(0.01, 0.004, False), (0.01, 0.01, True), (0.01, 3.0, True)])
def test_a_run_that_did_not_help_is_told(plain, trained, said):
    line = doubt({"ptq": {"kl": plain}, "qat": {"kl": trained}})
    assert (line is not None) == said and (not said or f"{trained:.5f}" in line)


def test_what_losses_do_not_cover_is_not_judged(attached, domains):
    """Marking tokens leaves the model's input as it is: means over parts add up to the mean over all."""
    model, teacher, _, _ = attached
    whole = evaluate_domains(model, teacher, domains, batch_size=3)["all"]
    generator = torch.Generator().manual_seed(0)
    parts = []
    chosen = {name: torch.rand(rows.shape, generator=generator) < 0.4 for name, rows in domains.items()}
    for marked in (chosen, {name: ~mask for name, mask in chosen.items()}):
        rows = {name: torch.where(marked[name], ~ids, ids) for name, ids in domains.items()}
        parts.append(evaluate_domains(model, teacher, rows, batch_size=2)["all"])
    assert sum(part["eval_tokens"] for part in parts) == whole["eval_tokens"]
    for key in ("loss", "kl", "top1_agreement"):
        total = sum(part[key] * part["eval_tokens"] for part in parts) / whole["eval_tokens"]
        assert total == pytest.approx(whole[key], rel=1e-4, abs=EVALUATION_KL)
