#!/usr/bin/env python
"""Memory of one rank: what `--plan` predicts beside what an update takes, on toys whose weights outweigh all else.

    python benchmarks/plan_memory.py [--json FILE] [--hidden 256 --inner 256 --experts 32 --layers 6 …]

Each case is planned as `qat/train.py --plan` does, then launched with as many ranks on a CPU, which train two updates; the
second is measured (the first one makes the optimizer's moments). Measured are tensors: the largest sum of all storages that
are alive after any operation, as torch dispatches it. What libraries take within an operation, the interpreter and the
allocator's rounding are not in it; the plan keeps a share of an accelerator for them (`qat.plan.RESERVED_SHARE`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

CASES = {
    "one process": (1, ()),
    "fsdp2, 2 ranks": (2, ("cluster.sharding=fsdp2",)),
    "expert parallel, 2 ranks": (2, ("cluster.sharding=fsdp2", "cluster.expert_parallel=2")),
    "fsdp2, muon, ema": (2, ("cluster.sharding=fsdp2", "qat.optimizer.name=muon", "qat.oscillation.method=ema",
                             "qat.oscillation.start=0.0")),
    "fsdp2, teacher on disk": (2, ("cluster.sharding=fsdp2", "qat.teacher=disk")),
}


def live_storages():
    """A dispatch mode that keeps `peak`, the largest sum of bytes of living storages after any operation; those that were there
    before are counted."""
    import gc

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    class Live(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.peak, self.storages = 0, WeakIdKeyDictionary()
            for thing in gc.get_objects():
                if isinstance(thing, torch.Tensor):
                    self._see(thing)

        def _see(self, tensor: torch.Tensor) -> None:
            tensor = getattr(tensor, "_local_tensor", tensor)
            if tensor.device.type != "meta" and tensor.layout is torch.strided:
                self.storages[tensor.untyped_storage()] = None

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._see(leaf)
            self.peak = max(self.peak, sum(storage.nbytes() for storage in list(self.storages)))
            return out

    return Live()


def measure(recipe_file: Path, overrides: list[str]) -> int:
    """Runs on every rank; the first prints the largest peak of all."""
    import torch
    from accelerate.utils import gather_object

    from qat import sharded, trainer
    from recipes.load import load_recipe

    recipe = load_recipe(recipe_file, overrides)
    kind = trainer.Trainer if recipe.cluster.sharding == "ddp" else sharded.ShardedTrainer
    job = kind(recipe, resume=False)
    batches = job.batches()
    job.update(batches)
    with live_storages() as live:
        before = sum(storage.nbytes() for storage in list(live.storages))
        job.update(batches)
    peaks = gather_object([(live.peak, before)]) if job.accelerator.num_processes > 1 else [(live.peak, before)]
    if job.main:
        print(json.dumps({"peak": max(p for p, _ in peaks), "at_rest": max(b for _, b in peaks),
                          "experts": sum(m.numel() for m in job.quantizer.masters), "torch": torch.__version__}))
    job.close()
    return 0


def run_case(name: str, recipe: Path, folder: Path) -> dict:
    from qat.plan import make_plan
    from recipes.load import load_recipe

    ranks, own = CASES[name]
    overrides = [f"name={''.join(c for c in name if c.isalnum())}", f"cluster.accelerators_per_node={ranks}", *own]
    plan = make_plan(load_recipe(recipe, overrides))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               __file__, "--measure", str(recipe), *overrides]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"peak"')))
    predicted = sum(plan.memory.values())
    return {"ranks": ranks, "predicted": predicted, "measured": found["peak"], "at_rest": found["at_rest"],
            "ratio": predicted / found["peak"], "parts": plan.memory}


def main(argv: list[str]) -> int:
    if argv[:1] == ["--measure"]:
        return measure(Path(argv[1]), argv[2:])
    from benchmarks.sharded_step import write_toy
    from recipes.own_lines import own_lines_only

    own_lines_only()

    parser = argparse.ArgumentParser(prog="benchmarks/plan_memory.py", description=__doc__.splitlines()[0])
    for name, default in (("hidden", 256), ("inner", 256), ("experts", 32), ("layers", 6), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    from training import report

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_toy(folder, args)
        (folder / "recipe.yaml").write_text(json.dumps({
            "name": "t", "output": str(folder / "runs"), "model": {"path": str(folder / "base")},
            "data": {"train": [str(folder / "text.train.jsonl")], "heldout": [str(folder / "text.heldout.jsonl")],
                     "sequence_length": args.tokens},
            "qat": {"steps": 4, "batch_size": 1, "loss": {"chunk_tokens": 32}, "optimizer": {"warmup_steps": 1}},
            "cluster": {"memory_gib": 64.0}}))
        rows = {name: run_case(name, folder / "recipe.yaml", folder) for name in args.case or CASES}
    for name, row in rows.items():
        print(f"{name:28} predicted {row['predicted'] / 2**20:8.1f} MiB, measured {row['measured'] / 2**20:8.1f} MiB: "
              f"{row['ratio']:.3f}")
    if args.json:
        toy = {k: v for k, v in vars(args).items() if k not in ("json", "case")}
        result = {"environment": report.environment(), "toy": toy, "cases": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
