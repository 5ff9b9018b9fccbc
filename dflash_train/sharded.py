"""The drafter's job on a target that no rank holds whole, and a drafter divided among the ranks.

    target     shards in `model.dtype`, frozen (`training.sharding.trees`; experts also by expert parallelism); embedding and
               head, which the drafter uses at every step, whole on every rank
    passes     ranks answer, measure and train on texts of their own, so they need different numbers of passes: `Lockstep`
    anchors    each rank's own rows, as without sharding; nothing of a row crosses ranks
    drafter    the same on every rank; or (`dflash.shard_drafter`) FSDP2 over all ranks, in float32, a unit for each layer
    Muon       of divided matrices, on whole ones (`training.sharding.whole_matrices`)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dflash_train.optimizer import make_optimizer
from dflash_train.target import Target
from dflash_train.trainer import Trainer
from modeling.fused_experts import fused_experts
from modeling.modeling_mimo_v2 import CACHE_NAME
from qat.losses import HiddenCapture
from qat.meta_model import model_at
from recipes.schema import Recipe
from storage.terminal import counted
from training.sharding import checkpoint as sharded_checkpoint
from training.sharding.layout import layout_of, require_divisible
from training.sharding.lockstep import Lockstep
from training.sharding.shards import copies, local_shards, settle, total_norm
from training.sharding.trees import load_shards, whole_copy


def load_divided(recipe: Recipe, folder: Path, ranks: int) -> nn.Module:
    """The target's model in shards. Raises ValueError: a launch or experts that the recipe's layout does not divide."""
    if recipe.cluster.sharding != "fsdp2":
        raise ValueError(f"cluster.sharding: {recipe.cluster.sharding}: not for a drafter's target; expected fsdp2 or ddp")
    layout = layout_of(recipe.cluster, ranks)
    with torch.device("meta"):
        model = model_at(str(folder), recipe.model.trust_remote_code)
    require_divisible(layout, {name: weight.shape[0] for name, weight, _ in fused_experts(model)})
    return load_shards(folder, layout, dtype=getattr(torch, recipe.model.dtype),
                       trust_remote_code=recipe.model.trust_remote_code)


class ShardedTarget(Target):
    """A target in shards; see `Lockstep` for what `run` and `rest` mean to the other ranks."""

    def __init__(self, model: nn.Module, tokenizer, target_layers: list[int], path: Path):
        super().__init__(model, tokenizer, target_layers, path)
        self.embed_tokens, self.head = whole_copy(self.embed_tokens), whole_copy(self.head)
        self.norm = self.norm and whole_copy(self.norm)
        nothing = torch.tensor([[self.end_ids[0]]], device=self.device)
        self.lockstep = Lockstep(lambda: self._pass(nothing), self.device)

    @torch.no_grad()
    def run(self, ids_BT: torch.Tensor, *, cache=None, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        self.lockstep.begin()
        return self._pass(ids_BT, cache=cache, **kwargs)

    @torch.no_grad()
    def rest(self) -> None:
        self.lockstep.rest()

    def _pass(self, ids_BT: torch.Tensor, *, cache=None, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Target.run`; the model is called as a whole, which is what FSDP knows."""
        self._caught.clear()
        with HiddenCapture(self.model) as seen:
            self.model(input_ids=ids_BT, use_cache=cache is not None, logits_to_keep=1, **{CACHE_NAME: cache}, **kwargs)
        return torch.cat([self._caught[layer] for layer in self.target_layers], dim=-1), seen.last


class ShardedDraftTrainer(Trainer):
    """A run whose drafter is divided among the ranks, too."""

    def prepare(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        for layer in self.drafter.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.drafter, mesh=mesh)
        settle(self.drafter)
        self.shards = local_shards(list(self.drafter.named_parameters()))
        self.model = self.drafter
        self.optimizer = self.accelerator.prepare(make_optimizer(self.drafter, self.settings.optimizer, shards=self.shards))

    def take_gradients(self) -> tuple[list[tuple[str, nn.Parameter]], torch.Tensor]:
        for shard in self.shards:
            shard.pull_gradient()
        norm = total_norm([(s.local.grad, copies(s.parameter)) for s in self.shards], self.accelerator.device)
        return [(s.name, s.local) for s in self.shards], norm

    def whole_drafter(self) -> nn.Module:
        whole = {shard.name: shard.parameter.full_tensor() for shard in self.shards}
        with torch.device("meta"):
            drafter = type(self.drafter).__mro__[2](self.drafter.config)  # FSDP made a class of its own of it
        drafter.load_state_dict(whole, assign=True)
        return drafter

    def state_writer(self, *, copied: bool):
        moments, numbers = sharded_checkpoint.optimizer_tensors(self.optimizer.optimizer, self.shards)
        tensors = {"master": {s.name: s.local.detach() for s in self.shards}} | moments
        own = {"step": self.state.step, "ranks": self.accelerator.num_processes, "optimizer": numbers,
               "rates": [g["lr"] for g in self.optimizer.param_groups], "schedule": self.schedule.state_dict()}
        return sharded_checkpoint.state_writer(self.accelerator, tensors, self.shards, own, copied=copied)

    def read_state(self, path: Path) -> None:
        saved, tensors = sharded_checkpoint.read_state(path, self.shards)
        sharded_checkpoint.restore_optimizer(self.optimizer.optimizer, self.shards, tensors, saved["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, saved["rates"], strict=True):
            group["lr"] = rate
        self.schedule.load_state_dict(saved["schedule"])
        self.state.step = saved["step"]
        if saved["ranks"] == self.accelerator.num_processes:
            sharded_checkpoint.restore_generators(self.accelerator, path)
        else:
            self.say(f"--resume: written by {counted(saved['ranks'], 'rank')}, now {self.accelerator.num_processes}: goes on "
                     "from the same weights and moments, not bit for bit")
