"""The QAT job: load, attach, train, checkpoint, evaluate.

Runs on one process or under data parallelism; everything that depends on the number of processes goes through the
`Accelerator`. Gradients are averaged here, in float32 and once per update, instead of by DistributedDataParallel, whose
buckets take the parameters' dtype (bf16) and refuse gradients that accumulate in another. See `qat.expert_quantizer` for how
weights are quantized.

Output, in <recipe.output>/<recipe.name>/qat/:
    resolved.yaml environment.json metrics.jsonl curves.png checkpoints/ model/ summary.json
`model/` is an ordinary Hugging Face folder whose expert weights lie on the MXFP4 grid.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import broadcast
from torch import nn

from checkpoint.detect_format import local_folder
from checkpoint.inventory import require_exportable
from checkpoint.load import load_model, load_tokenizer
from checkpoint.tokenizer_files import copy_tokenizer
from modeling.all_experts import use_all_experts
from modeling.dialogue_tokens import Rendering
from modeling.output_head import require_plain_head
from qat import evaluate
from qat.data import (
    counted_positions,
    endless_batches,
    heldout_digest,
    heldout_domains,
    learned_tokens,
    make_loader,
    packed_dataset,
    rows_digest,
    split_rows,
)
from qat.expert_quantizer import ExpertQuantizer, describe, find_expert_tensors, require_finite, without_noise
from qat.kept_start import keep_start, start_file, take_start
from qat.losses import chunked_statistics, hidden_kl, hidden_loss, immediate_statistics, output_head, run_hidden
from qat.methods import MethodQuantizer, pull_strength, pull_to_grid
from qat.methods import needed as methods_needed
from qat.optimizer import make_optimizer
from qat.oscillation import OscillationControl
from qat.preflight import foresee, require_trainable
from qat.quant_stats import Health
from qat.state import TrainingState
from qat.teacher_states import STATES, TeacherStates
from qat.warm_start import choose_first_codes
from recipes.load import published
from recipes.schema import Recipe
from storage.digests import combined, model_digests, with_sum
from storage.files import write_json
from storage.terminal import counted
from training import checkpoint, report
from training.accelerator import make_accelerator
from training.preflight import require_ready
from training.resume import checkpoint_to_resume
from training.run import TrainingRun
from training.schedule import make_schedule, peak, present_rate


def run(recipe: Recipe, *, resume: bool, max_steps: int | None, other_processes: bool = False) -> int:
    """Runs the job; returns the exit code.

    other_processes: a checkpoint of another number of processes may be resumed.

    Raises:
        ValueError: a mistake in the recipe or its files. OSError: a file cannot be written. NonFinite: see there.
    """
    return trainer_of(recipe, resume=resume, other_processes=other_processes).run(max_steps)


def trainer_of(recipe: Recipe, *, resume: bool, other_processes: bool = False) -> Trainer:
    """The trainer of the recipe's `cluster.sharding`."""
    sharding = "ddp" if recipe.cluster is None else recipe.cluster.sharding
    if sharding == "ddp":
        return Trainer(recipe, resume=resume, other_processes=other_processes)
    if sharding == "zero3":
        from qat.zero3 import Zero3Trainer

        return Zero3Trainer(recipe, resume=resume)
    from qat.sharded import ShardedTrainer

    return ShardedTrainer(recipe, resume=resume)  # whose checkpoints fit any number of processes


