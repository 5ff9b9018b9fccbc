"""`--launch`: what is compared before it serves, what is said of it; a way that computes something else never serves."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from runtime_ref.backends.triton import launch as choice
from runtime_ref.backends.triton.megakernel import Megakernel
from runtime_ref.backends.triton.megakernel_drafter import MegakernelDrafter
from runtime_ref.core.launch_report import WaitGivenUp
from runtime_ref.core.sampling_params import SamplingParams
from tests.runtime_ref.kernels.at_once import INTERPRETED

compiled = pytest.mark.skipif(INTERPRETED, reason="minutes where kernels are interpreted: make test-kernels")
ANSWER = SamplingParams(max_tokens=6, ignore_eos=True)


def launched(small_engine, launch, **options):
    """An engine that serves two sequences."""
    return small_engine(launch=launch, max_running=2, prefix_cache=False, **options)


@compiled
@pytest.mark.parametrize("drafter", [True, False])
def test_the_persistent_launch_serves_where_it_has_the_bits_of_ops(small_engine, small_prompts, drafter):
    ops, engine = (launched(small_engine, launch, drafter=drafter) for launch in ("ops", "persistent"))
    assert isinstance(engine.backend.runner, Megakernel) and isinstance(engine.drafter, MegakernelDrafter) == drafter
    assert engine.launch.chosen == {"target": "persistent"} | ({"drafter": "persistent"} if drafter else {})
    assert engine.stats()["launch"] == engine.launch.chosen
    assert "target persistent" in engine.launch.line() and "\n" not in engine.launch.line()
    assert engine.launch.compared["target"] == (5 if drafter else 2)  # of one and two sequences: a token, a block, mixed
    assert engine.generate(small_prompts[:2], ANSWER) == ops.generate(small_prompts[:2], ANSWER)
    assert not any(engine.cache.used().values()), "the compared sequences gave their pages back"


@compiled
def test_auto_takes_the_fastest_equal_way_and_says_why(small_engine, monkeypatch):
    monkeypatch.setattr(choice, "_seconds", lambda part, runner, rounds: 1.0 if runner is None else 0.5)
    engine = launched(small_engine, "auto")
    assert engine.launch.chosen == {"target": "persistent", "drafter": "persistent"}
    assert engine.launch.seconds["target"] == {"ops": 1.0, "persistent": 0.5} and not engine.launch.refused
    monkeypatch.setattr(choice, "_seconds", lambda part, runner, rounds: 1.0 if runner is None else 2.0)
    engine = launched(small_engine, "auto")
    assert engine.launch.chosen == {"target": "ops", "drafter": "ops"} and engine.backend.runner is None


@compiled
def test_a_difference_is_named_by_its_first_op_and_ops_serve(small_engine, small_prompts, monkeypatch):
    """The router's factor is doubled for the megakernel alone: the first op that shows it is that layer's router."""
    right = choice.Megakernel.arguments

    def wrong(self, *given):
        arguments, constants = right(self, *given)
        return arguments | {"factor": 2 * arguments["factor"]}, constants

    expected = launched(small_engine, "ops").generate(small_prompts[:2], ANSWER)
    monkeypatch.setattr(choice.Megakernel, "arguments", wrong)
    with pytest.warns(UserWarning, match=r"target persistent: .* first in layer 1: norm_route\(x\) -> .*; ops serve"):
        engine = launched(small_engine, "persistent")
    assert engine.launch.chosen == {"target": "ops", "drafter": "persistent"} and engine.backend.runner is None
    assert engine.launch.different == [("target", "persistent")] and "norm_route" in engine.launch.line()
    assert engine.generate(small_prompts[:2], ANSWER) == expected


@compiled
@pytest.mark.parametrize("part", ["target", "drafter"])
def test_a_wait_that_is_given_up_while_serving_is_found_before_its_tokens_are_used(small_engine, small_prompts, part):
    engine = launched(small_engine, "persistent")
    request = engine.add(small_prompts[1], ANSWER)
    engine.step()
    runner, said = engine.backend.runner if part == "target" else engine.drafter, len(engine._sequences[request].tokens)
    runner.scratch["failed"].fill_(1)
    with pytest.raises(WaitGivenUp, match="rank 0: a program gave up waiting"):
        engine.step()
    assert len(engine._sequences[request].tokens) == said


def test_ways_that_are_not_there_are_refused_by_name_in_one_line(small_engine, make_engine):
    with pytest.raises(ValueError, match="CUDA graphs of steps need a GPU.*expected --launch auto, persistent or ops"):
        launched(small_engine, "graph")
    with pytest.raises(ValueError, match="launch 'loop': expected auto, persistent, graph, ops"):
        launched(small_engine, "loop")
    with pytest.raises(ValueError, match="--launch persistent: the torch backend has no other way than its ops"):
        make_engine(backend="torch", launch="persistent")
    assert make_engine(backend="torch").launch.chosen["target"] == "ops"


def test_all_numbers_of_sequences_that_will_be_served_are_compared(small_engine):
    engine = small_engine(launch="ops", max_running=4)
    rounds = choice.Rounds(engine.backend, engine.drafter, engine.program, engine.cache, 4, engine.context)
    counts = rounds.counts()
    assert {len(c) for c in counts} == {1, 2, 3, 4} and all(sum(c) <= 64 for c in counts)
    assert [1] * 4 in counts and [engine.drafter.block] * 4 in counts
    assert torch.is_tensor(rounds.features[0])
    rounds.release()
    assert not any(engine.cache.used().values())
