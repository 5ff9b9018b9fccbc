"""Learning rates over steps."""

from __future__ import annotations

import math

import torch

from recipes.schema import Optimizer


def make_schedule(optimizer: torch.optim.Optimizer, total: int, settings: Optimizer):
    """Torch LambdaLR that follows `learning_rate_factor`."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, settings))


def present_rate(step: int, total: int, settings: Optimizer) -> float:
    """The recipe's learning rate at optimizer step `step`; groups may have other units (`qat.optimizer.matched_rate`)."""
    return settings.learning_rate * learning_rate_factor(step, total, settings)


def learning_rate_factor(step: int, total: int, settings: Optimizer) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based) of `total`."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    floor = settings.min_learning_rate_ratio
    progress = min(1.0, (step - settings.warmup_steps) / max(1, total - settings.warmup_steps))
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "linear":
        return floor + (1 - floor) * (1 - progress)
    if settings.schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    remaining = min(1.0, (1 - progress) / max(settings.decay_fraction, 1e-9))
    return floor + (1 - floor) * remaining


def peak(total: int, settings: Optimizer) -> float:
    """The largest share of the peak learning rate that a run of `total` steps reaches: 1 unless its warm-up is as long."""
    return min(1.0, total / (settings.warmup_steps + 1))
