"""A frozen model's experts in the FP8 codes that they were released in, decoded when a layer runs.

The base of DeepSeek-V3 or MiMo-V2 is FP8 with a float32 scale per 128 x 128 weights; a teacher made of it in bf16 holds and
sends 2 bytes a weight for what is known to 1.03. Here a rank keeps

    packed    uint8 [rows, out, in + 4 ceil(in / 128)]    codes of a row, then its scales

which the gathers send as they are (the two hooks of `training.sharding.quantized_gather`), and every rank decodes into the
weights that reading the base in the compute dtype gives, bit for bit.

Weights are read decoded, as always, and encoded again: a weight divided by its scale lies within 2^-8 of its code, whose
neighbours are at least 2^-4 away. That this gives back every weight is compared before the decoded shard goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from checkpoint.containers import container
from checkpoint.detect_format import local_folder, open_source
from checkpoint.families.registry import family_of
from checkpoint.fp8 import spread_rows
from checkpoint.load import owned_rows
from modeling.names import FP8_BLOCK
from training.sharding.shards import copies

_SCALE_BYTES = 4


class PackedShard:
    """One expert tensor of this rank in FP8; the parameter's own memory is let go.

    Attributes:
        packed: see the module's text.
    """

    def __init__(self, local: torch.Tensor, scales: Iterator[torch.Tensor], name: str):
        """Args:
            local: the local tensor of the FSDP parameter, [rows, out, in], decoded; the hooks are attached to it.
            scales: float32 [out, ceil(in / 128)] of each row.

        Raises:
            ValueError: weights that are no FP8 codes times these scales.
        """
        self.dtype, self.columns = local.dtype, local.shape[2]
        blocks = -(-self.columns // FP8_BLOCK)
        self.packed = torch.empty((*local.shape[:2], self.columns + _SCALE_BYTES * blocks), dtype=torch.uint8,
                                  device=local.device)
        for row, (weights, of_row) in enumerate(zip(local, scales, strict=True)):
            of_row = of_row.to(local.device)
            codes = (weights.float() / self._spread(of_row)).nan_to_num_(0.0).to(torch.float8_e4m3fn)
            self.packed[row, :, :self.columns] = codes.view(torch.uint8)
            self.packed[row, :, self.columns:] = of_row.contiguous().view(torch.uint8)
            if not torch.equal(self._decoded(self.packed[row], local.dtype), weights):
                raise ValueError(f"{name}: expert {row} of this rank is not FP8 codes times the scales of the base")
        local.untyped_storage().resize_(0)
        local.fsdp_pre_all_gather, local.fsdp_post_all_gather = self._before, self._after

    def _spread(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.repeat_interleave(FP8_BLOCK, dim=1)[:, :self.columns]

    def _decoded(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[out, in] of one row."""
        codes = packed[:, :self.columns].contiguous().view(torch.float8_e4m3fn).float()
        scales = packed[:, self.columns:].contiguous().view(torch.float32)
        return (codes * self._spread(scales)).to(dtype)

    def decoded(self, packed: torch.Tensor | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Weights [rows, out, in] of this rank's codes, or of gathered ones, into `out` if there is one."""
        packed = self.packed if packed is None else packed
        if out is None:
            out = torch.empty((*packed.shape[:2], self.columns), dtype=self.dtype, device=packed.device)
        for row, weights in enumerate(out):
            weights.copy_(self._decoded(packed[row], out.dtype))
        return out

    def _before(self, mesh, outer_size, outer_stride, module, mp_policy):
        return (self.packed,), None

    def _after(self, outputs, metadata, param_dtype, *, out=None):
        if out is None:
            made = self.decoded(outputs[0])
            return made, (made,)
        self.decoded(outputs[0], (out._local_tensor if hasattr(out, "_local_tensor") else out).data)
        return None


def pack_experts(model: nn.Module, path: str | Path, names: list[str]) -> dict[str, PackedShard] | str:
    """Packs the expert parameters `names` of a frozen model in shards; or says why not, in which case nothing has changed.

    Args:
        path: the folder that the model was read from.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    uneven = next((n for n, p in parameters.items() if p.shape[0] % (p.device_mesh.size() // copies(p))), None)
    if uneven:
        return f"the ranks do not hold equally many experts of {uneven}"
    source, parts = open_source(local_folder(str(path))), {}
    for published, place in family_of(model.config).published(model.config).experts.items():
        if place.fused in parameters:
            parts.setdefault(place.fused, {}).setdefault(place.expert, []).append((published, place.rows))
            if container(source, published) != "fp8":
                return f"{published} of the base is not FP8 with scales"
    missing = next((name for name in names if name not in parts), None)
    if missing:
        return f"{missing} is published fused"

    def scales_of(fused: str) -> Iterator[torch.Tensor]:
        for expert in owned_rows(parameters[fused]):
            yield torch.cat([spread_rows(source.read(name + "_scale_inv"), [rows.stop - rows.start])
                             for name, rows in sorted(parts[fused][expert], key=lambda part: part[1].start)])

    return {name: PackedShard(parameter._local_tensor, scales_of(name), name) for name, parameter in parameters.items()}
