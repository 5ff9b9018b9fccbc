"""What a training job does around its updates, for QAT and drafter alike: folder and records, steps until the last one,
checkpoints, signals, the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from recipes.load import dump_recipe
from storage.files import bound_earlier, next_free, write_json, write_text
from storage.locks import Lock
from storage.revision import git_revision
from storage.terminal import counted
from training import checkpoint, report
from training.accelerator import PATIENCE, StopRequest, from_first
from training.background import BackgroundSave
from training.hangs import Watch
from training.resume import require_same_inputs

HANG_MINUTES = 10.0  # where a recipe has no cluster section


class NonFinite(ArithmeticError):
    """Training met a non-finite loss or gradient; the text names step and tensor."""


class TrainingRun:
    """A job of `settings.steps` updates in a folder of its own, which can be stopped and resumed.

    A job's own class sets these attributes before anything here is called:
        recipe: Recipe; settings: its section with steps, log_every, checkpoint_every, keep_last.
        accelerator: Accelerator; main: whether this is its first process.
        folder: Path; state: what checkpoints hold, with `step`, the number of finished updates.
        model, optimizer, schedule: as prepared by the accelerator; they are in checkpoints, too.
    and has the methods that raise NotImplementedError here.
    """

    label = ""  # of the progress bar
    metrics = None
    drawn = 0.0
    inputs: dict = {}
    held: AbstractContextManager = nullcontext()
    saver: BackgroundSave
    other_processes = False  # whether a checkpoint of another number of processes may be resumed

    def batches(self) -> Iterator:
        """What `update` takes, step by step, from the state's position on."""
        raise NotImplementedError

    def update(self, batches: Iterator) -> dict:
        """One optimizer update; returns its metrics. Raises NonFinite through `stop_non_finite`."""
        raise NotImplementedError

    def record(self, values: dict, seconds: float, bar: report.ProgressBar) -> None:
        """Shows an update and writes it to the metrics."""
        raise NotImplementedError

    def draw_curves(self, metrics: Path, picture: Path) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Evaluates and writes what the job was for."""
        raise NotImplementedError

    def ended_early(self) -> bool:
        """Whether the run ends here, before its last step."""
        return False

    def best_step(self) -> int | None:
        """The step whose checkpoint is kept whatever its age; it is the present one if a checkpoint is due for it."""
        return None

    def moved(self, before: int) -> None:
        """Called when a state was read that `before` processes, another number, had written."""

    def facts(self) -> dict:
        """What a checkpoint's complete.json tells beside the recipe."""
        return {"git_revision": git_revision(), "inputs": self.inputs}

    def run(self, max_steps: int | None) -> int:
        """Trains, and finishes if that was all; returns the exit code."""
        try:
            if stopped_by := self.train(max_steps):
                return 128 + stopped_by
            if self.state.step == self.settings.steps or self.ended_early():
                self.finish()
            return 0
        finally:
            self.close()

    def train(self, max_steps: int | None) -> int | None:
        """Runs to the recipe's last step (or `max_steps`); returns the signal that stopped it, if one did."""
        settings, state = self.settings, self.state
        last = min(settings.steps, max_steps or settings.steps)
        bar = report.ProgressBar(settings.steps, state.step, enabled=self.main, every=settings.log_every, label=self.label)
        cluster = self.recipe.cluster
        watch = Watch(cluster.hang_minutes if cluster else HANG_MINUTES, rank=self.accelerator.process_index,
                      ranks=self.accelerator.num_processes)
        batches = watch.batches(self.batches(), lambda: state.step)
        with StopRequest() as stop:
            try:
                while state.step < last and not self.ended_early():
                    began = time.perf_counter()
                    values = self.update(batches)
                    watch.at(state.step, "report")
                    self.record(values, time.perf_counter() - began, bar)
                    signal = stop.agreed(self.accelerator)
                    watch.begin()
                    due = state.step % settings.checkpoint_every == 0 or state.step in (last, self.best_step())
                    if due or signal or self.ended_early():
                        watch.at(state.step, "checkpoint")
                        self.save()
                    self.saver.look()
                    if signal:
                        self.saver.wait()
                        self.draw()
                        self.say(f"stopped by signal {signal} after step {state.step}; --resume continues")
                        return signal
                self.saver.wait()
            finally:
                bar.close()
                watch.end(PATIENCE)
        if self.ended_early() and state.step < settings.steps:
            self.say(f"ended at step {state.step} of {settings.steps}: no lower KL on held-out text for {settings.patience} "
                     "measurements (qat.patience)")
        elif last < settings.steps:
            self.draw()
            self.say(f"stopped at --max-steps {last}; --resume continues to step {settings.steps}" if state.step == last else
                     f"--max-steps {last}: the run is at step {state.step} already, nothing was trained")
        return None

    def lock(self) -> None:
        """Keeps other runs out of the folder until `close`. Raises ValueError: another process trains there."""
        self.held = Lock(self.folder)
        from_first(self.accelerator, lambda: self.held.__enter__() and None)

    def compare_inputs(self, newest: Path | None, make: Callable[[], dict]) -> None:
        """Sets `inputs`, what is trained on: digests by name, as `make` gives them on the first process.

        Raises:
            ValueError: the checkpoint `newest`, which is to be continued, was trained on something else; it says on what.
        """
        self.inputs = from_first(self.accelerator, make)
        if newest is not None:
            require_same_inputs(newest, self.inputs)

    def set_earlier_aside(self, keep: tuple[str, ...] = ()) -> None:
        """Gives an earlier run's folder another name, once this run is known to start; the folders `keep` stay in use.

        Of those set aside the newest `keep_earlier` stay.
        """
        self.accelerator.wait_for_everyone()
        if self.main and (self.folder / "resolved.yaml").exists():
            aside = next_free(self.folder)
            self.folder.rename(aside)
            self.folder.mkdir()
            for kept in keep:
                if (aside / kept).exists():
                    (aside / kept).rename(self.folder / kept)
            print(f"an earlier run was set aside as {aside} (--resume would have continued it)")
            bound_earlier(self.folder, "resolved.yaml", self.recipe.keep_earlier)
        self.accelerator.wait_for_everyone()

    def open_records(self, resumed: bool, name: str) -> None:
        """Writes what was resolved and where it runs, and opens the metrics. name: the run's on the tracker's page."""
        self.drawn = time.monotonic()
        self.saver = BackgroundSave(self.accelerator, used=self.recipe.checkpoint.asynchronous)
        if not self.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "resolved.yaml", dump_recipe(self.recipe))
        write_json(self.folder / "environment.json", report.environment())
        tracking = self.recipe.tracking
        wandb = report.start_wandb(tracking.wandb, tracking.project, name, self.folder, self.recipe.model_dump(mode="json"))
        self.metrics = report.Metrics(self.folder / "metrics.jsonl", wandb_run=wandb,
                                      tensorboard=report.start_tensorboard(tracking.tensorboard, self.folder),
                                      resumed_step=self.state.step if resumed else None)

    def state_writer(self, *, copied: bool) -> Callable[..., None]:
        """What writes into a checkpoint's folder all that `read_state` needs; every process makes one and calls it.

        copied: of copies, so that training may go on while it writes.
        """
        return checkpoint.state_writer(self.accelerator, **self._restored(), copied=copied)

    def read_state(self, path: Path) -> None:
        """Restores the run from a checkpoint. Raises ValueError: it does not fit this launch or this recipe."""
        before = checkpoint.read_states(self.accelerator, path, **self._restored(), other_processes=self.other_processes)
        if before != self.accelerator.num_processes:
            self.moved(before)
            self.say(f"--resume: written by {counted(before, 'process', 'processes')}, now {self.accelerator.num_processes}: "
                     "goes on from the same weights and moments, not bit for bit")

    def _restored(self) -> dict:
        return {"model": self.model, "states": {"optimizer": self.optimizer, "schedule": self.schedule, "job": self.state}}

    def save(self) -> None:
        """Writes a checkpoint, or (`checkpoint.async`) begins to: at most one is on its way."""
        asynchronous = self.recipe.checkpoint.asynchronous
        self.saver.wait()
        write = self.state_writer(copied=asynchronous)
        step, keep, facts, text = self.state.step, self.best_step(), self.facts(), dump_recipe(self.recipe)

        def work(ranks) -> None:
            group = ranks.group if asynchronous else None
            checkpoint.save_checkpoint(ranks, self.folder / "checkpoints", step, recipe_yaml=text, facts=facts, keep=keep,
                                       keep_last=self.settings.keep_last, write=lambda folder: write(folder, group))

        if asynchronous:
            self.saver.begin(work)
        else:
            work(self.accelerator)
        if time.monotonic() - self.drawn > report.CURVES_SECONDS:
            self.draw()

    def draw(self) -> None:
        if self.main:
            self.draw_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
        self.drawn = time.monotonic()

    def stop_non_finite(self, what: str) -> None:
        """Raises NonFinite: what it was, at which step, and where the run can go on from."""
        self.saver.wait()
        kept = checkpoint.complete_checkpoints(self.folder / "checkpoints")
        advice = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        raise NonFinite(f"step {self.state.step + 1}: {what}; stopped before the update, {advice}")

    def training_seconds(self, steps: int) -> float:
        """Time in that many updates, from the logged ones: survives resumes, which the process's own clock does not."""
        records = [r for r in report.read_metrics(self.folder / "metrics.jsonl") if r["kind"] == "train"]
        return report.mean(r.get("seconds", 0.0) for r in records) * steps

    def say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
        if self.main:
            self.held.__exit__(None, None, None)
        self.accelerator.end_training()
