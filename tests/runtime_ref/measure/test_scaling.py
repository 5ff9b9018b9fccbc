"""Users and prices from the limit model: worked out by hand, and measured figures in the place of assumptions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from modeling.published_geometries import released_config
from runtime_ref import bench
from runtime_ref.measure import roofline, scaling

ROOT = Path(__file__).resolve().parents[3]
PRO = released_config("MiMo-V2.5-Pro")
PLAIN = scaling.Assumptions()


def test_a_step_of_one_user_is_the_limit_models_with_barriers_and_a_cache():
    """118 GB of weights and 0.46 + 0.01 GB of keys and values at 70 % of 8 x 4.8 TB/s; 150 sums, 384 barriers."""
    own = scaling.step(PRO, "H200", 1, 8, PLAIN)
    cache = 2 * 8 * 320 * (10 * 8192 + 60 * 128)
    assert scaling.cache_bytes(PRO, 8192) == cache and round(cache / 1e9, 2) == 0.46
    assert own.reading == pytest.approx((roofline.step_bytes(PRO, 8).total + cache) / (8 * 0.7 * 4.8e12))
    assert own.barriers == pytest.approx((5 * 70 + 1 + 6 * 5 + 3) * 1.5e-6)
    assert own.sums == pytest.approx(150 * (5e-6 + 2 * 7 / 8 * 8 * 6144 * 2 / 450e9))
    assert own.arithmetic < own.reading and own.total == own.reading + own.sums + own.barriers


def test_a_tokens_operations_are_two_for_each_weight_that_it_meets():
    """42 B active parameters, the embedding not among them; attention over one token hardly counts."""
    assert round(scaling.operations(PRO, 1) / 2e9, 1) == 41.0


def test_users_share_what_a_step_reads_and_read_their_own_caches():
    one, many = (scaling.step(PRO, "H200", users, 8, PLAIN) for users in (1, 64))
    assert many.reading < 6 * one.reading and many.arithmetic == pytest.approx(64 * one.arithmetic)
    longer = scaling.step(PRO, "H200", 64, 8, replace(PLAIN, context=131072))
    assert longer.reading - many.reading == pytest.approx(64 * 2 * 8 * 320 * 10 * (131072 - 8192) / (8 * 0.7 * 4.8e12))


def test_a_drafter_can_lose_with_some_users_and_pay_with_fewer_and_more():
    lost = scaling.slower(PRO, "H200", 3.18, 8, PLAIN, 8)
    assert lost and 1 not in lost and 64 not in lost and lost == list(range(lost[0], lost[-1] + 1))
    assert scaling.slower(PRO, "H200", 8.0, 8, PLAIN, 8) == []


def test_what_a_gpu_measured_takes_the_place_of_an_assumption(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"device": "NVIDIA H200", "date": "2026-12-05T10:00:00", "revision": "abc", "experts": [
        {"failed": False, "share_of_stated": {"H200": 0.61}}, {"failed": True, "share_of_stated": {"H200": 0.9}}],
        "step": {"barrier_seconds": 2e-6}}))
    card, found = scaling.measured(path, PLAIN)
    assert (card, found.share, found.barrier_seconds, found.dollars) == ("H200", 0.61, 2e-6, PLAIN.dollars)
    page = tmp_path / "scaling.md"
    assert bench.main(["--scaling", "--measured", str(path), "--price", "B200=5.5", "--page", str(page)]) == 0
    words = page.read_text()
    assert words in capsys.readouterr().out and words.count("**measured**: ") == 2
    assert "| bandwidth reached | 61% of 4.8 TB/s | **measured**: 61% of the stated bandwidth" in words
    assert "| price | $5.50 per GPU and hour | assumed |" in words and words.count("$3.00") == 2


@pytest.mark.parametrize("arguments, said", [
    (["--measured", "missing.json"], "--measured missing.json: FileNotFoundError"), (["--price", "H100=2"], "--price H100=2"),
    (["--price", "H200=cheap"], "expected one of H200"), (["--context", "0"], "must be positive"),
    (["--model", "MiMo-V2.5-Por"], "did you mean MiMo-V2.5-Pro?")])
def test_a_mistake_is_one_line(arguments, said, capsys):
    assert bench.main(["--scaling", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_report_of_another_card_is_refused(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"device": "NVIDIA A100", "date": "2026-12-05", "revision": "abc"}))
    with pytest.raises(ValueError, match="'NVIDIA A100', expected one of H200"):
        scaling.measured(path, PLAIN)


def test_the_committed_page_is_what_its_command_prints(capsys):
    committed = (ROOT / "docs/results/scaling.md").read_text()
    command = next(line for line in committed.splitlines() if line.startswith("    python runtime_ref/bench.py "))
    arguments = command.split()[2:]
    at = arguments.index("--page")
    assert bench.main(arguments[:at] + arguments[at + 2:]) == 0
    assert capsys.readouterr().out.replace(" ".join(arguments[:at]), " ".join(arguments)).strip() == committed.strip()
