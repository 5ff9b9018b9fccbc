"""Every kernel compiles for every target, without a GPU, and holds its gates; the gates can fail."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from runtime_ref.measure.static.gates import AMD, AMD_HW_FP4, NVIDIA, Row, quads_together
from runtime_ref.measure.static.sass import Loop, read_listing

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """`bench.py --static` in a process of its own, because this one has chosen the interpreter."""
    folder = tmp_path_factory.mktemp("static")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "runtime_ref/bench.py", "--static", "--json", str(folder / "static.json"), "--page",
                          str(folder / "static.md")], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads((folder / "static.json").read_text()), (folder / "static.md").read_text()


def test_every_kernel_compiles_for_every_target(static):
    facts, page = static
    assert {row["target"] for row in facts["kernels"]} == set(NVIDIA)
    assert set(facts["amd_bytes"]) == {*AMD, AMD_HW_FP4} and all(facts["amd_bytes"].values())
    assert "All gates hold." in page and facts["faults"] == []


def test_the_expert_kernel_stays_within_the_instruction_budget(static):
    gated = [row for row in static[0]["kernels"] if row["budget"] is not None]
    assert [row["budget"] for row in gated] == [1.0] * 2 + [3.5] * 12
    for row in gated:
        assert len(row["lane_instructions"]) == 2 and max(row["lane_instructions"]) <= row["budget"]
        assert row["stack"] == row["local_accesses"] == 0 and row["registers"] <= 128
        assert row["wide_loads"] and row["matrix_instructions"]


def test_the_committed_table_is_the_compilers(static):
    """Another triton may compile differently; the same one must give the committed numbers."""
    committed = json.loads((ROOT / "docs/results/kernels-static.json").read_text())
    if committed["triton"] != static[0]["triton"]:
        pytest.skip(f"the table was made with triton {committed['triton']}")
    assert committed["kernels"] == static[0]["kernels"]


GOOD = Row("k", "sm_90a", 128, 0, 0, 4, 32, (3.2, 3.1), True, 3.5)


@pytest.mark.parametrize("change, words", [
    ({"stack": 8}, "spills (8 bytes"), ({"local_accesses": 2}, "2 local accesses"), ({"registers": 129}, "129 registers"),
    ({"quads": False}, "packed word"), ({"wide_loads": 0}, "no 128-bit load"), ({"matrix_instructions": 0}, "no tensor-core"),
    ({"lane_instructions": (3.2, 3.51)}, "lane-instructions"), ({"lane_instructions": (3.2,)}, "two hot loops")])
def test_each_gate_can_fail(change, words):
    assert GOOD.faults() == []
    assert any(words in fault for fault in replace(GOOD, **change).faults())


@pytest.mark.parametrize("layout, together", [
    ("#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>", True),
    ("#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>", False),
    ("#blocked", True), ("#thin", False), ("#turned", False)])
def test_a_layout_that_tears_packed_words_apart_is_found(layout, together):
    ir = f"""
#blocked = #ttg.blocked<{{sizePerThread = [1, 4], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}}>
#thin = #ttg.blocked<{{sizePerThread = [1, 2], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}}>
#turned = #ttg.blocked<{{sizePerThread = [1, 4], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [0, 1]}}>
  %1:2 = tt.elementwise_inline_asm "mul.rn.bf16x2 $0, a, $5;" %0 : tensor<64x128xi8, {layout}>, tensor<64x128xbf16, {layout}>
"""
    assert quads_together(ir) is together


def test_loops_are_branches_backwards():
    listing = """
.L_x_1:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
.L_x_3:
"""
    instructions, loops = read_listing(listing)
    assert len(instructions) == 7
    assert loops == [Loop(1, 3), Loop(0, 4)]


def test_static_refuses_the_interpreter():
    ran = subprocess.run([sys.executable, "runtime_ref/bench.py", "--static"], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"TRITON_INTERPRET": "1"})
    assert ran.returncode == 2 and "TRITON_INTERPRET=1 is set" in ran.stderr and "Traceback" not in ran.stderr


def test_the_gpu_suite_refuses_a_machine_without_a_gpu(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ran = subprocess.run([sys.executable, "runtime_ref/bench.py", "--suite", "gpu", "--json", str(tmp_path / "gpu.json")],
                         cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and "torch sees no GPU" in ran.stderr and "Traceback" not in ran.stderr
    assert not list(tmp_path.iterdir())


def test_a_signal_to_eight_ranks_is_one_fence_and_one_exchange_behind_the_programs_barrier():
    """Each fence of the whole system is a round trip of the memory system, for every tile of 140 sums of a step."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "tests/runtime_ref/measure/fences.py"], cwd=ROOT, env=environment,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    (fence,), (exchange,) = found["fences"], found["exchanges"]
    assert found["barriers"] and max(found["barriers"]) < fence < exchange
    assert found["instructions"] < 60
