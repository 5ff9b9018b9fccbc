"""The original model's last hidden states of the training rows, instead of the model itself (`qat.teacher: disk`).

The loss compares the logits of student and teacher, and the head is frozen and the same for both: a last hidden state is all
that training needs of the teacher, 2 bytes a feature in bf16, some forty times less than logits. The KL is over the whole
vocabulary, as with the model; states differ from those of a pass in the loop by rounding alone, because experts multiply other
rows side by side. The teacher is loaded to write them, goes, and comes back for the final evaluation.

    <run>/teacher/<key>/    see `training.state_cache`; the key is a digest of what determines them: weights, rows, dtype
"""

from __future__ import annotations

import gc
import math

import torch

from qat.data import split_rows
from qat.losses import run_hidden
from storage.digests import json_digest
from training.epoch_order import EpochOrder
from training.sharding.lockstep import Lockstep
from training.state_cache import StateCache, is_written, write_states

STATES, KIND = "teacher", "last"


class TeacherStates:
    """States of the rows that a run will train on.

    Args:
        job: a `qat.trainer.Trainer` that knows its data and inputs, and no model yet.
    """

    def __init__(self, job):
        self.job, self.rows = job, rows_to_come(job)
        self.folder = job.folder / STATES / json_digest([job.inputs, job.recipe.model.dtype, self.rows])[:12]
        self.written = is_written(self.folder)

    def replace_teacher(self) -> None:
        """Writes the states if they are not there, and lets go of the teacher.

        Raises:
            ValueError: larger than `qat.teacher_gib`, or damaged. OSError: no room for them.
        """
        job = self.job
        if not self.written:
            self._write(job)
        self.cache = StateCache(self.folder, job.accelerator)
        job.teacher = None
        if hasattr(job, "heldout"):
            job.heldout.teacher = job.model  # for its head: the states are there already
        gc.collect()

    def _write(self, job) -> None:
        dataset, device = job.loader.dataset, job.accelerator.device
        size, length = job.settings.batch_size, job.recipe.data.sequence_length
        dtype = getattr(torch, job.recipe.model.dtype)
        config = job.model.config.get_text_config()

        @torch.no_grad()
        def last_states(ids: torch.Tensor) -> torch.Tensor:
            return run_hidden(job.teacher, ids.to(device)).last

        divided = job.accelerator.num_processes > 1 and hasattr(job, "layout")
        lockstep = Lockstep(lambda: last_states(torch.zeros(1, 1, dtype=torch.long)), device) if divided else None

        def compute(items: list[int]) -> dict[str, list[torch.Tensor]]:
            found: list[torch.Tensor] = []
            for start in range(0, len(items), size):
                if lockstep:
                    lockstep.begin()
                ids, _ = split_rows(torch.stack(list(dataset.select(items[start:start + size])["input_ids"])))
                found += last_states(ids).to("cpu", dtype)
            return {KIND: found}

        write_states(self.folder, items=self.rows, lengths=[length] * len(dataset), widths={KIND: config.hidden_size},
                     dtype=dtype, compute=compute, key="qat.teacher_gib", limit_gib=job.settings.teacher_gib,
                     accelerator=job.accelerator, rest=lockstep.rest if lockstep else lambda: None, say=job.say,
                     beside=job.writes, label="the teacher's states")

    def of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """States [B, T, H] of the dataset's rows [B], where the rows lie."""
        return torch.stack([self.cache.read(KIND, int(row)) for row in rows]).to(rows.device)


def rows_to_come(job) -> list[int]:
    """Rows of the dataset that the run uses, ascending: those of its steps and processes, or all there are."""
    settings, dataset, processes = job.settings, job.loader.dataset, job.accelerator.num_processes
    micro_steps = settings.steps * settings.gradient_accumulation
    per_epoch = math.ceil(len(dataset) / settings.batch_size)
    if micro_steps * processes >= per_epoch - processes:
        return list(range(len(dataset)))
    order = list(EpochOrder(len(dataset), seed=job.recipe.seed, shuffle=job.recipe.data.shuffle))
    return sorted(order[:micro_steps * processes * settings.batch_size])
