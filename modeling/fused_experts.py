"""Which parameters are the fused weights of routed experts, and along which dimension their blocks run.

Told by structure: a 3-D parameter [experts, ., .] owned by a module that transformers marks as a fused-experts module
(attribute `is_transposed`), or by one of the few classes listed here.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# Fused-experts classes without transformers' `is_transposed` mark -> axis of the reduction (input) dimension.
_UNMARKED_CLASSES = {"Llama4TextExperts": 1}


def block_axis(module: nn.Module) -> int | None:
    """The reduction (input) dimension of a module's expert weights: -1, or 1 for transposed layouts; None: no experts."""
    name = type(module).__name__.removeprefix("FSDP")  # fully_shard renames the class
    if name in _UNMARKED_CLASSES:
        return _UNMARKED_CLASSES[name]
    transposed = getattr(module, "is_transposed", None)
    return None if transposed is None else (1 if transposed else -1)


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """(name, parameter, axis of the blocks) of every fused expert weight."""
    for module_name, module in model.named_modules():
        axis = block_axis(module)
        for own, parameter in module.named_parameters(recurse=False) if axis is not None else ():
            if parameter.ndim == 3 and parameter.is_floating_point():
                yield f"{module_name}.{own}", parameter, axis
