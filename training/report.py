"""What a run leaves behind and shows: environment.json, metrics.jsonl, curves.png, progress bar, wandb, tables."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from storage.files import write_bytes, write_text
from storage.reading import json_lines
from storage.revision import git_revision

# Keys of metrics.jsonl that depend on the clock, not on the computation.
CLOCK_KEYS = {"tokens_per_second", "seconds"}


def environment() -> dict:
    """Versions, hardware, date and git revision of this process."""
    import torch
    import transformers

    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "git_revision": git_revision(), "version": _version(),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "cpu": cpu_name(), "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    return facts


def _version() -> str:
    try:
        return importlib.metadata.version("fp4-dflash")
    except importlib.metadata.PackageNotFoundError:  # a clone that was never installed
        return "unknown"


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Metrics:
    """metrics.jsonl: one JSON object a line, each with `kind` and `step`; optionally mirrored to wandb.

    On resume, lines after the resumed step are dropped, so the file of an interrupted run equals that of an
    uninterrupted one but for the clock.
    """

    def __init__(self, path: Path, *, resumed_step: int | None, wandb_run=None, tensorboard=None):
        self.path, self.wandb, self.tensorboard = path, wandb_run, tensorboard
        kept = []
        if resumed_step is not None and path.is_file():
            found = read_metrics(path)
            kept = [r for r in found if r["step"] <= resumed_step]
            lines = sum(1 for _ in json_lines(path))
            if lines - len(found) > 1:  # the last line may be half of one, left by a kill
                print(f"{path}: {lines - len(found)} of {lines} lines are damaged and were left out")
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step} | values) + "\n")
        self._file.flush()
        if self.wandb is not None and kind == "train":
            self.wandb.log(values, step=step)
        if self.tensorboard is not None and kind == "train":
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self.tensorboard.close()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; lines that are none (cut off by a kill, damaged) are left out."""
    return [record for _, record in json_lines(path)
            if record is not None and type(record.get("step")) is int and isinstance(record.get("kind"), str)]


def require_wandb(mode: str) -> None:
    """Raises ValueError if wandb is asked for by name but not installed: to be known before a model is loaded."""
    if mode in ("online", "offline") and importlib.util.find_spec("wandb") is None:
        raise ValueError("tracking.wandb: the wandb package is not installed (pip install -e '.[wandb]')")


def start_wandb(mode: str, project: str, name: str, folder: Path, config: dict, say=print):
    """A wandb run, or None. A resumed run goes on as the same run: its id is kept in the run's folder.

    "auto" is online if wandb has a key (WANDB_API_KEY or ~/.netrc), else offline; without the package it is off, with a line.

    Raises:
        ValueError: wandb is asked for but not installed.
    """
    if mode == "off":
        return None
    require_wandb(mode)
    if importlib.util.find_spec("wandb") is None:
        say("tracking.wandb: auto: off, because the wandb package is not installed (pip install -e '.[wandb]')")
        return None
    import wandb

    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") or wandb.api.api_key else "offline"
    kept = folder / "wandb-id.txt"
    run = wandb.init(project=project, name=name, dir=str(folder), mode=mode, config=config, resume="allow",
                     id=kept.read_text(encoding="utf-8").strip() if kept.is_file() else None)
    write_text(kept, f"{run.id}\n")
    return run


def start_tensorboard(wanted: bool, folder: Path):
    """A writer of TensorBoard events in `folder`/tensorboard, or None.

    Raises:
        ValueError: it is asked for but the package is not installed.
    """
    if not wanted:
        return None
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tracking.tensorboard: the tensorboard package is not installed (pip install tensorboard)")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


# Curves are drawn again at a checkpoint if the last ones are older than this: a picture costs a second.
CURVES_SECONDS = 60


def draw_curves(metrics_path: Path, png_path: Path, title: str) -> None:
    """Loss, learning rate, flipped codes and signal-to-noise over steps, from metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(metrics_path)
    train = [r for r in records if r["kind"] == "train"]
    health = [r for r in records if r["kind"] == "health"]
    if not train:
        return
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    steps = [r["step"] for r in train]
    for key, label in (("kl", "KL to teacher"), ("hidden", "hidden error")):
        if any(r.get(key) for r in train):
            axes[0, 0].plot(steps, [r.get(key, math.nan) for r in train], label=label)
    held_out = [r for r in records if r["kind"] == "heldout"]
    if held_out:
        axes[0, 0].plot([r["step"] for r in held_out], [r["kl"] for r in held_out], marker="o", label="KL, held-out text")
    axes[0, 0].set(title="training loss", xlabel="step", ylabel="nats per token", yscale="log")
    axes[0, 0].legend()
    axes[0, 1].plot(steps, [r.get("learning_rate", math.nan) for r in train])
    axes[0, 1].set(title="learning rate", xlabel="step")
    layers = sorted({str(r.get("tensor")) for r in health})
    for layer in layers:
        rows = [r for r in health if r.get("tensor") == layer]
        x = [r["step"] for r in rows]
        axes[1, 0].plot(x, [100 * mean(r.get("flipped", ())) for r in rows], label=layer)
        axes[1, 1].plot(x, [mean(v for v in r.get("sqnr_db", ()) if v is not None) for r in rows], label=layer)
    axes[1, 0].set(title="codes changed since the last report", xlabel="step", ylabel="%")
    axes[1, 1].set(title="signal to quantization noise (master)", xlabel="step", ylabel="dB")
    if 0 < len(layers) <= 10:
        axes[1, 1].legend(fontsize=6)
    figure.suptitle(title)
    save_picture(figure, png_path)


def save_picture(figure, path: Path) -> None:
    """Replaces a PNG file by the figure, and closes the figure."""
    from matplotlib import pyplot as plt

    data = io.BytesIO()
    figure.savefig(data, dpi=120, format="png")
    plt.close(figure)
    write_bytes(path, data.getvalue())


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


class ProgressBar:
    """Rich progress bar on the main process of a terminal; a plain line every `every` steps elsewhere (logs, CI).

    unit: what is counted.
    """

    def __init__(self, total: int, start: int, *, enabled: bool, every: int, label: str = "QAT", unit: str = "step"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.enabled, self.every, self.total, self.unit = enabled, every, total, unit
        self._began = time.monotonic()
        self._start = start
        console = Console()
        self._bar = None
        if enabled and console.is_terminal:
            self._bar = Progress(TextColumn(f"[bold]{label}"), BarColumn(), MofNCompleteColumn(),
                                 TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=console)
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, completed=start, text="")

    def update(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif self.enabled and (step % self.every == 0 or step == self.total):
            done = max(step - self._start, 1)
            left = (time.monotonic() - self._began) / done * (self.total - step)
            print(f"{self.unit} {step}/{self.total}  {text}  ETA {left:.0f} s", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
