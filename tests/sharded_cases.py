"""What ranks do in the tests of sharded training; imported in processes of their own (see `ranks`)."""

import gc
from pathlib import Path

import torch
import yaml

SHARDED = ("cluster.memory_gib=1.0", "cluster.sharding=fsdp2")


def recipe_beside(base: Path, text_files: dict) -> Path:
    """A recipe of three short updates of `base`, beside it; the runs go there, too."""
    path = base.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "name": "t", "seed": 3, "output": str(base.parent / "runs"), "model": {"path": str(base)},
        "data": {"train": [str(text_files["train"])], "sequence_length": 64, "eval_sequences": 5,
                 "heldout": [str(text_files["alpha.heldout"])]},
        "qat": {"steps": 3, "batch_size": 2, "log_every": 1, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2}}}))
    return path


def made(recipe: Path, overrides, *, resume: bool = False):
    from qat.trainer import trainer_of
    from recipes.load import load_recipe

    return trainer_of(load_recipe(recipe, list(overrides)), resume=resume)


def state_of(trainer) -> dict:
    """Masters and codes of all experts, put together over the ranks."""
    quantizer = trainer.quantizer
    masters = {t.name: quantizer.of_all_experts(i, m.detach()).clone() for i, (t, m) in enumerate(quantizer)}
    rounded = {t.name: quantizer.of_all_experts(i, quantizer.rounded(i)).clone() for i, t in enumerate(quantizer.tensors)}
    return {"masters": masters, "rounded": rounded}


def train(rank: int, recipe: Path, cases: dict) -> dict:
    """Trains every case {label: overrides}; returns {label: losses, norms, masters, rounded weights}.

    A label is also the run's name, up to a slash ("a/resumed" goes on in a's folder). Not overrides of the recipe: --resume;
    stop=N, for --max-steps N; load, to train no step; finish, to evaluate and write the model.
    """
    results = {}
    for name, overrides in cases.items():
        words = {o for o in overrides if "=" not in o or o.startswith("stop=")}
        stop = next((int(o.removeprefix("stop=")) for o in words if o.startswith("stop=")), None)
        trainer = made(recipe, [f"name={name.partition('/')[0]}", *(o for o in overrides if o not in words)],
                             resume="--resume" in words)
        seen, record = [], trainer.record
        trainer.record = lambda values, *rest, seen=seen, record=record: (seen.append(values), record(values, *rest))
        if "load" not in words:
            trainer.train(stop)
        results[name] = {"losses": [v["loss"] for v in seen], "norms": [v["grad_norm"] for v in seen],
                         "step": trainer.state.step, **state_of(trainer)}
        if getattr(trainer, "whole", True) is False:
            results[name]["sent"] = [(g.sent, g.gathers) for g in getattr(trainer.quantizer, "gathers", ())]
        if "finish" in words:
            trainer.finish()
        if trainer.main:
            trainer.held.__exit__(None, None, None)  # not close(), which would end the process group
        del trainer
        gc.collect()
    return results


def agree(results: list[dict]) -> bool:
    """Whether all ranks report the same (they gather the same tensors)."""
    return all(torch.equal(results[0][case]["masters"][name], other[case]["masters"][name])
               for other in results[1:] for case in results[0] for name in results[0][case]["masters"])
