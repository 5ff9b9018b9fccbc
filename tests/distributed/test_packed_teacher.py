"""`qat.teacher: packed`: the teacher's experts stay in the FP8 codes of the base, and teach what the decoded ones do."""

import json

import pytest
import torch
from ranks import on_ranks
from sharded_cases import SHARDED, recipe_beside, train
from toy_families import pack, write_base

TWO = ("qat.steps=3", "qat.health_every=3", *SHARDED, "cluster.accelerators_per_node=2")
EP = (*TWO, "cluster.expert_parallel=2")
GPTQ = ("qat.warm_start.method=gptq", "qat.warm_start.sequences=8", "qat.heldout_every=2")
CASES = {"fsdp": (*TWO, *GPTQ), "ep": (*EP, "qat.gradient_checkpointing=true")}


@pytest.fixture(scope="module", params=["qwen3", "mimo"])
def recipe(request, text_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_base(folder / "base", request.param, 4)
    pack(folder / "base", "fp8")
    return recipe_beside(folder / "base", text_files)


def teach(rank: int, recipe, cases: dict) -> tuple[dict, dict]:
    """What `sharded_cases.train` returns, and of every expert tensor of the packed teacher: bytes kept, bytes of the
    parameter's own memory, weights, columns."""
    from qat.sharded import ShardedTrainer

    held, again = {}, ShardedTrainer.teacher_again

    def looked_at(job):
        teacher = again(job)
        for name, shard in job.packed.items():
            local = teacher.get_parameter(name)._local_tensor
            held[name] = (shard.packed.nbytes, local.untyped_storage().nbytes(), local.numel(), local.shape[2])
        return teacher

    ShardedTrainer.teacher_again = looked_at
    return train(rank, recipe, cases), held


def test_fp8_codes_teach_what_decoded_weights_do_in_half_their_memory(recipe, tmp_path):
    cases = {}
    for name, options in CASES.items():
        cases |= {name: (*options, "finish"), f"{name}-packed": (*options, "qat.teacher=packed", "finish")}
    found, held = on_ranks(2, tmp_path, teach, recipe, cases, timeout=1800)[0]
    for name in CASES:
        a, b = found[name], found[f"{name}-packed"]
        assert a["losses"] == b["losses"] and a["norms"] == b["norms"]
        for kind in ("masters", "rounded"):
            assert all(torch.equal(a[kind][n], b[kind][n]) for n in a[kind])
        first, second = (json.loads((recipe.parent / f"runs/{n}/qat/summary.json").read_text())
                         for n in (name, f"{name}-packed"))
        assert all(first[v] == second[v] for v in ("bf16", "ptq", "qat"))
    assert len(held) == len(found["fsdp"]["masters"])
    for packed, own, weights, columns in held.values():
        assert own == 0 and packed == weights + weights // columns * 4 * -(-columns // 128)


def said(rank: int, recipe, options) -> list[str]:
    from qat.sharded import ShardedTrainer
    from recipes.load import load_recipe

    lines = []
    ShardedTrainer.say = lambda job, text: lines.append(text)
    job = ShardedTrainer(load_recipe(recipe, list(options)), resume=False)
    job.update(job.batches())
    return lines


def test_a_base_that_is_not_fp8_is_said_and_taught_by_as_it_is(text_files, tmp_path):
    write_base(tmp_path / "base", "mixtral", 4)
    overrides = (*SHARDED, "cluster.accelerators_per_node=2", "qat.teacher=packed")
    lines = on_ranks(2, tmp_path / "ranks", said, recipe_beside(tmp_path / "base", text_files), overrides)[0]
    assert any("of the base is not FP8 with scales: its experts stay in bfloat16" in line for line in lines)
