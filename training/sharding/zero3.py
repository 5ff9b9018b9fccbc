"""Models under DeepSpeed's ZeRO-3: what of it is used, and what of its private parts is touched, kept to this module.

ZeRO-3 flattens every parameter and cuts it into one run of S = ceil(elements / ranks) elements for each rank. A rank keeps its
run in the model's dtype (`ds_tensor`, which gathers send) and, of what is trained, in float32 inside the optimizer. A run holds
whole blocks of 32 weights if 32 divides S and blocks lie along the last dimension; then each rank can round its own runs
between two steps, and every gather gives rounded weights.

Rejected: the plugin of Accelerate (it steps inside `backward`, before gradients could be looked at, and reads the model on one
rank); the whole causal model as the engine's module (the loss calls the output head by itself, chunk by chunk: it stays whole
on every rank, outside of the engine).
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import nn

from mxfp4 import BLOCK_SIZE
from recipes.schema import Recipe


def require_whole_blocks(name: str, shape: tuple[int, ...], axis: int, ranks: int) -> None:
    """Raises ValueError for an expert tensor whose blocks are cut by flat runs; the line has the numbers.

    Args:
        axis: the dimension that blocks run along.
    """
    if axis % len(shape) != len(shape) - 1:
        raise ValueError(f"cluster.sharding: zero3: {name}, shape {list(shape)}: blocks of {BLOCK_SIZE} run along dimension "
                         f"{axis % len(shape)}, across the flat ranges that ZeRO-3 cuts; expected fsdp2")
    elements = torch.Size(shape).numel()
    run = -(-elements // ranks)
    if run % BLOCK_SIZE:
        fits = [n for n in range(1, ranks) if -(-elements // n) % BLOCK_SIZE == 0]
        raise ValueError(f"cluster.sharding: zero3: {name}: {elements:,} weights on {ranks} ranks are runs of {run:,}, and "
                         f"{run:,} = {run // BLOCK_SIZE:,} x {BLOCK_SIZE} + {run % BLOCK_SIZE}: a block of {BLOCK_SIZE} would "
                         f"be cut; expected fsdp2, or {fits[-1]} ranks")


def require_deepspeed() -> None:
    """Raises ValueError where the package is missing."""
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ValueError(f"cluster.sharding: zero3 needs the package deepspeed ({error}): pip install 'fp4-dflash[deepspeed]', "
                         "or expected fsdp2") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def configuration(recipe: Recipe) -> dict:
    """DeepSpeed's own configuration of a recipe: everything that is not here is its default, or off."""
    settings, cluster = recipe.qat, recipe.cluster
    zero = {"stage": 3, "overlap_comm": False, "reduce_scatter": True,
            # Every weight is let go after use, so that what is gathered next is what was rounded last.
            "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
            # Mixture-of-experts blocks are leaves by default, whose gradients are taken to be there when their output's is: of
            # the first layer, whose input needs none, that is before they are computed. Fused experts need no leaves.
            "leaf_module": {"classes": []}}
    if cluster.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.accelerator.is_available()}
    if cluster.offload_weights:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.accelerator.is_available()}
    return {"train_micro_batch_size_per_gpu": settings.batch_size, "zero_optimization": zero,
            "gradient_accumulation_steps": settings.gradient_accumulation,
            "gradient_clipping": settings.optimizer.max_grad_norm,
            "bf16": {"enabled": recipe.model.dtype == "bfloat16"}, "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"}, "steps_per_print": 10**9,
            # torch's AdamW also on the host: the same numbers, and nothing to compile.
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


class _Decoder(nn.Module):
    """All of a causal language model but its head: the engine's module."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.decoder = model.base_model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state


def divide(model: nn.Module, settings: dict, optimizer: torch.optim.Optimizer | None = None):
    """Cuts the model's decoder into runs, in place, and returns the engine that runs it; all ranks hold the same model before.

    The model's own forward pass is the engine's from then on (`qat.losses.run_hidden` finds it as `decoder_pass`).

    Args:
        optimizer: over the parameters that are trained. None: a frozen model.
    """
    import deepspeed

    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:  # the embedding is cut into runs, the head is not
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    decoder = _Decoder(model)
    engine, *_ = deepspeed.initialize(model=decoder, optimizer=optimizer, config=settings)
    head.to(engine.device)
    model.__dict__["decoder_pass"] = engine
    return engine


class Runs:
    """This rank's run of a trained parameter, after `divide`."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter
        self.shape = torch.Size(parameter.ds_shape)
        size, elements = parameter.ds_tensor.numel(), self.shape.numel()
        self.filled = min(max(elements - dist.get_rank() * size, 0), size)  # what comes after is padding

    def blocks(self, run: torch.Tensor) -> torch.Tensor:
        """A run as [1, blocks, 32], without its padding; a view."""
        return run.detach().view(-1)[:self.filled].view(1, -1, BLOCK_SIZE)

    def rounded(self) -> torch.Tensor:
        """What gathers send, [1, blocks, 32], to be written to."""
        return self.blocks(self.parameter.ds_tensor)

    def let_go(self) -> None:
        """Drops a whole copy that a pass without gradients has left behind: it would hide what is written to the run."""
        if self.parameter.ds_status.name == "AVAILABLE":
            self.parameter.ds_active_sub_modules.clear()
            self.parameter.partition()

    def master(self) -> torch.Tensor:
        from deepspeed.utils import safe_get_local_fp32_param

        return self.blocks(safe_get_local_fp32_param(self.parameter))

    def gradient(self) -> torch.Tensor:
        """Mean over ranks and micro-steps, float32; between the last backward pass of an update and its step."""
        from deepspeed.utils import safe_get_local_grad

        return self.blocks(safe_get_local_grad(self.parameter))


def optimizer_runs(engine) -> list[tuple[torch.Tensor, dict]]:
    """(float32 weights, optimizer's state) of this rank, by the engine's groups of parameters."""
    optimizer = engine.optimizer
    return [(flat.detach(), optimizer.optimizer.state[flat]) for flat in optimizer.fp32_partitioned_groups_flat]


def whole(parameter: torch.Tensor):
    """Context manager: the parameter put together on every rank; all ranks enter it."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else [])
