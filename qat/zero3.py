"""QAT under DeepSpeed's ZeRO-3 (`cluster.sharding: zero3`): for clusters and habits that have it, and for its offloading.

What differs from FSDP2 (`qat.sharded`), and nothing else:

    weights      every rank reads the whole model into host memory, then keeps its flat runs (`training.sharding.zero3`)
    experts      the float32 masters are DeepSpeed's own; after each step every rank rounds its runs of them into what gathers
                 send, bf16 values: no codes travel
    norm, clip   gradients are looked at here, clipped by DeepSpeed
    checkpoints  this rank's runs in a safetensors file: for the same number of ranks only
    model/       put together tensor by tensor

It trains experts with AdamW and plain straight-through rounding. What works on whole experts (starts, Muon) or writes masters
beside the optimizer is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from checkpoint.load import load_model
from modeling.all_experts import use_all_experts
from modeling.output_head import require_plain_head
from mxfp4 import quantize
from mxfp4.fake_quant import fake_quantize_
from qat.expert_quantizer import ExpertQuantizer, ExpertTensor, find_expert_tensors, require_finite, without_noise
from qat.meta_model import meta_model
from qat.methods import needed as methods_needed
from qat.optimizer import make_optimizer
from qat.sharded import ShardedTrainer
from recipes.schema import Recipe
from training.sharding import zero3
from training.sharding.checkpoint import random_states, restore_generators
from training.sharding.layout import Layout
from training.sharding.model_folder import folder_of_all_ranks, write_model
from training.state_files import host_copy, load_state, random_state, save_state


def require_supported(recipe: Recipe, ranks: int) -> None:
    """Raises ValueError, one line, for a recipe or a launch that this path does not train; reads no weights."""
    qat, cluster, dtype = recipe.qat, recipe.cluster, recipe.model.dtype
    wrong = [f"{key}; expected {expected}" for is_so, key, expected in (
        (ranks == 1, "one process has nothing to divide", "several processes, or cluster.sharding: ddp"),
        (cluster.expert_parallel > 1, f"cluster.expert_parallel: {cluster.expert_parallel} (DeepSpeed's AutoEP replaces "
         "MoE blocks, and its checkpoints cannot be put together)", "1, or fsdp2"),
        (cluster.replicas > 1, f"cluster.replicas: {cluster.replicas}", "1, or fsdp2"),
        (qat.optimizer.name == "muon", "qat.optimizer.name: muon needs whole matrices, and a flat run is a part of one",
         "adamw, or fsdp2"),
        (qat.optimizer.relative, "qat.optimizer.relative", "false, or fsdp2"),
        (recipe.quantization.ste == "clip", "quantization.ste: clip masks gradients that DeepSpeed owns", "identity, or fsdp2"),
        (qat.train == "all", "qat.train: all", "experts, or fsdp2"),
        (qat.teacher != "model", f"qat.teacher: {qat.teacher}", "model, or fsdp2"),
        (qat.warm_start.method != "none", f"qat.warm_start.method: {qat.warm_start.method} needs whole experts",
         "none, or fsdp2"),
        (qat.oscillation.method not in ("none", "ema"), f"qat.oscillation.method: {qat.oscillation.method} writes masters that "
         "DeepSpeed owns", "none or ema, or fsdp2"),
        (qat.grid_pull.strength > 0, "qat.grid_pull writes masters that DeepSpeed owns", "strength 0, or fsdp2"),
        (methods_needed(qat), "qat.scales and qat.soft_rounding", "rule and none, or fsdp2"),
        (qat.result == "best", "qat.result: best", "last, or fsdp2"),
        (qat.evaluation_dtype == "float32" != dtype, "qat.evaluation_dtype: float32", "model, or fsdp2")) if is_so]
    if wrong:
        raise ValueError(f"cluster.sharding: zero3: {wrong[0]}")


def require_whole_blocks(tensors: list[ExpertTensor], ranks: int) -> None:
    """Raises ValueError for the first whose blocks of 32 the ranks' runs would cut."""
    for tensor in tensors:
        zero3.require_whole_blocks(tensor.name, tuple(tensor.parameter.shape), tensor.axis, ranks)


