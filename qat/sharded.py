"""QAT on sharded models: masters are the FSDP parameters of the experts, codes travel instead of weights.

What differs from one process (`qat.trainer`), and nothing else:

    weights      every rank reads and holds its shards (`checkpoint.load` with a `DistributedConfig`); the teacher is a second
                 tree of shards: FSDP models cannot be copied
    experts      float32 shards, gathered as MXFP4 codes (`training.sharding.quantized_gather`); no rounded copy is kept
    gradients    reduced by FSDP in float32 onto the shards, in every micro-step
    norm         over all ranks; everything else of an update is local
    evaluation   the plainly rounded model is the student with the original experts as sources of its codes
    checkpoints  `training.sharding.checkpoint`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from checkpoint.load import owned_rows
from modeling.all_experts import use_all_experts
from modeling.output_head import require_plain_head
from mxfp4.fake_quant import saturated
from qat import evaluate
from qat.expert_quantizer import ExpertQuantizer, ExpertTensor, find_expert_tensors, require_finite, without_noise
from qat.meta_model import meta_model
from qat.methods import MethodQuantizer
from qat.methods import needed as methods_needed
from qat.trainer import Trainer
from storage.terminal import counted
from training.sharding import checkpoint as sharded_checkpoint
from training.sharding.layout import layout_of, require_divisible
from training.sharding.model_folder import folder_of_all_ranks, write_model
from training.sharding.packed_teacher import PackedShard, pack_experts
from training.sharding.quantized_gather import QuantizedGather
from training.sharding.shards import LocalShard, copies, gather_rows, local_shards, reshard, total_norm
from training.sharding.trees import load_shards


class ShardedQuantizer(ExpertQuantizer):
    """The quantizer of a model whose experts are FSDP units of their own, with float32 parameters.

    `masters` are this rank's rows, and so are the tensors that every method takes or gives; `tensors` describe the whole ones.
    """

    gather_codes = True  # False: rounded values in the compute dtype, which benchmarks/sharded_step.py compares with

    def _take_masters(self) -> None:
        for tensor in self.tensors:
            tensor.parameter.requires_grad_(True)
        self.shards = local_shards([(t.name, t.parameter) for t in self.tensors])
        self.masters = [shard.local for shard in self.shards]
        self.gathers = [self._gather(tensor) for tensor in self.tensors]

    def _gather(self, tensor: ExpertTensor) -> QuantizedGather:
        mesh = tensor.parameter.device_mesh
        shards = mesh.size() // copies(tensor.parameter)
        return QuantizedGather(tensor.parameter._local_tensor, axis=tensor.axis, scale_rule=self.scale_rule,
                               even=self.gather_codes and tensor.num_experts % shards == 0, compute_dtype=self.compute_dtype,
                               padded_rows=-(-tensor.num_experts // shards))

    def __init__(self, model: nn.Module, *, compute_dtype: torch.dtype, **settings):
        """Args: as `ExpertQuantizer`; compute_dtype: what the experts are decoded to."""
        self.compute_dtype = compute_dtype
        super().__init__(model, **settings)

    @torch.no_grad()
    def requantize(self, sources: Iterable[torch.Tensor] | None = None) -> None:
        for tensor, gather, source in zip(self.tensors, self.gathers, sources or self.masters, strict=True):
            try:
                gather.encode(source.data)
            except ValueError as error:
                require_finite(f"master of {tensor.name}", source, first_expert=tensor.owned.start)
                raise ValueError(f"{tensor.name}: {error}") from None

    def rounded(self, index: int) -> torch.Tensor:
        return self.gathers[index].rounded(self.compute_dtype)

    def codes(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gathers[index].codes()

    def of_all_experts(self, index: int, values: torch.Tensor) -> torch.Tensor:
        return gather_rows(values, self.shards[index])

    @torch.no_grad()
    def pull_gradients(self) -> None:
        for tensor, shard in zip(self.tensors, self.shards, strict=True):
            shard.pull_gradient()
            if self.ste == "clip":
                shard.local.grad.masked_fill_(saturated(shard.local, scale_rule=self.scale_rule, axis=tensor.axis), 0)


class ShardedMethodQuantizer(MethodQuantizer, ShardedQuantizer):
    """Chosen or learned block scales, or soft codes, of a rank's own rows: a shard holds whole blocks of whole experts.

    Codes on other scales are gathered like those on the rule's. Soft codes are on no grid: while a recipe has them, values
    travel in the compute dtype, also after rounding became hard (FSDP's buffers keep their size).
    """

    @property
    def gather_codes(self) -> bool:
        return self.settings.soft_rounding.method == "none"

    def put(self, index: int, values: torch.Tensor, scales: torch.Tensor | None) -> None:
        self.gathers[index].put(values, scales)


class ShardedTrainer(Trainer):
    """One QAT run on `cluster.sharding: fsdp2`. On a single process nothing is sharded but the form of the checkpoints."""

    packed: dict[str, PackedShard] = {}  # the teacher's experts, if they are kept in FP8

    def load_model(self) -> nn.Module:
        recipe = self.recipe
        self.layout = layout_of(recipe.cluster, self.accelerator.num_processes)
        self.whole = self.layout.ranks == 1
        if self.whole:
            return super().load_model()
        if recipe.cluster.offload_optimizer:
            raise ValueError("cluster.offload_optimizer: DeepSpeed's, for cluster.sharding: zero3; expected false with "
                             f"cluster.sharding: {recipe.cluster.sharding}")
        if recipe.qat.warm_start.layers_together:
            raise ValueError("qat.warm_start.layers_together measures a model that is whole on one process; expected 0 with "
                             f"cluster.sharding: {recipe.cluster.sharding}")
        if recipe.qat.warm_start.folder is not None:
            raise ValueError("qat.warm_start.folder keeps the initial codes of a whole model; expected null with "
                             f"cluster.sharding: {recipe.cluster.sharding}")
        self.compute_dtype = getattr(torch, recipe.model.dtype)
        model, _ = meta_model(recipe)
        tensors = find_expert_tensors(model)
        require_divisible(self.layout, {t.name: t.num_experts for t in tensors})
        self.expert_names = [t.name for t in tensors]
        self.expert_modules = tuple(dict.fromkeys(t.module for t in tensors))
        self.say(f"sharding: {self.layout}")
        return self.load_tree(self.compute_dtype, masters=True)

    def load_tree(self, compute_dtype: torch.dtype, *, masters: bool) -> nn.Module:
        """The base model in shards; with `masters` its experts are float32 and FSDP units of their own."""
        model = self.recipe.model
        return load_shards(model.path, self.layout, dtype=getattr(torch, model.dtype), compute_dtype=compute_dtype,
                           trust_remote_code=model.trust_remote_code, masters=self.expert_modules if masters else ())

    def attach(self, model: nn.Module) -> None:
        if self.whole:
            super().attach(model)
            self.shards = [LocalShard(t.name, t.parameter, m) for t, m in self.quantizer]
            self.shards += [LocalShard(n, p, p) for n, p in self.trained_others(model)]
            self.saved_shards = [*self.shards, *self._shift_shards()]
            return
        self.teacher = self.teacher_again() if self.needs_teacher else None
        self._choose_trainable(without_noise(model))
        if self.layout.expert_parallel == 1:
            use_all_experts(model)
        self.quantizer = self.make_quantizer(model, self.compute_dtype)
        self.other_shards = local_shards(self.trained_others(model))
        self.others = [shard.local for shard in self.other_shards]
        self.shards = [*self.quantizer.shards, *self.other_shards]
        self.saved_shards = [*self.shards, *self._shift_shards()]

    def make_quantizer(self, model: nn.Module, compute_dtype: torch.dtype) -> ShardedQuantizer:
        settings = self.recipe.quantization
        options = dict(compute_dtype=compute_dtype, scale_rule=settings.scale_rule, ste=settings.ste,
                       expected_tensors=settings.expected_tensors)
        if methods_needed(self.recipe.qat):
            return ShardedMethodQuantizer(model, settings=self.recipe.qat, **options)
        return ShardedQuantizer(model, **options)

    def _shift_shards(self) -> list[LocalShard]:
        """The scales' shifts beside the parameters that they belong to, for checkpoints."""
        shifts = getattr(self.quantizer, "shifts", ())
        return [LocalShard(f"{t.name}.shifts", t.parameter, shift)
                for t, shift in zip(self.quantizer.tensors, shifts, strict=bool(shifts))]

    def teacher_again(self) -> nn.Module:
        if self.whole:
            return super().teacher_again()
        teacher = self.load_tree(self.compute_dtype, masters=False).eval().requires_grad_(False)
        self.packed = {}
        if self.recipe.qat.teacher == "packed":
            found = pack_experts(teacher, self.recipe.model.path, self.expert_names)
            if isinstance(found, str):
                self.say(f"qat.teacher: packed: {found}: its experts stay in {self.recipe.model.dtype}")
            else:
                self.packed = found
        require_plain_head(teacher)  # a forward pass, after which FSDP takes no more hooks
        return teacher

    def originals(self) -> Iterator[torch.Tensor]:
        for tensor, weight in zip(self.quantizer.tensors, super().originals(), strict=True):
            yield self.packed[tensor.name].decoded() if tensor.name in self.packed else weight

    def agree_on_masters(self) -> None:
        """Nothing to do: each expert's masters are computed by one rank (or by replicas, from the same numbers)."""

    def take_gradients(self) -> tuple[list[nn.Parameter], torch.Tensor]:
        if self.whole:
            return super().take_gradients()
        self.quantizer.pull_gradients()
        for shard in self.other_shards:
            shard.pull_gradient()
        norm = total_norm([(s.local.grad, copies(s.parameter)) for s in self.shards], self.accelerator.device)
        return [s.local for s in self.shards], norm

    def non_finite_gradient(self) -> str | None:
        """As found by the first rank that has one; every rank says the same and stops."""
        if self.whole:
            return super().non_finite_gradient()
        found: list = [None] * self.layout.ranks
        dist.all_gather_object(found, self._own_non_finite())
        return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text), None)

    def _own_non_finite(self) -> str | None:
        try:
            for shard in self.shards:
                require_finite(f"gradient of {shard.name}", shard.local.grad, first_expert=owned_rows(shard.parameter).start)
        except ValueError as error:
            return str(error)
        return None

    # Checkpoints

    def state_writer(self, *, copied: bool):
        state, names = self.state, [t.name for t in self.quantizer.tensors]
        tensors = {"master": {s.name: s.local.detach() for s in self.saved_shards}}
        moments, numbers = sharded_checkpoint.optimizer_tensors(self.optimizer.optimizer, self.saved_shards)
        control = state.oscillation.state_dict()
        for side, part in enumerate(("masters", "rounded")):
            control[f"ways.{part}"] = [w[side] for w in control.get("ways") or ()]
        control.pop("ways", None)
        health = state.health.state_dict()
        kinds = {"average": state.average, **control, "codes": [c for c, _ in health["last"]],
                 "scales": [s for _, s in health["last"]]}
        tensors |= moments | {kind: dict(zip(names, values, strict=True)) for kind, values in kinds.items() if values}
        return sharded_checkpoint.state_writer(self.accelerator, tensors, self.saved_shards, {
            "step": state.step, "batches": state.batches, "averaged_steps": state.averaged_steps,
            "layout": asdict(self.layout), "optimizer": numbers, "rates": [g["lr"] for g in self.optimizer.param_groups],
            "schedule": self.schedule.state_dict(), "routed": health["routed"], "heldout": state.heldout()}, copied=copied)

    def read_state(self, path: Path) -> None:
        saved, tensors = sharded_checkpoint.read_state(path, self.saved_shards)
        state, names = self.state, [t.name for t in self.quantizer.tensors]
        sharded_checkpoint.restore_optimizer(self.optimizer.optimizer, self.saved_shards, tensors, saved["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, saved["rates"], strict=True):
            group["lr"] = rate
        self.schedule.load_state_dict(saved["schedule"])
        state.step, state.averaged_steps = saved["step"], saved["averaged_steps"]
        state.load_heldout(saved.get("heldout"))
        of = {kind: [named[n] for n in names] for kind, named in tensors.items() if names[0] in named}
        state.average = of.get("average", [])
        control = {kind: of.get(kind) for kind in ("means", "flips", "frozen", "last")}
        if "ways.masters" in of:
            control["ways"] = [torch.stack(pair) for pair in zip(of["ways.masters"], of["ways.rounded"], strict=True)]
        state.oscillation.load_state_dict(control)
        state.health.load_state_dict({"last": list(zip(of["codes"], of["scales"], strict=True)),
                                      "routed": saved["routed"]})
        self._restore_rounding(of)
        before = saved["layout"]
        state.batches = saved["batches"] * before["ranks"] // self.layout.ranks
        if before == asdict(self.layout):
            sharded_checkpoint.restore_generators(self.accelerator, path)
        else:
            self.say(f"--resume: written by {counted(before['ranks'], 'rank')} (expert parallel {before['expert_parallel']}, "
                     "replicas "
                     f"{before['replicas']}), now {self.layout}: goes on from the same weights and moments, not bit for bit")

    def _restore_rounding(self, of: dict[str, list[torch.Tensor]]) -> None:
        """What the model computed with at that step: the rounding of the means under `ema`, of the masters otherwise."""
        if isinstance(self.quantizer, MethodQuantizer):
            self.quantizer.set_step(self.state.step)
        self.quantizer.requantize(of.get("means"))

    # The end

    @torch.no_grad()
    def compare(self, **options) -> dict:
        if self.whole:
            return super().compare(**options)
        student, judge, quantizer = self._evaluation_pair()
        sources = self.state.average or self.state.oscillation.means or self.quantizer.masters
        options |= {"together": True}
        student.eval()
        variants = {"bf16": evaluate.evaluate_domains(judge, judge, self.domains, **options)}
        # Plain rounding is that of the original model: what else is trained is put back for it.
        trained = [shard.local.detach().clone() for shard in self.other_shards]
        reshard(judge)
        self._put_others(student, [judge.get_parameter(shard.name)._local_tensor for shard in self.other_shards])
        self.round_plainly(quantizer, (original.float() for original in self.originals()))
        variants["ptq"] = evaluate.evaluate_domains(student, judge, self.domains, **options)
        self._put_others(student, trained)
        quantizer.requantize(sources)
        variants["qat"] = evaluate.evaluate_domains(student, judge, self.domains, **options)
        without_noise(student)
        return evaluate.summarized(variants)

    def round_plainly(self, quantizer: ExpertQuantizer, originals: Iterable[torch.Tensor]) -> None:
        ShardedQuantizer.requantize(quantizer, originals)  # whatever scales or codes the recipe has

    def _put_others(self, student: nn.Module, values: list[torch.Tensor]) -> None:
        """Writes shards of what is trained beside experts; weights that are still gathered would hide them."""
        reshard(student)
        for shard, value in zip(self.other_shards, values, strict=True):
            student.get_parameter(shard.name)._local_tensor.copy_(value)

    def _evaluation_pair(self) -> tuple[nn.Module, nn.Module, ShardedQuantizer]:
        """(student, teacher, the student's quantizer): the run's own, or float32 trees loaded for the evaluation."""
        if self.recipe.qat.evaluation_dtype == "model" or self.compute_dtype is torch.float32:
            return self.model, self.teacher, self.quantizer
        judge = self.load_tree(torch.float32, masters=False).eval().requires_grad_(False)
        student = self.load_tree(torch.float32, masters=True).requires_grad_(False)
        quantizer = self.make_quantizer(student, torch.float32)
        if isinstance(quantizer, MethodQuantizer):
            quantizer.load_state_dict(self.quantizer.state_dict())
            quantizer.set_step(self.state.step)
        return student, judge, quantizer

    def save_model(self) -> None:
        if self.whole:
            super().save_model()
            return
        rounded = {t.name: self.quantizer.rounded(i) for i, t in enumerate(self.quantizer.tensors)}
        with folder_of_all_ranks(self.folder / "model", self.accelerator) as partial:
            write_model(self.model, partial, rounded.get, self.compute_dtype)
            if self.main:
                self.save_tokenizer(partial)