class Trainer(TrainingRun):
    """One QAT run, from its recipe to its summary."""

    def __init__(self, recipe: Recipe, *, resume: bool, other_processes: bool = False):
        self.recipe, self.settings, self.other_processes = recipe, recipe.qat, other_processes
        settings = self.settings
        self.accelerator = make_accelerator(settings.gradient_accumulation)
        self.main = self.accelerator.is_main_process
        torch.manual_seed(recipe.seed)
        self.folder = Path(recipe.output) / recipe.name / "qat"
        foreseen = foresee(recipe)
        self.writes = require_ready(recipe, "qat", foreseen, self.folder if resume else None)
        require_trainable(recipe)
        self.lock()
        newest = checkpoint_to_resume(self.folder, recipe, "qat", self.say, self.accelerator) if resume else None
        if not recipe.model.trust_remote_code:
            require_exportable(recipe.model.path, recipe.export.layout, recipe.export.dense)
        self.tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
        model = self.load_model()
        require_tokenizer_fits(self.tokenizer, model, recipe.model.path)
        self._load_data()
        self.compare_inputs(newest, lambda: {"base weights": model_digests(local_folder(recipe.model.path)),
                                             "training data": rows_digest(self.loader.dataset)})
        self.states = TeacherStates(self) if settings.teacher == "disk" else None
        self.needs_teacher = (self.states is None or not self.states.written or settings.heldout_every > 0
                              or newest is None and settings.warm_start.method != "none")
        self.attach(model)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = self.make_optimizer()
        schedule = make_schedule(optimizer, settings.steps, settings.optimizer)
        self.state = TrainingState(self.quantizer, OscillationControl(self.quantizer, settings.oscillation, settings.steps),
                                   Health(model, self.quantizer, self.accelerator))
        # The schedule is stepped once per update by hand, so Accelerate's per-process multiplication is not wanted.
        self.schedule = schedule
        self.prepare(model, optimizer)
        self._open_folder(resume, newest)
        if self.states is not None:
            self.states.replace_teacher()

    def load_model(self) -> nn.Module:
        return load_model(self.recipe.model.path, dtype=getattr(torch, self.recipe.model.dtype),
                          trust_remote_code=self.recipe.model.trust_remote_code)

    def attach(self, model: nn.Module) -> None:
        """Sets teacher, quantizer, the unquantized experts, and the parameters that are trained beside experts."""
        require_plain_head(model.to(self.accelerator.device))
        use_all_experts(model)
        self._choose_trainable(without_noise(model))
        self.teacher = make_teacher(model) if self.needs_teacher else None
        self.quantizer = make_quantizer(model, self.recipe)
        self.others = [p for _, p in self.trained_others(model)]

    def make_optimizer(self) -> torch.optim.Optimizer:
        settings = self.recipe.qat
        optimizer = make_optimizer([*self.quantizer.masters, *self.others], settings.optimizer)
        if settings.scales.method == "learned":
            optimizer.add_param_group({"params": self.quantizer.shifts, "lr": settings.scales.learning_rate,
                                       "weight_decay": 0.0})
        return optimizer

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        # evaluation_mode: no DistributedDataParallel wrapper (see the module's text).
        self.model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.optimizer, self.loader = self.accelerator.prepare(optimizer, self.loader)

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def teacher_again(self) -> nn.Module:
        """The original model from its files, where it did not stay in memory."""
        model = self.load_model().to(self.accelerator.device)
        use_all_experts(model)
        return model.eval().requires_grad_(False)

    def originals(self) -> Iterator[torch.Tensor]:
        """The unquantized experts (this rank's), in the quantizer's order, one at a time."""
        weights = (self.teacher.get_parameter(t.name).data for t in self.quantizer.tensors)
        return (getattr(weight, "_local_tensor", weight) for weight in weights)

    def trained_others(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        experts = {t.name for t in self.quantizer.tensors}
        return [(n, p) for n, p in model.named_parameters() if p.requires_grad and n not in experts]

    def _load_data(self) -> None:
        recipe = self.recipe
        rendering = Rendering(recipe.chat.prompts, recipe.chat.template_options)
        with self.accelerator.main_process_first():
            rows = packed_dataset(recipe.data.train, self.tokenizer, recipe.data, rendering=rendering, seed=recipe.seed,
                                  say=self.say)
            self.domains = heldout_domains(recipe.data.heldout, self.tokenizer, recipe.data, rendering)
        if recipe.data.loss_on == "answers":
            learned, all_tokens = learned_tokens(rows), len(rows) * recipe.data.sequence_length
            self.say(f"losses cover answers: {learned:,} of {all_tokens:,} tokens in {counted(len(rows), 'row')}")
        self.loader = make_loader(rows, batch_size=recipe.qat.batch_size, seed=recipe.seed, shuffle=recipe.data.shuffle,
                                  processes=self.accelerator.num_processes, numbered=recipe.qat.teacher == "disk")

    def _choose_trainable(self, model: nn.Module) -> None:
        """Freezes what the recipe does not train; expert weights get their gradient from the quantizer."""
        model.requires_grad_(self.recipe.qat.train == "all")
        if self.recipe.qat.train == "all" and self.recipe.qat.freeze_router:
            for name, parameter in model.named_parameters():
                if any(part in ("gate", "router") for part in name.split(".")):
                    parameter.requires_grad_(False)

    def _open_folder(self, resume: bool, newest: Path | None) -> None:
        """Loads the checkpoint to resume, or sets an earlier run aside and warm-starts; opens the metrics."""
        if newest is not None:
            self.read_state(newest)
        elif self.recipe.qat.warm_start.method != "none":
            self._start()
            self.agree_on_masters()
            self.state.health.rebase()  # what the start changed is not training's doing
        if not resume:
            self.set_earlier_aside(keep=(STATES,))
        if self.main:
            self._print_header(newest)
        self.open_records(newest is not None, self.recipe.name)
        if self.recipe.qat.heldout_every:
            self.heldout = evaluate.HeldOut(self.teacher, self.domains, sequences=self.recipe.qat.heldout_sequences,
                                            batch_size=self.recipe.qat.batch_size,
                                            chunk_tokens=self.recipe.qat.loss.chunk_tokens)
            if newest is None:
                self._measure_heldout()

    def _start(self) -> None:
        """Chooses the initial codes, or takes those that an earlier run has kept."""
        settings, rows = self.recipe.qat.warm_start, self._calibration_rows()
        kept = None if settings.folder is None else start_file(self.recipe, self.inputs["base weights"], rows)
        if kept is not None and kept.is_file():
            self.say(f"initial codes ({settings.method}) from {kept}")
            take_start(kept, self.quantizer)
            return
        self.say(f"choosing the initial codes ({settings.method})")
        choose_first_codes(self.teacher, self.quantizer, rows, settings, seed=self.recipe.seed, model=self.model, say=self.say)
        if kept is not None and self.main:
            keep_start(kept, self.quantizer)

    def agree_on_masters(self) -> None:
        """Gives every process the first one's masters (and scales): each computed its own, and libraries do not promise equal
        bits."""
        if self.accelerator.num_processes == 1:
            return
        for value in (*self.quantizer.masters, *getattr(self.quantizer, "shifts", ())):
            value.data.copy_(broadcast(value.data))
        self.quantizer.requantize()

    def _calibration_rows(self) -> torch.Tensor:
        """Rows spread evenly over the training set: its files, and so its domains, stand one after the other."""
        dataset, wanted = self.loader.dataset, self.recipe.qat.warm_start.sequences
        spread = torch.linspace(0, len(dataset) - 1, min(wanted, len(dataset))).long().tolist()
        rows = dataset.select(spread)["input_ids"]
        return split_rows(torch.stack(list(rows)))[0].to(self.accelerator.device)

    def _print_header(self, newest: Path | None) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.recipe.name}: quantized to MXFP4 (scale rule {self.quantizer.scale_rule})")
        for column in ("tensors", "shape", "count", "parameters"):
            table.add_column(column, justify="left" if column in ("tensors", "shape") else "right")
        for pattern, shape, count, parameters in describe(self.quantizer.tensors, self.model):
            table.add_row(pattern, shape, str(count), f"{parameters:,}")
        Console().print(table)
        if newest is not None:
            print(f"resuming {newest} at step {self.state.step} of {self.recipe.qat.steps}")

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        return endless_batches(self.accelerator, self.loader, consumed=self.state.batches)

    def update(self, batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor | float]:
        """One optimizer update; returns its losses (means over the tokens of all processes that count)."""
        settings = self.recipe.qat
        sums: dict[str, torch.Tensor] = {}
        rows = [next(batches) for _ in range(settings.gradient_accumulation)]
        for part, share in zip(rows, self._shares([part["input_ids"] for part in rows]), strict=True):
            with self.accelerator.accumulate(self.model):
                values = self._losses(part, share)
                self.backward(values["loss"])
            self.state.batches += 1
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / settings.gradient_accumulation
        names = sorted(sums)
        means = self.accelerator.reduce(torch.stack([sums[n] for n in names]), reduction="mean")
        trained, norm = self.take_gradients()
        if self.state.step == 0:
            self._doubt_the_text(float(means[names.index("cross_entropy")]))
        if not (torch.isfinite(norm) and torch.isfinite(means).all()):
            self._raise_non_finite(dict(zip(names, means.tolist(), strict=True)))
        torch.nn.utils.clip_grads_with_norm_(trained, settings.optimizer.max_grad_norm, norm)
        learning_rate = present_rate(self.state.step, settings.steps, settings.optimizer)
        self._before_step(learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if isinstance(self.quantizer, MethodQuantizer):
            self.quantizer.keep_shifts_in_reach()
            self.quantizer.set_step(self.state.step + 1)
        self.state.oscillation.requantize(self.state.step)
        self._average()
        self.state.step += 1
        return dict(zip(names, means.tolist(), strict=True)) | {"grad_norm": float(norm), "learning_rate": learning_rate}

    def _shares(self, rows: list[torch.Tensor]) -> list[float]:
        """Tokens that count in each micro-step, relative to the mean over micro-steps and processes: means of such means would
        weigh a token by how many others its batch has."""
        if self.recipe.data.loss_on == "all":
            return [1.0] * len(rows)
        found = [counted_positions(part) for part in rows]
        counts = torch.tensor(found, dtype=torch.float32, device=self.accelerator.device)
        return (counts / self.accelerator.reduce(counts.mean(), reduction="mean")).tolist()

    def take_gradients(self) -> tuple[list[nn.Parameter], torch.Tensor]:
        """Gives every trained parameter its gradient, averaged over processes; the parameters and the norm over all of them."""
        self.quantizer.pull_gradients()
        trained = [p for p in (*self.quantizer.masters, *self.others) if p.grad is not None]
        if self.accelerator.num_processes > 1:
            for parameter in trained:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return trained, torch.nn.utils.get_total_norm([p.grad for p in trained])

    def _before_step(self, learning_rate: float) -> None:
        """What methods add to an update while masters and the model's rounded weights are those that the gradient is of."""
        settings = self.recipe.qat
        if isinstance(self.quantizer, MethodQuantizer):
            self.quantizer.take_shift_gradients()
        if strength := pull_strength(self.state.step, settings.steps, settings.grid_pull):
            pull_to_grid(self.quantizer, learning_rate * strength)

    def _losses(self, batch: dict[str, torch.Tensor], share: float = 1.0) -> dict[str, torch.Tensor]:
        """Losses of one micro-step, those of tokens times `share`. Hidden errors cover all positions: answers read them."""
        weights, original = self.recipe.qat.loss, self.teacher
        ids_BT, counted = split_rows(batch["input_ids"])
        if self.states is None:
            with torch.no_grad():
                taught = run_hidden(original, ids_BT, layers=weights.hidden > 0)
            taught_BTH = taught.last
        else:  # the head is frozen, and the same in both
            original, taught_BTH = self.model, self.states.of_rows(batch["row"])
        seen = run_hidden(self.model, ids_BT, layers=weights.hidden > 0)
        # The last position has no next token, but the teacher's distribution there is as good a lesson as any.
        labels = torch.nn.functional.pad(ids_BT[:, 1:], (0, 1), value=-100)
        student, teacher, labels = (t.flatten(0, 1) if counted is None else t[counted]
                                    for t in (seen.last, taught_BTH, labels))
        predicted = ids_BT.shape[0] * (ids_BT.shape[1] - 1) if counted is None else len(labels)
        arguments = (student, output_head(self.model), labels)
        options = dict(teacher_NH=teacher, teacher_head=output_head(original), temperature=weights.temperature,
                       chunk_tokens=weights.chunk_tokens)
        if weights.gradient == "immediate":
            loss, sums = immediate_statistics(*arguments, **options, kl_weight=share * weights.kl / len(labels),
                                              ce_weight=share * weights.cross_entropy / predicted)
        else:
            sums = chunked_statistics(*arguments, **options)
        values = {"kl": share * sums.kl / sums.tokens, "cross_entropy": share * sums.cross_entropy / predicted,
                  "top1_agreement": share * sums.agree / sums.tokens}
        if weights.gradient == "recompute":
            loss = weights.kl * values["kl"] + weights.cross_entropy * values["cross_entropy"]
        if weights.hidden:
            values["hidden"] = hidden_loss(seen.layers, taught.layers)
            loss = loss + weights.hidden * values["hidden"]
        if weights.hidden_kl:
            values["hidden_kl"] = share * hidden_kl(student, teacher)
            loss = loss + weights.hidden_kl * values["hidden_kl"]
        return values | {"loss": loss}

    def _average(self) -> None:
        """Running mean of the masters over the last `average_last` share of the run."""
        settings, state = self.recipe.qat, self.state
        if settings.average_last == 0 or state.step < (1 - settings.average_last) * settings.steps:
            return
        if not state.average:
            state.average = [torch.zeros_like(m.data) for m in self.quantizer.masters]
        state.averaged_steps += 1
        for mean, master in zip(state.average, self.quantizer.masters, strict=True):
            mean.lerp_(master.data, 1 / state.averaged_steps)

    def _doubt_the_text(self, cross_entropy: float) -> None:
        """A tokenizer of another model with as many entries shows in nothing but the loss."""
        guess = math.log(self.model.get_output_embeddings().weight.shape[0])
        if cross_entropy > guess + 0.5:  # a model that knows nothing yet lies at the guess itself
            self.say(f"warning: the text costs the model {cross_entropy:.2f} nats per token, a uniform guess {guess:.2f}: is "
                      f"the tokenizer in {self.recipe.model.path} this model's, and data.train its language?")

    def _raise_non_finite(self, losses: dict[str, float]) -> None:
        found = self.non_finite_gradient()
        self.stop_non_finite(f"loss {losses['loss']}" + (f"; {found}" if found else ""))

    def non_finite_gradient(self) -> str | None:
        """Which gradient has non-finite values, and where."""
        try:
            for tensor, master in self.quantizer:
                require_finite(f"gradient of {tensor.name}", master.grad, first_expert=tensor.owned.start)
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    require_finite(f"gradient of {name}", parameter.grad)
        except ValueError as error:
            return str(error)
        return None

    def record(self, values: dict[str, float], seconds: float, bar: report.ProgressBar) -> None:
        settings, step = self.recipe.qat, self.state.step
        tokens = (settings.batch_size * settings.gradient_accumulation * self.recipe.data.sequence_length
                  * self.accelerator.num_processes)
        bar.update(step, f"loss {values['loss']:.5f}  {tokens / seconds:,.0f} tok/s")
        last = step == settings.steps
        if self.metrics is not None and (step % settings.log_every == 0 or last):
            self.metrics.write("train", step, tokens=step * tokens, seconds=seconds, tokens_per_second=tokens / seconds,
                               **values)
        if settings.heldout_every and (step % settings.heldout_every == 0 or last):
            self._measure_heldout()
        if step % settings.health_every == 0 or last:
            records = self.state.health.report()
            if self.metrics is not None:
                for record in records:
                    self.metrics.write("health", step, **record)

    def _measure_heldout(self) -> None:
        found = self.heldout.measure(self.model)
        state = self.state
        # All processes measure the same, but libraries do not promise equal bits, and they must decide alike.
        kl = float(self.accelerator.reduce(torch.tensor(found["kl"], device=self.accelerator.device), reduction="mean"))
        if state.step and (state.best is None or kl < state.best["kl"]):
            state.best, state.measured_since = {"step": state.step, "kl": kl}, 0
        elif state.step:
            state.measured_since += 1
        if self.metrics is not None:
            self.metrics.write("heldout", self.state.step, **found)
        self.say(f"held-out text at step {self.state.step}: KL {evaluate.shown(found['kl'])}, top-1 agreement "
                 f"{100 * found['top1_agreement']:.2f} %")

    def ended_early(self) -> bool:
        return 0 < self.settings.patience <= self.state.measured_since

    def best_step(self) -> int | None:
        return self.state.best["step"] if self.settings.result == "best" and self.state.best else None

    def _take_best(self) -> None:
        """Goes back to the checkpoint of the least KL on held-out text, if it is not the last one."""
        step = self.best_step()
        if step is None or step == self.state.step:
            return
        path = checkpoint.checkpoint_path(self.folder / "checkpoints", step)
        fault = checkpoint.damage(self.accelerator, path)
        if fault is not None:
            self.say(f"qat.result: best: {fault}; the result is the last step's")
            return
        self.say(f"least KL on held-out text at step {step}: its weights are the result")
        self.read_state(path)

    def moved(self, before: int) -> None:
        self.state.batches = self.state.batches * before // self.accelerator.num_processes

    def draw_curves(self, metrics: Path, picture: Path) -> None:
        report.draw_curves(metrics, picture, self.recipe.name)

    def finish(self) -> None:
        """Evaluates BF16, PTQ and QAT on held-out text; writes model/, summary.json and the last curves."""
        from rich.console import Console

        state = self.state
        ended, batches, measured = state.step, state.batches, state.best
        self._take_best()
        if state.average:
            self.quantizer.requantize(state.average)
        began = time.perf_counter()
        if self.teacher is None:
            self.teacher = self.teacher_again()
        summary = self.compare(batch_size=self.recipe.qat.batch_size, accelerator=self.accelerator,
                               chunk_tokens=self.recipe.qat.loss.chunk_tokens)
        evaluated = time.perf_counter() - began
        self.save_model()
        if not self.main:
            return
        tokens = batches * self.recipe.qat.batch_size * self.recipe.data.sequence_length * self.accelerator.num_processes
        summary |= {
            "tokens": tokens, "seconds": self.training_seconds(ended), "evaluation_seconds": evaluated,
            "seed": self.recipe.seed, "steps": ended, "result_of_step": state.step, "scale_rule": self.quantizer.scale_rule,
            "environment": report.environment(), "inputs": self.inputs, "training": describe_training(self.recipe),
            "heldout": heldout_digest(self.domains),
        }
        if measured is not None:
            summary["best_heldout"] = measured
        summary["helped"], line = evaluate.helped(summary), evaluate.doubt(summary)
        summary["weights"] = combined(model_digests(self.folder / "model"))
        write_json(self.folder / "summary.json", with_sum(summary))
        self.draw()
        Console().print(evaluate.comparison_table(summary))
        if line is not None:
            print(line)
        print(f"written: {self.folder}/ (model/, summary.json, metrics.jsonl, curves.png)")

    def compare(self, **options) -> dict:
        return evaluate.compare(self.model, self.teacher, self.quantizer, self.originals(), self.domains,
                                dtype=self.recipe.qat.evaluation_dtype, **options)

    def save_model(self) -> None:
        if not self.main:
            return
        with checkpoint.folder_aside(self.folder / "model") as partial:
            self.model.save_pretrained(partial)
            self.save_tokenizer(partial)

    def save_tokenizer(self, folder: Path) -> None:
        """As it came, if it came from a folder: transformers would write it anew in the words of its own version."""
        if not copy_tokenizer(local_folder(self.recipe.model.path), folder):
            self.tokenizer.save_pretrained(folder)


def describe_training(recipe: Recipe) -> dict:
    """What a card says about how the weights were made."""
    settings = recipe.qat
    rate = settings.optimizer.learning_rate * peak(settings.steps, settings.optimizer)
    sources = [s if isinstance(s, str) else s.path or f"hub:{s.hub}" for s in recipe.data.train]
    return {"data": [published(source) for source in sources], "loss_on": recipe.data.loss_on, "train": settings.train,
            "sequence_length": recipe.data.sequence_length, "batch_size": settings.batch_size,
            "gradient_accumulation": settings.gradient_accumulation, "optimizer": settings.optimizer.name,
            "learning_rate": rate, "warm_start": settings.warm_start.method,
            "loss": {name: weight for name in ("kl", "cross_entropy", "hidden", "hidden_kl")
                     if (weight := getattr(settings.loss, name))}}


def make_quantizer(model: nn.Module, recipe: Recipe) -> ExpertQuantizer:
    options = dict(scale_rule=recipe.quantization.scale_rule, ste=recipe.quantization.ste,
                   expected_tensors=recipe.quantization.expected_tensors)
    if methods_needed(recipe.qat):
        return MethodQuantizer(model, settings=recipe.qat, **options)
    return ExpertQuantizer(model, **options)


def require_tokenizer_fits(tokenizer, model: nn.Module, where: str) -> None:
    """Raises ValueError if the tokenizer can give ids that the model has no embedding for."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocabulary:
        raise ValueError(f"{where}: the tokenizer has ids up to {highest}, the model's vocabulary {vocabulary} entries: not "
                         "this model's tokenizer")


def make_teacher(model: nn.Module) -> nn.Module:
    """A frozen copy of `model` that shares every frozen tensor with it: only trained tensors are held twice."""
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    experts = {id(t.parameter) for t in find_expert_tensors(model)}
    teacher = copy.deepcopy(model, {id(t): t for t in frozen if id(t) not in experts}).eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher
