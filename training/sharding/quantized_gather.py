"""The all-gather of expert weights in MXFP4: what travels is what the forward pass computes with, 4.25 bits a weight.

The sharded parameter of an experts module is its float32 master. Before a layer runs, FSDP2 gathers the module's parameters;
two hooks that torch looks up on a parameter's local tensor change what it sends:

    fsdp_pre_all_gather     this rank's codes and scales, one uint8 tensor (17 bytes per 32 weights), made once per step
    fsdp_post_all_gather    decodes the gathered bytes into the unsharded parameter, in the compute dtype

so the module computes with fake_quantize(master), bit for bit, and its gradient is reduced in float32 onto the master's shard
(straight-through). A bfloat16 gather of the same weights sends 64 bytes per 32 weights.

One tensor and not codes and scales apart: where the group that shares an expert has one rank, torch passes on the first
input alone. Shards of different sizes (experts that the ranks do not divide) must be sent in the parameter's own padded shape,
so there the rounded values travel in the compute dtype.

torch.distributed.fsdp, `_fsdp_param.py` (2.13): hooks as attributes of the local tensor, read when the first forward pass
initialises the units. torchao's float8 all-gather uses the same two hooks on a tensor subclass.
"""

from __future__ import annotations

import functools

import torch

from mxfp4 import BLOCK_SIZE, quantize
from mxfp4.codec import block_scales, scale_values
from mxfp4.fake_quant import fake_quantize_
from mxfp4.format import E2M1_VALUES

PACKED_BYTES = BLOCK_SIZE // 2 + 1  # codes and scale of one block