class Zero3Quantizer(ExpertQuantizer):
    """The quantizer of a model in flat runs: all tensors that methods see are this rank's blocks, [1, blocks, 32]."""

    def __init__(self, model: nn.Module, divide, **settings):
        """Args: divide: called with the expert parameters; the model is in runs afterwards."""
        self._divide = divide
        super().__init__(model, **settings)

    def _take_masters(self) -> None:
        for tensor in self.tensors:
            tensor.parameter.requires_grad_(True)
        self._divide([t.parameter for t in self.tensors])
        self.runs = [zero3.Runs(t.parameter) for t in self.tensors]

    @property
    def masters(self) -> list[torch.Tensor]:
        """Read-only: with an offloaded optimizer they are copies."""
        return [run.master() for run in self.runs]

    @torch.no_grad()
    def requantize(self, sources: Iterable[torch.Tensor] | None = None) -> None:
        for tensor, run, source in zip(self.tensors, self.runs, sources or self.masters, strict=True):
            run.let_go()
            try:
                fake_quantize_(run.rounded(), source.data, scale_rule=self.scale_rule)
            except ValueError as error:
                require_finite(f"master of {tensor.name}, this rank's blocks", source)
                raise ValueError(f"{tensor.name}: {error}") from None

    def rounded(self, index: int) -> torch.Tensor:
        return self.runs[index].rounded()

    def codes(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize(self.rounded(index), scale_rule=self.scale_rule)

    def of_all_experts(self, index: int, values: torch.Tensor) -> torch.Tensor:
        """[1, ...] of every rank's run, one after the other: blocks [1, blocks, 32] become the whole tensor, figures of a run
        one row for each rank."""
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, values.detach().cpu())
        if values.ndim < 3:
            return torch.cat(parts)
        return torch.cat([part.flatten() for part in parts]).view(self.runs[index].shape)


class _Steps:
    """The engine's optimizer, as a trainer uses one."""

    def __init__(self, engine):
        self.engine = engine

    @property
    def param_groups(self) -> list[dict]:
        return self.engine.optimizer.param_groups

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        """Done by the engine in its step."""


