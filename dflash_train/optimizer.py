"""Muon for the drafter's matrices, AdamW for everything else.

`muon-optimizer`'s `SingleDeviceMuonWithAuxAdam` does both in one optimizer; the thin adapter takes the closure that
Accelerate's wrapper passes. Its update scale is turned into AdamW's by the learning rate (`qat.optimizer.matched_rate`).

Not in Muon: norms, sinks and mask embedding (vectors), and vocabulary-indexed tables (the Markov head's factors): each
of their rows is seen rarely, orthogonalising them as a matrix would move all rows alike, and at Muon's usual fraction of
the rate they never train.
"""

from __future__ import annotations

import torch
from torch import nn

from qat.optimizer import matched_decay, matched_rate
from recipes.schema import DraftOptimizer

VOCABULARY_TABLES = ("markov_previous.weight", "markov_next.weight")


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon (or the matrices' AdamW rate) updates this parameter."""
    return parameter.ndim >= 2 and name not in VOCABULARY_TABLES


def make_optimizer(model: nn.Module, settings: DraftOptimizer) -> torch.optim.Optimizer:
    """Optimizer over the drafter's float32 parameters. Weight decay touches matrices only."""
    matrices: dict[tuple[int, ...], list[nn.Parameter]] = {}
    others = []
    for name, parameter in model.named_parameters():
        if is_matrix(name, parameter):
            matrices.setdefault(tuple(parameter.shape[-2:]), []).append(parameter)
        else:
            others.append(parameter)
    if settings.name == "adamw":
        groups = [{"params": [p for ps in matrices.values() for p in ps], "lr": settings.learning_rate,
                   "weight_decay": settings.weight_decay},
                  {"params": others, "lr": settings.adamw_learning_rate, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, betas=tuple(settings.betas))
    from muon import SingleDeviceMuonWithAuxAdam

    class Muon(SingleDeviceMuonWithAuxAdam):
        """The package's `step` takes no closure, which Accelerate's wrapper always passes, and no missing gradients."""

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            return super().step()

    groups = [{"params": ps, "lr": matched_rate(settings.learning_rate, shape), "momentum": settings.betas[0],
               "weight_decay": matched_decay(settings.weight_decay, shape), "use_muon": True} for shape, ps in matrices.items()]
    groups.append({"params": others, "lr": settings.adamw_learning_rate, "betas": tuple(settings.betas), "eps": 1e-8,
                   "weight_decay": 0.0, "use_muon": False})
    return Muon(groups)
