"""What the GPU suite can prove of itself without a GPU: its oracle, its checks, and that red checks forbid speeds."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from tolerance import ATTENTION_KERNEL, EXPERTS_KERNEL, MODEL_FP32

from runtime_ref.kernels import gpu_checks, gpu_suite
from tests.runtime_ref.kernels import expert_cases as cases
from tests.runtime_ref.kernels.at_once import INTERPRETED


def test_its_oracle_is_the_models_experts():
    weights = cases.make_weights()
    x, index, weight = cases.make_tokens(9)
    expected = cases.oracle(weights)(x.float(), index.long(), weight)
    torch.testing.assert_close(gpu_checks.reference(x, index, weight, cases.make_pages(weights)), expected, **MODEL_FP32)


def test_its_tolerance_is_the_tests_tolerance():
    assert gpu_checks.TOLERANCE == EXPERTS_KERNEL == ATTENTION_KERNEL


def test_its_check_of_the_experts_is_green_on_good_and_red_on_broken_kernels(monkeypatch):
    pages = cases.make_pages(cases.make_weights())
    (good,) = gpu_checks.check_experts("small", pages, cases.launched(), (2,))
    assert good["passed"], good
    kernel = gpu_checks.run_experts
    monkeypatch.setattr(gpu_checks, "run_experts", lambda *args: kernel(*args).mul_(1.01))
    (wrong,) = gpu_checks.check_experts("small", pages, cases.launched(), (2,))
    assert not wrong["passed"] and "relative error" in wrong["detail"]


@pytest.mark.parametrize("window", [None, 128])
def test_its_check_of_attention_is_green(window):
    check = gpu_checks.check_attention(window, "cpu", float_dot=INTERPRETED)
    assert check["passed"], check


def test_no_speed_is_measured_after_a_red_check(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(gpu_checks, "check_kernels", lambda: [{"name": "decoding", "passed": False, "detail": "2 differ"}])
    monkeypatch.setattr(gpu_suite, "measure", lambda *_: pytest.fail("measured on red"))
    assert gpu_suite.run(tmp_path / "gpu.json") == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["checks"][0]["detail"] == "2 differ" and "bandwidth" not in report
    assert "no speed was measured" in capsys.readouterr().out


@pytest.mark.long
def test_its_check_of_whole_steps_is_green_in_the_interpreter_and_red_when_a_walk_differs(monkeypatch):
    from runtime_ref.kernels import gpu_steps

    monkeypatch.setitem(gpu_steps.TOY, "vocab_size", 100)
    checks = gpu_steps.check_steps("cpu", 1)
    assert [check["passed"] for check in checks] == [True, True], checks
    monkeypatch.setattr(gpu_steps.PersistentStep, "failed", lambda self: True)
    monkeypatch.setitem(gpu_steps.TOY, "num_hidden_layers", 1)
    monkeypatch.setitem(gpu_steps.TOY, "hybrid_layer_pattern", [0])
    monkeypatch.setitem(gpu_steps.TOY, "moe_layer_freq", [1])
    assert [check["passed"] for check in gpu_steps.check_steps("cpu", 1)] == [True, False]


def test_its_check_of_fake_quantization_is_green_and_red_on_another_rule(monkeypatch):
    from runtime_ref.kernels import gpu_steps

    assert gpu_steps.check_fake_quantize("cpu")["passed"]
    real = gpu_steps.fake_quantize_fused_
    monkeypatch.setattr(gpu_steps, "fake_quantize_fused_", lambda out, w, scale_rule: real(out, w, scale_rule="even"))
    assert not gpu_steps.check_fake_quantize("cpu")["passed"]


def test_a_rank_of_eight_is_a_model_with_an_eighth_of_every_shared_size():
    from modeling.released import released_config
    from runtime_ref.kernel_weights import layer_heads, layer_shapes
    from runtime_ref.kernels.gpu_steps import projected, rank_config
    from runtime_ref.parallel import ALONE

    config = rank_config(released_config("MiMo-V2.5-Pro"), 8)
    heads = layer_heads(config, 0, ALONE)
    assert (heads.queries, heads.keys, heads.d, heads.v) == (16, 1, 192, 128) and config.moe_intermediate_size == 256
    shapes = layer_shapes(config, 1, ALONE, frozenset({"qkv"}))
    pages = sum(torch.Size(shapes[name][0]).numel() for name in ("up_pages", "down_pages"))
    assert pages == 384 * 3 * 6144 * 256 * 17 // 32
    assert projected(4.4e-3, 140)["tokens_per_second"]["5 us"] == pytest.approx(6.30 / (4.4e-3 + 140 * 5e-6))
    with pytest.raises(ValueError, match="expected a multiple of 7 ranks"):
        rank_config(released_config("MiMo-V2.5-Pro"), 7)


def test_a_part_begins_only_while_what_comes_after_it_still_fits(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: now[0])
    plan = gpu_suite.Plan()
    now[0] = gpu_suite.SECONDS - sum(gpu_suite.PARTS.values())
    assert plan.begins("experts", "a variant") and not plan.skipped
    now[0] += 1
    assert not plan.begins("experts", "a variant") and plan.begins("quantize", "rounding") and plan.skipped == ["a variant"]
    alone = gpu_suite.Plan(["experts"])
    now[0] += gpu_suite.SECONDS - gpu_suite.PARTS["experts"]
    assert alone.begins("experts", "a variant") and not alone.begins("steps", "a step") and not alone.skipped
    with pytest.raises(ValueError, match="--only: 'expert', expected some of experts, quantize"):
        gpu_suite.Plan(["expert"])
