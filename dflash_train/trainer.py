"""The drafter's job: the target answers prompts, the drafter learns to foresee the answers, its acceptance is measured.

Runs on one process or under data parallelism, as `qat.trainer` does (same Accelerator, checkpoints, metrics, signals), also on
a target that is divided among the ranks (`dflash_train.sharded`); gradients are averaged here, in float32. The drafter's
weights are float32; its forward pass runs in the target's dtype (autocast), because that is what will be served.

Output, in <recipe.output>/<recipe.name>/dflash/:
    resolved.yaml environment.json metrics.jsonl curves.png checkpoints/ data/ features/ model/ summary.json
`model/` holds config.json, model.safetensors (published names) and mask_embedding.pt.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dflash_train import acceptance
from dflash_train import charts as figures
from dflash_train.anchors import block_labels, sample_anchors, teacher_index
from dflash_train.answers import regenerated
from dflash_train.dialogues import dialogues_digest, own_dialogues, pack
from dflash_train.features import OnlineFeatures, cached_features
from dflash_train.losses import draft_loss
from dflash_train.optimizer import make_optimizer
from dflash_train.preflight import foresee
from dflash_train.target import describe_target, identity, load_target, new_drafter
from modeling.dialogue_tokens import Rendering
from modeling.drafter import load_drafter, save_drafter
from recipes.load import published
from recipes.schema import Recipe
from storage.digests import combined, json_digest, model_digests, with_sum
from storage.files import write_json
from storage.terminal import counted
from training import checkpoint, report
from training.accelerator import make_accelerator
from training.epoch_order import EpochOrder
from training.preflight import missing_sections, require_ready
from training.resume import checkpoint_to_resume, require_same_inputs
from training.run import TrainingRun
from training.schedule import make_schedule, present_rate


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.output) / recipe.name / "dflash"


def require_sections(recipe: Recipe) -> None:
    """Raises ValueError if the recipe says nothing about a drafter."""
    for text in missing_sections(recipe):
        raise ValueError(text)


def run(recipe: Recipe, *, resume: bool, max_steps: int | None, other_processes: bool = False) -> int:
    """Runs the job; returns the exit code.

    other_processes: a checkpoint of another number of processes may be resumed.

    Raises:
        ValueError: a mistake in the recipe or its files. OSError: a file cannot be written. NonFinite: see there.
    """
    require_sections(recipe)
    if recipe.dflash.shard_drafter and (recipe.cluster is None or recipe.cluster.sharding == "ddp"):
        raise ValueError("dflash.shard_drafter: divides the drafter as cluster.sharding: fsdp2 divides the target; this recipe "
                         f"has {'no cluster section' if recipe.cluster is None else 'cluster.sharding: ddp'}")
    kind = Trainer
    if recipe.dflash.shard_drafter and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from dflash_train.sharded import ShardedDraftTrainer as kind  # builds on this module

    return kind(recipe, resume=resume, other_processes=other_processes).run(max_steps)


@dataclass
class Progress:
    """What a checkpoint holds beside weights, optimizer, schedule and generators; `step` counts finished updates."""

    step: int = 0

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]


class Trainer(TrainingRun):
    """One drafter run, from its recipe to its summary."""

    label = "drafter"

    def __init__(self, recipe: Recipe, *, resume: bool, other_processes: bool = False):
        self.recipe, self.settings, self.other_processes = recipe, recipe.dflash, other_processes
        self.accelerator = make_accelerator()
        self.main = self.accelerator.is_main_process
        self.folder = run_folder(recipe)
        self.writes = require_ready(recipe, "dflash", foresee(recipe), self.folder if resume else None)
        self.lock()
        newest = checkpoint_to_resume(self.folder, recipe, "dflash", self.say, self.accelerator) if resume else None
        self.target = load_target(recipe, self.accelerator.device, self.accelerator.num_processes)
        self.target.agree_on_fingerprint(self.accelerator)
        self.identity = identity(self.target, recipe)
        if newest is not None:
            require_same_inputs(newest, {"target": self.identity})  # before it answers prompts anew
        self.drafter = new_drafter(recipe, self.target).to(self.accelerator.device).train()
        self._load_data()
        self.compare_inputs(newest, lambda: {"target": self.identity, "training data": dialogues_digest(self.dialogues)})
        if not resume:
            self.set_earlier_aside(keep=("data", "features"))
        self.prepare()
        self.schedule = make_schedule(self.optimizer.optimizer, self.settings.steps, self.settings.optimizer)
        self.state = Progress()
        if newest is not None:
            self.read_state(newest)
            self.say(f"resuming {newest} at step {self.state.step} of {self.settings.steps}")
        self._print_header()
        self.open_records(newest is not None, f"{recipe.name}-dflash")

    def prepare(self) -> None:
        """Sets `model` and `optimizer`."""
        # evaluation_mode: no DistributedDataParallel wrapper; gradients are averaged in `take_gradients`.
        self.model = self.accelerator.prepare_model(self.drafter, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare(make_optimizer(self.drafter, self.settings.optimizer))

    def _load_data(self) -> None:
        settings, target = self.settings, self.target
        if settings.data:
            self.dialogues = own_dialogues(settings.data, settings.regenerate.prompt_field, target.tokenizer, target.end_ids,
                                           Rendering(self.recipe.chat.prompts, self.recipe.chat.template_options))
        else:
            self.dialogues = regenerated(self.recipe, target, self.folder, accelerator=self.accelerator, say=self.say)
        if settings.data:
            self._require_unused_mask()
        self.rows = pack(self.dialogues, settings.sequence_length, say=self.say)
        per_step = settings.batch_size * self.accelerator.num_processes
        if len(self.rows) < per_step:
            raise ValueError(f"{counted(len(self.rows), 'packed row')} of {settings.sequence_length} tokens, fewer than one "
                             f"batch of dflash.batch_size={settings.batch_size} on each of "
                             f"{counted(self.accelerator.num_processes, 'process', 'processes')}")
        self.allowed = self.rows.may_anchor()
        if settings.features == "online":
            self.features = OnlineFeatures(target, self.dialogues, self.rows)
            return
        self.features = cached_features(target, self.dialogues, self.rows, self.folder / "features" / self._features_key(),
                                        limit_gib=settings.features_gib, batch_size=settings.regenerate.batch_size,
                                        beside=self.writes, accelerator=self.accelerator, say=self.say)

    def _require_unused_mask(self) -> None:
        """Raises ValueError if the mask token occurs in own data: the export overwrites its embedding in the target."""
        mask = self.drafter.config.dflash_config["mask_token_id"]
        count = sum(mask in dialogue.tokens for dialogue in self.dialogues)
        if count:
            raise ValueError(f"drafter.mask_token: {mask} occurs in {count} of {len(self.dialogues)} dialogues; expected a "
                             "reserved entry that never occurs in text")

    def _features_key(self) -> str:
        """Digest of what determines the features: target, its layers, dialogues and where they are cut."""
        facts = [self.identity, self.target.target_layers, self.settings.sequence_length, dialogues_digest(self.dialogues)]
        return json_digest(facts)[:12]

    def _print_header(self) -> None:
        parameters = sum(p.numel() for p in self.drafter.parameters())
        tokens = sum(len(d.response) for d in self.dialogues)
        start = self.settings.start_from
        self.say(f"{self.recipe.name}: drafter of {parameters:,} parameters{f' from {start}' if start else ''}, "
                  f"block {self.drafter.block_size}, window {self.drafter.window}, mask token {self.drafter.mask_token_id}, "
                  f"features of layers {self.target.target_layers} of {self.target.path}; "
                  f"{counted(len(self.dialogues), 'dialogue')}, {tokens:,} response tokens, {counted(len(self.rows), 'row')}")

    def batches(self) -> Iterator[list[int]]:
        """Rows of each step of this process; the position is a function of the step alone."""
        count, processes = self.settings.batch_size, self.accelerator.num_processes
        order = EpochOrder(len(self.rows), seed=self.recipe.seed, shuffle=True)
        per_epoch = len(self.rows) // (count * processes)
        while True:
            epoch, position = divmod(self.state.step, per_epoch)
            order.set_epoch(epoch)
            begin = (position * processes + self.accelerator.process_index) * count
            yield list(order)[begin:begin + count]

    def update(self, batches: Iterator[list[int]]) -> dict[str, float]:
        """One optimizer update; returns its metrics (means over the anchors of all processes)."""
        loss, sums = self._loss(next(batches))
        if self.accelerator.num_processes > 1:  # gradients are averaged: a rank counts by its anchors, not as a rank
            share = sums["anchors"] / self.accelerator.reduce(sums["anchors"], reduction="sum")
            loss = loss * share * self.accelerator.num_processes
        self.accelerator.backward(loss)
        trained, norm = self.take_gradients()
        names = sorted(sums)
        flat = self.accelerator.reduce(torch.cat([sums[n].float().flatten() for n in names]), reduction="sum")
        parts = flat.split([sums[n].numel() for n in names])
        sums = {n: part.view(sums[n].shape) for n, part in zip(names, parts, strict=True)}
        if not (torch.isfinite(norm) and torch.isfinite(sums["loss"])):
            self._raise_non_finite(float(sums["loss"]), trained)
        torch.nn.utils.clip_grads_with_norm_([p for _, p in trained], self.settings.optimizer.max_grad_norm, norm)
        learning_rate = present_rate(self.state.step, self.settings.steps, self.settings.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.state.step += 1
        return self._means(sums) | {"grad_norm": float(norm), "learning_rate": learning_rate}

    def take_gradients(self) -> tuple[list[tuple[str, nn.Parameter]], torch.Tensor]:
        """Every trained parameter by name, with its gradient averaged over processes; and the norm over all of them."""
        trained = [(n, p) for n, p in self.drafter.named_parameters() if p.grad is not None]
        if self.accelerator.num_processes > 1:
            for _, parameter in trained:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return trained, torch.nn.utils.get_total_norm([p.grad for _, p in trained])

    def whole_drafter(self) -> nn.Module:
        """The drafter with all its weights; every process calls it."""
        return self.drafter

    def _loss(self, indices: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        settings, device, drafter = self.settings, self.accelerator.device, self.drafter
        block = drafter.block_size
        seed = (self.recipe.seed * 1_000_003 + self.state.step) * 4096 + self.accelerator.process_index
        anchors = sample_anchors(self.allowed[indices], settings.anchors, torch.Generator().manual_seed(seed))
        labels = block_labels(self.rows.tokens[indices], self.rows.ends[indices], anchors, block)
        ids = self.rows.tokens[indices].long().gather(1, anchors.clamp_min(0))
        previous = torch.cat((ids[:, :, None], labels[:, :, :-1].clamp_min(0)), dim=2)
        index = teacher_index(anchors, block, self.rows.tokens.shape[1])
        target_hidden, last = self.features.of_rows(indices)
        if settings.features == "online":
            self.target.rest()
        teacher = last.gather(1, index.flatten(1)[:, :, None].expand(-1, -1, last.shape[-1]).to(device))
        dtype = getattr(torch, self.recipe.model.dtype)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = drafter(target_hidden.to(dtype), ids.to(device), anchors.to(device),
                             self.rows.starts[indices].long().to(device), self.target.embed_tokens)
        flat = (hidden[:, :, 1:].flatten(0, 1), labels.flatten(0, 1).to(device), teacher.view(-1, block - 1, last.shape[-1]),
                previous.flatten(0, 1).to(device))
        return draft_loss(*flat, self.target.head, drafter, settings.loss)

    def _means(self, sums: dict[str, torch.Tensor]) -> dict:
        valid = sums["valid"].clamp_min(1)
        anchors = float(sums["anchors"])
        return {"loss": float(sums["loss"]) / anchors, "cross_entropy": float(sums["cross_entropy"] / valid.sum()),
                "greedy_length": float(sums["greedy_length"]) / anchors,
                "sampled_length": float(sums["sampled_length"]) / anchors,
                "accuracy": (sums["correct"] / valid).tolist(), "overlap": (sums["overlap"] / valid).tolist()}

    def _raise_non_finite(self, loss: float, trained: list[tuple[str, nn.Parameter]]) -> None:
        bad = next((n for n, p in trained if not torch.isfinite(p.grad).all()), None)
        what = f"loss {loss}" + (f"; gradient of {bad}" if bad else "")
        self.stop_non_finite(f"{what} is not finite")

    def record(self, values: dict, seconds: float, bar: report.ProgressBar) -> None:
        settings, step = self.settings, self.state.step
        tokens = settings.batch_size * settings.sequence_length * self.accelerator.num_processes
        bar.update(step, f"loss {values['loss']:.3f}  length {values['greedy_length']:.2f}  {tokens / seconds:,.0f} tok/s")
        if self.metrics is not None and (step % settings.log_every == 0 or step == settings.steps):
            self.metrics.write("train", step, seconds=seconds, tokens_per_second=tokens / seconds, **values)

    def draw_curves(self, metrics: Path, picture: Path) -> None:
        figures.draw_curves(metrics, picture, self.recipe.name)

    def finish(self) -> None:
        """Writes model/, measures it as read back from disk, writes summary.json and prints the table."""
        from rich.console import Console

        whole = self.whole_drafter()
        if not self.main:
            self.target.rest()  # while the first process measures
            return
        final = self.folder / "model"
        with checkpoint.folder_aside(final) as partial:
            save_drafter(whole, partial)
        self.say("measuring acceptance on held-out prompts")
        began = time.perf_counter()
        drafter = load_drafter(final, getattr(torch, self.recipe.model.dtype)).to(self.accelerator.device)
        summary = acceptance.measure(self.recipe, self.target, drafter, say=self.say)
        self.target.rest()
        summary |= {
            "inputs": self.inputs, "weights": combined(model_digests(final)),
            "steps": self.settings.steps, "seed": self.recipe.seed, "target": describe_target(self.target, self.recipe),
            "start_from": self.settings.start_from, "parameters": sum(p.numel() for p in self.drafter.parameters()),
            "response_tokens": sum(len(d.response) for d in self.dialogues), "dialogues": len(self.dialogues),
            "prompts": [published(name) for name in self.settings.data or self.settings.regenerate.prompts],
            "own_data": bool(self.settings.data),
            "seconds": self.training_seconds(self.settings.steps),
            "measuring_seconds": time.perf_counter() - began, "environment": report.environment(),
        }
        write_json(self.folder / "summary.json", with_sum(acceptance.without_nan(summary)))
        self.draw()
        figures.draw_acceptance(summary, self.folder / "acceptance.png", self.recipe.name)
        Console().print(acceptance.table(summary))
        print(f"written: {self.folder}/ (model/, summary.json, metrics.jsonl, curves.png, acceptance.png)")
