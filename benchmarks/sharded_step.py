#!/usr/bin/env python
"""One QAT step on several ranks with the 4-bit gather of experts, with a gather of bf16 values, and (where deepspeed is
installed) under ZeRO-3: bytes and time.

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 benchmarks/sharded_step.py [--json FILE] [--hidden 256 --experts 16 …]

All jobs run in the same processes on the same text, step by step in turn, so that whatever else the machine does meets both.
Bytes are counted where they are handed to the collective; weights after the last step must be equal, or nothing is printed.
On a CPU the time says little about GPUs: decoding costs processor time here, and gloo moves bytes through local sockets.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def write_toy(folder: Path, args) -> None:
    """A Qwen3-MoE of random weights, a tokenizer of letters, and text."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=320, hidden_size=args.hidden, intermediate_size=args.hidden, moe_intermediate_size=args.inner,
        num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=2, head_dim=args.hidden // 4,
        num_experts=args.experts, num_experts_per_tok=2, max_position_embeddings=512))
    model.bfloat16().save_pretrained(folder / "base")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<|end|>": 0} | {c: i + 1 for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder / "base")
    text = "".join(json.dumps({"text": f"expert {i} rounds block {i * 7 % 97} and keeps the scale of {i % 13}. " * 8}) + "\n"
                   for i in range(400))
    (folder / "text.train.jsonl").write_text(text)
    (folder / "text.heldout.jsonl").write_text("".join(text.splitlines(keepends=True)[:40]))


def recipe_of(folder: Path, name: str, sharding: str, args) -> dict:
    data = {"train": [str(folder / "text.train.jsonl")], "heldout": [str(folder / "text.heldout.jsonl")],
            "sequence_length": args.tokens}
    return {
        "name": name, "output": str(folder / "runs"), "model": {"path": str(folder / "base")}, "data": data,
        "qat": {"steps": args.steps + 1, "batch_size": 1, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1}},
        "cluster": {"memory_gib": 1.0, "sharding": sharding}}


def job(folder: Path, name: str, codes: bool, args):
    from qat import sharded
    from recipes.schema import Recipe

    recipe = Recipe.model_validate(recipe_of(folder, name, "fsdp2", args))
    sharded.ShardedQuantizer.gather_codes = codes
    return sharded.ShardedTrainer(recipe, resume=False)


def zero3_job(folder: Path, args):
    """The same under ZeRO-3, with `gathers` that count what its gathers of experts are given."""
    from types import SimpleNamespace

    from qat.zero3 import Zero3Trainer
    from recipes.schema import Recipe

    made = Zero3Trainer(Recipe.model_validate(recipe_of(folder, "zero3", "zero3", args)), resume=False)
    counts = {id(t.parameter): SimpleNamespace(sent=0, gathers=0) for t in made.quantizer.tensors}

    def counted(gather):
        def all_gather_coalesced(parameters, *rest, **options):
            for parameter in parameters:
                if id(parameter) in counts:
                    counts[id(parameter)].sent += parameter.ds_tensor.nbytes
                    counts[id(parameter)].gathers += 1
            return gather(parameters, *rest, **options)
        return all_gather_coalesced

    for parameter in made.model.parameters():
        if hasattr(parameter, "ds_id"):
            parameter.all_gather_coalesced = counted(parameter.all_gather_coalesced)
    made.quantizer.gathers = list(counts.values())
    return made


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/sharded_step.py", description=__doc__.splitlines()[0])
    for name, default in (("hidden", 256), ("inner", 256), ("experts", 16), ("layers", 2), ("tokens", 128), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator

    from training import report

    main_rank = Accelerator().is_main_process
    box = [tempfile.mkdtemp() if main_rank else None]
    if main_rank:
        write_toy(Path(box[0]), args)
    dist.broadcast_object_list(box)
    folder = Path(box[0])
    jobs = {"codes (MXFP4)": job(folder, "codes", True, args), "values (bfloat16)": job(folder, "values", False, args)}
    if importlib.util.find_spec("deepspeed"):
        jobs["values (bfloat16), ZeRO-3"] = zero3_job(folder, args)
    sources = {name: j.batches() for name, j in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for step in range(args.steps + 1):
        for name, j in jobs.items():
            dist.barrier()
            before = [(g.sent, g.gathers) for g in j.quantizer.gathers]
            began = time.perf_counter()
            j.update(sources[name])
            if step:  # the first one initialises units
                seconds[name].append(time.perf_counter() - began)
            sent = sum(g.sent - s for g, (s, _) in zip(j.quantizer.gathers, before, strict=True))
            j.sent_per_step = sent
    first_job, *others = jobs.values()
    if not all(torch.equal(x.flatten(), y.flatten()) for other in others
               for x, y in zip(first_job.quantizer.masters, other.quantizer.masters, strict=True)):
        print("error: the gathers trained different weights: no result", file=sys.stderr)
        return 1
    if main_rank:
        rows = {name: {"experts_sent_per_rank_and_step": j.sent_per_step, "median_seconds": statistics.median(seconds[name]),
                       "seconds": [round(s, 5) for s in seconds[name]]} for name, j in jobs.items()}
        first, second, *_ = rows.values()
        result = {"environment": report.environment(), "ranks": dist.get_world_size(), "toy": vars(args) | {"json": None},
                  "expert_weights": first_job.quantizer.num_parameters, "gathers": rows,
                  "bytes_ratio": second["experts_sent_per_rank_and_step"] / first["experts_sent_per_rank_and_step"],
                  "time_ratio": first["median_seconds"] / second["median_seconds"]}
        for name, row in rows.items():
            print(f"{name:26} {row['experts_sent_per_rank_and_step']:>12,} bytes of experts sent per rank and step, "
                  f"median step {row['median_seconds'] * 1e3:.1f} ms")
        print(f"bytes: {result['bytes_ratio']:.3f} times fewer; step time with codes: {result['time_ratio']:.2f} of the other; "
              "weights after the last step equal")
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    dist.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
