"""Bases of every form read into shards: each rank's rows are those of one process, and it reads and holds no more than them."""

import os
from contextlib import suppress

import pytest
import torch
from ranks import on_ranks
from toy_families import pack, write_base

FORMS = [("qwen3", "fp8"), ("mimo", "fp8"), ("qwen3", "compressed-tensors"), ("gpt_oss", "mxfp4"), ("mixtral", "bf16"),
         ("mimo", "bf16")]


def read_rows(rank: int, folder, layout: dict, dtype: torch.dtype) -> dict:
    """{name: (rows, values)} of this rank's shards, and the bytes that it read of the files."""
    import torch.distributed as dist

    from checkpoint import load
    from training.sharding.layout import Layout
    from training.sharding.trees import load_shards

    dist.init_process_group("gloo")
    sources, real = [], load.open_source
    load.open_source = lambda path: sources.append(real(path)) or sources[-1]
    model = load_shards(folder, Layout(**layout), dtype=dtype)
    found = {n: (load.owned_rows(p), getattr(p, "_local_tensor", p).detach().clone()) for n, p in model.named_parameters()}
    leave_together()
    return {"shards": found, "read": sum(s.bytes_read for s in sources), "whole": sources[0].size()}


def leave_together() -> None:
    """No rank ends while another one still loads; one that ends right after may take the others' barrier with it."""
    import torch.distributed as dist

    with suppress(RuntimeError):
        dist.barrier()


def whole(folder, dtype):
    from checkpoint.load import load_model

    return {name: p.detach() for name, p in load_model(folder, dtype=dtype).named_parameters()}


@pytest.mark.parametrize("family, form", FORMS)
def test_shards_are_the_rows_of_one_process_and_each_rank_reads_its_own(tmp_path, family, form):
    """192 rows of a projection are an FP8 block and a half; three ranks cut 64 of them, and one of three holds no expert."""
    changes = {} if family == "mimo" else {"num_attention_heads": 12, "head_dim": 16, "num_key_value_heads": 3}
    folder = write_base(tmp_path / "base", family, 2, **changes)
    if form != "bf16":
        pack(folder, form)
    expected = whole(folder, torch.bfloat16)
    for ranks, layout in ((3, {"ranks": 3}), (2, {"ranks": 2, "expert_parallel": 2})):
        found = on_ranks(ranks, tmp_path / f"{ranks}", read_rows, folder, layout, torch.bfloat16)
        for one in found:
            for name, (rows, values) in one["shards"].items():
                assert torch.equal(values, expected[name][rows.start:rows.stop]), (name, rows)
        for name, value in expected.items():
            seen = sorted((one["shards"][name][0] for one in found), key=lambda r: (r.start, r.stop))
            assert {i for rows in seen for i in rows} == set(range(value.shape[0]))
        assert max(one["read"] for one in found) < 0.75 * found[0]["whole"]


def peak_of_loading(rank: int, folder, layout: dict) -> dict:
    """Bytes by which this process's memory grew at most while loading, what it holds then, and the largest tensor."""
    import torch.distributed as dist

    from training.sharding.layout import Layout
    from training.sharding.trees import load_shards

    dist.init_process_group("gloo")
    load_shards(folder.parent / "small", Layout(**layout), dtype=torch.bfloat16)  # what loading imports and starts is no weight
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew

    def memory(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(key + ":"))

    before = memory("VmRSS")
    model = load_shards(folder, Layout(**layout), dtype=torch.bfloat16)
    held = [getattr(p, "_local_tensor", p).nbytes for p in model.parameters()]
    leave_together()
    return {"peak": memory("VmHWM") - before, "held": sum(held), "largest": max(held)}


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measured as Linux tells it")
@pytest.mark.parametrize("family, form", [("qwen3", "fp8"), ("mimo", "fp8"), ("gpt_oss", "mxfp4"), ("mimo", "bf16")])
def test_the_peak_of_loading_is_the_shards_and_a_few_tensors(tmp_path, family, form):
    """Loading threads (two on two cores) each hold a tensor as read, decoded in float32 and as it stays."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 6}
    sizes |= {"mimo": {"moe_intermediate_size": 512, "hybrid_layer_pattern": [0] * 6, "moe_layer_freq": [1] * 6},
              "qwen3": {"moe_intermediate_size": 512}, "gpt_oss": {"intermediate_size": 512}}[family]
    for name, changes in (("base", sizes), ("small", {})):
        folder = write_base(tmp_path / name, family, 16, **changes)
        if form != "bf16":
            pack(folder, form)
    for one in on_ranks(2, tmp_path / "2", peak_of_loading, tmp_path / "base", {"ranks": 2}):
        print(family, form, one)
        assert one["held"] > 60e6
        assert one["peak"] < one["held"] + 6 * one["largest"] + 16e6
