"""Optimizer and learning-rate schedule of the master weights.

AdamW is torch's. Muon is the `muon-optimizer` package's `SingleDeviceMuon` (batched Newton-Schulz: a fused expert tensor
[E, out, in] is orthogonalised expert by expert) behind a thin adapter: its update scale max(1, out/in)^0.5 is turned into
0.2 max(out, in)^0.5 by the group's learning rate, so that AdamW's learning rates carry over (arXiv 2502.16982). The
package's multi-process class is not used: it needs a process group, and shares out work that data parallelism with equal
gradients may as well repeat.
"""

from __future__ import annotations

import math

import torch

from recipes.schema import Optimizer


def matched_rate(learning_rate: float, shape: tuple[int, ...]) -> float:
    """The package's learning rate at which a Muon update of a [., out, in] matrix has the RMS of AdamW's at `learning_rate`."""
    out, into = shape[-2:]
    return learning_rate * 0.2 * math.sqrt(max(out, into)) / max(1, out / into) ** 0.5


def matched_decay(weight_decay: float, shape: tuple[int, ...]) -> float:
    """The package's weight decay at which a step shrinks weights by AdamW's learning rate x `weight_decay`.

    The package multiplies it by its own learning rate, which `matched_rate` scales for the update alone.
    """
    return weight_decay / matched_rate(1.0, shape)


def root_mean_square(parameter: torch.Tensor) -> float:
    """Of a whole parameter, sharded or not.

    A block's codes are as far apart as its weights are large, so a rate in this unit moves every tensor by the same share of
    that distance, whatever factor it carries (the scaling of Adafactor, arXiv 1804.04235).
    """
    norm = torch.linalg.vector_norm(parameter.detach())
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) / math.sqrt(parameter.numel())


def make_optimizer(parameters: list[torch.nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """Optimizer over float32 parameters.

    Raises:
        ValueError: parameters that are no matrices, for Muon.
    """
    if settings.name == "adamw":
        rates = [settings.learning_rate * (root_mean_square(p) if settings.relative else 1.0) for p in parameters]
        groups = [{"params": [p for p, r in zip(parameters, rates, strict=True) if r == rate], "lr": rate}
                  for rate in dict.fromkeys(rates)]
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=tuple(settings.betas),
                                 weight_decay=settings.weight_decay)
    from muon import SingleDeviceMuon

    class Muon(SingleDeviceMuon):
        """The package's `step` takes no closure, which Accelerate's optimizer wrapper always passes (None)."""

        def step(self, closure=None):
            return super().step()

    matrices = [p for p in parameters if p.ndim >= 2]
    if len(matrices) != len(parameters):
        raise ValueError("qat.optimizer.name: muon is for matrices; with qat.train: all use adamw")
    by_shape: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
    for p in matrices:
        by_shape.setdefault(tuple(p.shape[-2:]), []).append(p)
    groups = [{"params": ps, "lr": matched_rate(settings.learning_rate, shape),
               "weight_decay": matched_decay(settings.weight_decay, shape)} for shape, ps in by_shape.items()]
    return Muon(groups, momentum=settings.betas[0])


