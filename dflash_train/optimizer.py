"""Muon for the drafter's matrices, AdamW for everything else.

`muon-optimizer`'s `SingleDeviceMuonWithAuxAdam` does both in one optimizer; the thin adapter takes the closure that
Accelerate's wrapper passes. Its update scale is turned into AdamW's by the learning rate (`qat.optimizer.matched_rate`). Where
matrices are divided among ranks, Newton-Schulz sees whole ones (`training.sharding.whole_matrices`).

Not in Muon: norms, sinks and mask embedding (vectors), and vocabulary-indexed tables (the Markov head's factors): each
of their rows is seen rarely, orthogonalising them as a matrix would move all rows alike, and at Muon's usual fraction of
the rate they never train.
"""

from __future__ import annotations

import torch
from torch import nn

from qat.optimizer import matched_decay, matched_rate
from recipes.schema import DraftOptimizer
from training.sharding.shards import LocalShard
from training.sharding.whole_matrices import on_whole_matrices, require_divided_by_rows

VOCABULARY_TABLES = ("markov_previous.weight", "markov_next.weight")


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon (or the matrices' AdamW rate) updates this parameter."""
    return parameter.ndim >= 2 and name not in VOCABULARY_TABLES


def make_optimizer(model: nn.Module, settings: DraftOptimizer, shards: list[LocalShard] | None = None) -> torch.optim.Optimizer:
    """Optimizer over the drafter's float32 parameters. Weight decay touches matrices only.

    Args:
        shards: this rank's rows of every parameter, where the drafter is divided among ranks; they are updated.

    Raises:
        ValueError: matrices that are divided in a way from which Muon cannot put them together.
    """
    rows = {shard.name: shard for shard in shards or ()}
    matrices: dict[tuple[int, ...], list[nn.Parameter]] = {}
    others = []
    for name, parameter in model.named_parameters():
        own = rows[name].local if shards else parameter
        if is_matrix(name, parameter):
            matrices.setdefault(tuple(parameter.shape[-2:]), []).append(own)
        else:
            others.append(own)
    if settings.name == "adamw":
        groups = [{"params": [p for ps in matrices.values() for p in ps], "lr": settings.learning_rate,
                   "weight_decay": settings.weight_decay},
                  {"params": others, "lr": settings.adamw_learning_rate, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, betas=tuple(settings.betas))
    groups = [{"params": ps, "lr": matched_rate(settings.learning_rate, shape), "momentum": settings.betas[0],
               "weight_decay": matched_decay(settings.weight_decay, shape), "use_muon": True} for shape, ps in matrices.items()]
    groups.append({"params": others, "lr": settings.adamw_learning_rate, "betas": tuple(settings.betas), "eps": 1e-8,
                   "weight_decay": 0.0, "use_muon": False})
    return _muon(groups, [shard for shard in shards or () if is_matrix(shard.name, shard.parameter)])


def _muon(groups: list[dict], divided: list[LocalShard]) -> torch.optim.Optimizer:
    from muon import SingleDeviceMuonWithAuxAdam, zeropower_via_newtonschulz5

    class Muon(SingleDeviceMuonWithAuxAdam):
        """The package's `step` takes no closure, which Accelerate's wrapper always passes, and no missing gradients."""

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            return super().step()

    if not divided:
        return Muon(groups)
    require_divided_by_rows(divided)
    shard_of = {id(shard.local): shard for shard in divided}

    def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
        return zeropower_via_newtonschulz5(matrix, steps=5) * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5

    class DividedMuon(Muon):
        """Momentum and update on this rank's rows, Newton-Schulz on whole matrices: the package's update, bit for bit."""

        @torch.no_grad()
        def step(self, closure=None):
            of = [(p, group) for group in self.param_groups if group["use_muon"] for p in group["params"]]
            parts = []
            for p, group in of:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                parts.append(p.grad.lerp(momentum, group["momentum"]))
            updates = on_whole_matrices(parts, [shard_of[id(p)] for p, _ in of], orthogonal, torch.bfloat16)
            for (p, group), update in zip(of, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])
            matrices = [group["params"] for group in self.param_groups if group["use_muon"]]
            for group in self.param_groups[:len(matrices)]:  # theirs is done: the rest is the package's own
                group["params"] = []
            super().step()
            for group, members in zip(self.param_groups, matrices, strict=False):
                group["params"] = members

    return DividedMuon(groups)