class Zero3Trainer(ShardedTrainer):
    """One QAT run on `cluster.sharding: zero3`."""

    whole = False
    other_shards: list = []

    def load_model(self) -> nn.Module:
        recipe, ranks = self.recipe, self.accelerator.num_processes
        require_supported(recipe, ranks)
        require_whole_blocks(find_expert_tensors(meta_model(recipe)[0]), ranks)
        zero3.require_deepspeed()
        self.layout, self.compute_dtype = Layout(ranks), getattr(torch, recipe.model.dtype)
        self.say(f"sharding: ZeRO-3 over {ranks} ranks")
        return self._whole_model()

    def _whole_model(self) -> nn.Module:
        model = self.recipe.model
        return load_model(model.path, dtype=self.compute_dtype, trust_remote_code=model.trust_remote_code)

    def attach(self, model: nn.Module) -> None:
        self.teacher = self.teacher_again()
        require_plain_head(model)
        use_all_experts(model)
        without_noise(model).requires_grad_(False)
        settings = self.recipe.quantization

        def divide(parameters: list[nn.Parameter]) -> None:
            self.inner = make_optimizer(parameters, self.recipe.qat.optimizer)
            self.engine = zero3.divide(model, zero3.configuration(self.recipe), self.inner)

        self.quantizer = Zero3Quantizer(model, divide, scale_rule=settings.scale_rule,
                                        expected_tensors=settings.expected_tensors)
        without_noise(model)  # the engine puts its module into training mode
        self.others = []

    def teacher_again(self) -> nn.Module:
        teacher = self._whole_model().eval().requires_grad_(False)
        require_plain_head(teacher)
        use_all_experts(teacher)
        zero3.divide(teacher, zero3.configuration(self.recipe))
        return teacher.eval()

    def originals(self) -> Iterator[torch.Tensor]:
        return (run.blocks(self.teacher.get_parameter(t.name).ds_tensor)
                for t, run in zip(self.quantizer.tensors, self.quantizer.runs, strict=True))

    def make_optimizer(self) -> torch.optim.Optimizer:
        return self.inner

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, _Steps(self.engine)
        self.loader = self.accelerator.prepare(self.loader)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-step; the update's last one is the trainer's

    def take_gradients(self) -> tuple[list[nn.Parameter], torch.Tensor]:
        """DeepSpeed keeps them, and clips them by the same norm in its step."""
        square = sum(torch.linalg.vector_norm(run.gradient()).double().square() for run in self.quantizer.runs)
        parts = [torch.zeros_like(square) for _ in range(self.layout.ranks)]
        dist.all_gather(parts, square)
        return [], torch.stack(parts).sum().sqrt().float()

    def _own_non_finite(self) -> str | None:
        for tensor, run in zip(self.quantizer.tensors, self.quantizer.runs, strict=True):
            gradient, first = run.gradient().flatten(), dist.get_rank() * run.parameter.ds_tensor.numel()
            bad = (~torch.isfinite(gradient)).nonzero()
            if len(bad):
                index = torch.unravel_index(first + bad[0, 0].cpu(), run.shape)
                return (f"gradient of {tensor.name}: {len(bad)} non-finite values, the first at expert {int(index[0])}, index "
                        f"{[int(i) for i in index[1:]]} ({float(gradient[bad[0, 0]])})")
        return None

    # Checkpoints

    def state_writer(self, *, copied: bool):
        state = self.state
        saved = {"layout": asdict(self.layout), "step": state.step, "batches": state.batches, "heldout": state.heldout(),
                 "averaged_steps": state.averaged_steps, "average": state.average, "schedule": self.schedule.state_dict(),
                 "oscillation": state.oscillation.state_dict(), "health": state.health.state_dict(),
                 "rates": [g["lr"] for g in self.optimizer.param_groups],
                 "runs": [[flat, dict(moments)] for flat, moments in zero3.optimizer_runs(self.engine)]}
        generators = random_state() | {"micro_step": self.accelerator.step}
        if copied:
            saved, generators = host_copy(saved), host_copy(generators)
        own, name = run_file(self.accelerator.process_index), random_states(self.accelerator)

        def write(folder: Path, group=None) -> None:
            save_state(folder / own, saved)
            save_state(folder / name, generators)

        return write

    def read_state(self, path: Path) -> None:
        file = path / run_file(self.accelerator.process_index)
        others = len(list(path.glob(run_file("*"))))
        if others != self.layout.ranks:
            raise ValueError(f"{path}: written by {others} ranks of ZeRO-3, now {self.layout.ranks}: flat runs are resumed by "
                             "as many ranks" if others else f"{path}: not written with cluster.sharding: zero3; resume it as "
                             "it was trained, or start a new run without --resume")
        saved, state = load_state(file), self.state
        for (flat, moments), (values, kept) in zip(zero3.optimizer_runs(self.engine), saved["runs"], strict=True):
            if flat.shape != values.shape:
                raise ValueError(f"{file}: does not fit this recipe's model: {values.numel():,} weights, expected "
                                 f"{flat.numel():,}")
            flat.copy_(values)
            moments.update({k: v.to(flat.device) if v.ndim else v for k, v in kept.items()})
        for group, rate in zip(self.optimizer.param_groups, saved["rates"], strict=True):
            group["lr"] = rate
        self.schedule.load_state_dict(saved["schedule"])
        state.step, state.batches, state.averaged_steps = saved["step"], saved["batches"], saved["averaged_steps"]
        state.load_heldout(saved["heldout"])
        masters = self.quantizer.masters
        state.average = [a.to(m.device) for a, m in zip(saved["average"], masters, strict=False)]
        state.oscillation.load_state_dict(saved["oscillation"])
        state.health.load_state_dict(saved["health"])
        self.quantizer.requantize(state.oscillation.means)
        restore_generators(self.accelerator, path)

    # The end

    def round_plainly(self, quantizer: ExpertQuantizer, originals: Iterable[torch.Tensor]) -> None:
        quantizer.requantize(originals)

    def _evaluation_pair(self):
        return self.model, self.teacher, self.quantizer

    def save_model(self) -> None:
        with folder_of_all_ranks(self.folder / "model", self.accelerator) as partial:
            write_model(self.model, partial, lambda name: None, self.compute_dtype, whole=zero3.whole)
            if self.main:
                self.save_tokenizer(partial)


def run_file(rank: int | str) -> str:
    return f"zero3_run_{rank}.safetensors"
