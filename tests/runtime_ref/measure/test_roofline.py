"""The limit model reproduces published facts of the geometry and numbers worked out by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from modeling.published_geometries import released_config
from runtime_ref.measure import roofline

ROOT = Path(__file__).resolve().parents[3]
PRO = released_config("MiMo-V2.5-Pro")


@pytest.mark.parametrize("tokens, distinct, experts_gb, target_gb", [
    (1, 8.0, 11.1, 39.3), (4, 31.0, 42.9, 71.2), (8, 59.5, 82.4, 110.6), (16, 109.8, 152.0, 180.2)])
def test_bytes_of_a_step(tokens, distinct, experts_gb, target_gb):
    read = roofline.step_bytes(PRO, tokens)
    assert round(read.distinct, 1) == distinct
    assert round(read.experts / 1e9, 1) == experts_gb
    assert round((read.experts + read.fixed) / 1e9, 1) == target_gb


def test_bytes_with_drafter():
    assert round(roofline.expert_bytes(PRO) / 1e6, 2) == 20.05
    assert round(roofline.step_bytes(PRO, 8).drafter / 1e9, 1) == 7.4
    assert round(roofline.step_bytes(PRO, 8).total / 1e9, 1) == 118.0


@pytest.mark.parametrize("bandwidth, share, rates", [
    (4.8e12, 1.0, (2049, 1669, 1387, 1160, 1202, 835)), (4.3e12, 1.0, (1836, 1525, 1263, 1054, 1107, 762)),
    (8.0e12, 1.0, (3416, 2476, 2096, 1781, 1700, 1238)), (4.8e12, 0.6, (2843, 2160, 1816, 1533, 1511, 1080)),
    (7.2e12, 0.6, (4264, 2893, 2474, 2119, 1940, 1447))])
def test_tokens_per_second_at_acceptance_6_30(bandwidth, share, rates):
    read = roofline.step_bytes(PRO, 8, distinct_share=share)
    for (fraction, seconds), rate in zip(((1, 0), (1, 5e-6), (.8, 5e-6), (.65, 5e-6), (.8, 1e-5), (.5, 1e-5)), rates,
                                         strict=True):
        time = roofline.step_seconds(read, gpus=8, bandwidth=bandwidth, fraction=fraction,
                                     all_reduces=roofline.all_reduces_per_step(PRO), all_reduce_seconds=seconds)
        assert round(6.30 / time) == rate


@pytest.mark.parametrize("fraction, rates", [(0.5, (959, 920, 867, 805)), (0.7, (1309, 1237, 1143, 1038)),
                                             (0.9, (1643, 1531, 1389, 1236))])
def test_all_reduce_scenarios(fraction, rates):
    read = roofline.step_bytes(PRO, 8)
    for seconds, rate in zip((3e-6, 5e-6, 8e-6, 12e-6), rates, strict=True):
        assert round(6.30 / roofline.step_seconds(read, gpus=8, bandwidth=4.8e12, fraction=fraction, all_reduces=140,
                                            all_reduce_seconds=seconds)) == rate


def test_without_speculation():
    read = roofline.step_bytes(PRO, 1, drafter=False)
    assert round(1 / roofline.step_seconds(read, gpus=8, bandwidth=4.8e12)) == 976
    assert round(1 / roofline.step_seconds(read, gpus=8, bandwidth=8.0e12)) == 1627


def test_one_layer_of_one_rank():
    distinct, size = roofline.experts_call(PRO, 8, 8)
    assert round(size / 1e6, 1) == 149.2
    assert round(size / 4.8e12 * 1e6, 1) == 31.1


def test_instruction_budget():
    assert round(roofline.lane_instructions_per_weight("H200"), 2) == 3.70
    assert round(roofline.lane_instructions_per_weight("B200"), 2) == 2.33


def test_goals_of_the_expert_kernel():
    """70 % and 80 % of an H200's bandwidth for the 149 MB of a layer's experts on one of eight ranks, at eight tokens."""
    text = roofline.report("MiMo-V2.5-Pro", PRO, tokens=8, acceptance=6.3, gpus=8)
    assert "goal 70% 44.4 us, moonshot 80% 38.9 us" in text


def test_bench_prints_the_model_without_torch_or_triton():
    code = ("import sys, runpy; sys.argv = ['runtime_ref/bench.py', '--roofline']\n"
            "try: runpy.run_path('runtime_ref/bench.py', run_name='__main__')\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "assert not {'torch', 'triton', 'transformers'} & sys.modules.keys()")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "118.0 GB" in out and "projected" in out
    assert "published by others" in out and "1.72 ms per token" in out and "not measured here" in out


def test_unknown_model_is_one_line_and_exit_code_2():
    ran = subprocess.run([sys.executable, "runtime_ref/bench.py", "--roofline", "--model", "MiMo-V2.5-Por"], cwd=ROOT,
                         capture_output=True, text=True)
    assert ran.returncode == 2 and "did you mean MiMo-V2.5-Pro?" in ran.stderr and "Traceback" not in ran.stderr


def test_without_triton_the_commands_that_need_it_say_so_in_one_line(monkeypatch, tmp_path, capsys):
    import importlib.util

    from runtime_ref import bench
    from runtime_ref.backends import load

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for arguments in (["--suite", "gpu", "--json", str(tmp_path / "x.json")], ["--static"]):
        assert bench.main(arguments) == 2
        assert "triton is not installed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="backend 'triton': triton is not installed"):
        load.load_backend("triton", tmp_path, pages={}, context=0)
