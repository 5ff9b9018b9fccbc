"""Pictures of a drafter run: training curves, and acceptance by position."""

from __future__ import annotations

import math
from pathlib import Path

from training.report import read_metrics, save_picture


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Loss, expected length, accuracy by position and learning rate over steps, from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [r for r in read_metrics(metrics) if r["kind"] == "train" and "accuracy" in r]
    if not train:
        return
    steps = [r["step"] for r in train]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    axes[0, 0].plot(steps, [r.get("loss", math.nan) for r in train], label="loss per anchor")
    axes[0, 0].plot(steps, [r.get("cross_entropy", math.nan) for r in train], label="cross entropy, nats per position")
    axes[0, 0].set(title="training loss", xlabel="step", yscale="log")
    axes[0, 1].plot(steps, [r.get("greedy_length", math.nan) for r in train], label="arg-max is the text")
    axes[0, 1].plot(steps, [r.get("sampled_length", math.nan) for r in train], label="T = 1, from overlaps")
    axes[0, 1].set(title="expected tokens per round, training anchors", xlabel="step")
    for k in range(len(train[0]["accuracy"])):
        axes[1, 0].plot(steps, [r["accuracy"][k] for r in train], label=f"k = {k + 1}")
    axes[1, 0].set(title="arg-max right, by position in the block", xlabel="step")
    axes[1, 1].plot(steps, [r.get("learning_rate", math.nan) for r in train])
    axes[1, 1].set(title="learning rate (first group)", xlabel="step")
    for axis in (axes[0, 0], axes[0, 1], axes[1, 0]):
        axis.legend(fontsize=7)
    figure.suptitle(title)
    save_picture(figure, picture)


def draw_acceptance(summary: dict, picture: Path, title: str) -> None:
    """P(drafts 1..k all accepted) by position, one line per domain and kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for domain, kinds in summary["detail"].items():
        for kind, row in kinds.items():
            label = f"{domain}, {'tasks T=0' if kind == 'task_t0' else 'open T=1'}: {row['drafter']['length']:.2f}"
            style = "-" if kind == "task_t0" else "--"
            axis.plot(range(1, len(row["per_position"]) + 1), row["per_position"], style, marker="o", label=label)
    axis.set(title=f"{title}: drafts 1..k accepted, mean over positions", xlabel="k", ylim=(0, 1))
    axis.legend(fontsize=8)
    save_picture(figure, picture)
