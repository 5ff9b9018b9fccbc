"""What the GPU suite can prove of itself without a GPU: its oracle, its checks, and that red checks forbid speeds."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from tolerance import ATTENTION_KERNEL, EXPERTS_KERNEL, MODEL_FP32

from runtime_ref.kernels import gpu_suite
from tests.runtime_ref.kernels import expert_cases as cases


def test_its_oracle_is_the_models_experts():
    weights = cases.make_weights()
    x, index, weight = cases.make_tokens(9)
    expected = cases.oracle(weights)(x.float(), index.long(), weight)
    torch.testing.assert_close(gpu_suite.reference(x, index, weight, cases.make_pages(weights)), expected, **MODEL_FP32)


def test_its_tolerance_is_the_tests_tolerance():
    assert gpu_suite.TOLERANCE == EXPERTS_KERNEL == ATTENTION_KERNEL


def test_its_check_of_the_experts_is_green_on_good_and_red_on_broken_kernels(monkeypatch):
    pages = cases.make_pages(cases.make_weights())
    (good,) = gpu_suite._check_experts("small", pages, cases.interpreted(), (2,))
    assert good["passed"], good
    kernel = gpu_suite.run_experts
    monkeypatch.setattr(gpu_suite, "run_experts", lambda *args: kernel(*args).mul_(1.01))
    (wrong,) = gpu_suite._check_experts("small", pages, cases.interpreted(), (2,))
    assert not wrong["passed"] and "relative error" in wrong["detail"]


@pytest.mark.parametrize("window", [None, 128])
def test_its_check_of_attention_is_green(window):
    check = gpu_suite.check_attention(window, "cpu", float_dot=True)
    assert check["passed"], check


def test_no_speed_is_measured_after_a_red_check(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(gpu_suite, "check_kernels", lambda: [{"name": "decoding", "passed": False, "detail": "2 differ"}])
    monkeypatch.setattr(gpu_suite, "measure", lambda *_: pytest.fail("measured on red"))
    assert gpu_suite.run(tmp_path / "gpu.json") == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["checks"][0]["detail"] == "2 differ" and "bandwidth" not in report
    assert "no speed was measured" in capsys.readouterr().out