class QuantizedGather:
    """The codes of one local master, and the hooks that send them.

    Attributes:
        packed: uint8 [rows, ., .], 17 bytes per block along `axis`: the codes, then the scales. None for uneven shards.
        sent: bytes handed to the collective so far, and `gathers` how often.
    """

    def __init__(self, master: torch.Tensor, *, axis: int, scale_rule: str, even: bool, compute_dtype: torch.dtype,
                 padded_rows: int):
        """Args:
            master: the local tensor of the FSDP parameter, float32 [rows, ., .]; the hooks are attached to it.
            axis: the reduction dimension.
            even: all ranks hold equally many rows.
            padded_rows: rows of the largest shard.
        """
        self.axis, self.scale_rule, self.compute_dtype = axis % 3, scale_rule, compute_dtype
        self.sent = self.gathers = 0
        self.packed: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.rows = master.shape[0]
        if even:
            shape = list(master.shape)
            shape[self.axis] = shape[self.axis] // BLOCK_SIZE * PACKED_BYTES
            self.packed = torch.empty(shape, dtype=torch.uint8, device=master.device)
        else:
            self.values = torch.zeros((padded_rows, *master.shape[1:]), dtype=compute_dtype, device=master.device)
        master.fsdp_pre_all_gather = self._before
        master.fsdp_post_all_gather = self._after

    @torch.no_grad()
    def encode(self, source: torch.Tensor) -> None:
        """Makes the codes of `source` (float32, of the master's shape) what the next gathers send.

        Raises:
            ValueError: a non-finite value.
        """
        if self.packed is None:
            fake_quantize_(self.values[:self.rows], source, scale_rule=self.scale_rule, axis=self.axis)
            return
        for row in range(self.rows):
            w = source[row].movedim(self.axis - 1, -1)
            rounded = fake_quantize_(torch.empty_like(w, memory_format=torch.contiguous_format), w, scale_rule=self.scale_rule)
            self._pack(row, rounded, block_scales(w, scale_rule=self.scale_rule))

    @torch.no_grad()
    def put(self, values: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Makes rounded values what the next gathers send.

        Args:
            values: float32, of the master's shape. scales: E8M0 bytes of the blocks that they are exact on; None: of no grid,
                which only a gather that is not `even` can send.
        """
        if self.packed is None:
            self.values[:self.rows].copy_(values)
            return
        for row in range(self.rows):
            self._pack(row, *(part[row].movedim(self.axis - 1, -1) for part in (values, scales)))

    def _pack(self, row: int, rounded: torch.Tensor, scales: torch.Tensor) -> None:
        for part, made in zip(self._split(self.packed), (codes_at_scales(rounded, scales), scales), strict=True):
            part[row].movedim(self.axis - 1, -1).copy_(made)

    def rounded(self, dtype: torch.dtype) -> torch.Tensor:
        """What this rank sends, decoded: [rows, ., .]."""
        if self.packed is None:
            return self.values[:self.rows].to(dtype)
        shape = list(self.packed.shape)
        shape[self.axis] = shape[self.axis] // PACKED_BYTES * BLOCK_SIZE
        return decode(self.packed, self.axis, torch.empty(shape, dtype=dtype, device=self.packed.device))

    def codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales that are sent, as `mxfp4.quantize` gives them (copies)."""
        if self.packed is None:
            return quantize(self.values[:self.rows], scale_rule=self.scale_rule, axis=self.axis)
        return tuple(part.clone() for part in self._split(self.packed))

    def _split(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = packed.shape[self.axis] // PACKED_BYTES
        return packed.split((blocks * (PACKED_BYTES - 1), blocks), dim=self.axis)

    def _before(self, mesh, outer_size, outer_stride, module, mp_policy):
        sent = self.values if self.packed is None else self.packed
        self.sent += sent.nbytes
        self.gathers += 1
        return (sent,), None

    def _after(self, outputs, metadata, param_dtype, *, out=None):
        (gathered,) = outputs
        if self.packed is None:  # the gathered tensor's storage is the parameter's
            return None if out is not None else (gathered, ())
        if out is None:
            shape = list(gathered.shape)
            shape[self.axis] = shape[self.axis] // PACKED_BYTES * BLOCK_SIZE
            made = decode(gathered, self.axis, torch.empty(shape, dtype=param_dtype, device=gathered.device))
            return made, (made,)
        # .data: the same memory without the version count that tells autograd of writes; FSDP refills what it has let go.
        decode(gathered, self.axis, (out._local_tensor if hasattr(out, "_local_tensor") else out).data)
        return None


def codes_at_scales(rounded: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes [., n / 2] of float32 values [., n] that lie on the grid of their blocks' scales [., n / 32].

    With values rounded by `mxfp4.fake_quant` that is `mxfp4.quantize`, bit for bit, in half its time: a division by the scale,
    which is exact, instead of comparisons with midpoints.
    """
    units = (rounded.unflatten(-1, (-1, BLOCK_SIZE)) / scale_values(scales)[..., None]).flatten(-2)
    halves = units.abs().mul_(2).to(torch.int32)
    codes = _codes_of_halves(rounded.device)[halves] | units.signbit().to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


@functools.cache
def _codes_of_halves(device: torch.device) -> torch.Tensor:
    """[13]: the code of every magnitude, by its number of halves (0, 0.5, … 6)."""
    table = torch.zeros(13, dtype=torch.uint8)
    for code, value in enumerate(E2M1_VALUES[:8]):
        table[int(2 * value)] = code
    return table.to(device)


def decode(packed: torch.Tensor, axis: int, out: torch.Tensor) -> torch.Tensor:
    """Writes the weights of `packed` (see `QuantizedGather.packed`) into `out` and returns it; row by row.

    Equal to `mxfp4.dequantize` bit for bit, by one table look-up per byte: both of a byte's values come as one word.
    """
    pairs = _pairs(out.dtype, packed.device)
    blocks = packed.shape[axis] // PACKED_BYTES
    codes, scales = packed.split((blocks * (PACKED_BYTES - 1), blocks), dim=axis)
    for row in range(packed.shape[0]):
        c, s = (part[row].movedim(axis - 1, -1) for part in (codes, scales))
        values = pairs[c.contiguous().int()].view(out.dtype).unflatten(-1, (blocks, BLOCK_SIZE))
        values.mul_(scale_values(s).to(out.dtype)[..., None])
        out[row].movedim(axis - 1, -1).copy_(values.flatten(-2))
    return out


@functools.cache
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256]: for every byte its two values (low nibble first), side by side in one integer."""
    values = torch.tensor(E2M1_VALUES, dtype=dtype)
    byte = torch.arange(256)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=-1)
    return pairs.view(torch.int64 if dtype is torch.float32 else torch.int32).squeeze(-1).to(device)
