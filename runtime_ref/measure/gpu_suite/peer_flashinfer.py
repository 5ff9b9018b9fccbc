"""FlashInfer's CUTLASS MXFP4 experts for Hopper as a peer (`peers`): the automatic choice of engines there since 0.6.18.

How it is called follows what engines do (sglang's method for CUTLASS MXFP4 experts, and flashinfer's own test of the mixed
product): fused rows are up first, then gate; weights and scales are interleaved once for the SM90 product. Never run by this
project, and not a line of it can be compiled without its package: `peers` compares every number of tokens with float32 before
it times one, so a call that is wrong has no speed.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from mxfp4.format import BLOCK_SIZE
from runtime_ref.measure.gpu_suite.peers import Peer


def import_flashinfer() -> SimpleNamespace:
    """The names that the adapter calls.

    Raises:
        ImportError: the package is not installed, or lacks the helpers of SM90's mixed product.
    """
    from flashinfer.fused_moe import (
        cutlass_fused_moe,
        interleave_moe_scales_for_sm90_mixed_gemm,
        interleave_moe_weights_for_sm90_mixed_gemm,
    )

    return SimpleNamespace(experts=cutlass_fused_moe, weights=interleave_moe_weights_for_sm90_mixed_gemm,
                           scales=interleave_moe_scales_for_sm90_mixed_gemm)


class FlashInfer(Peer):
    """One call: its own routing from the choices, both products, SwiGLU, the weighted sum."""

    name, package, routed = "flashinfer, SM90 CUTLASS", "flashinfer", ""
    timed = "everything, its own routing included"

    def __init__(self, names: SimpleNamespace | None = None):
        self.names = names or import_flashinfer()

    @classmethod
    def variants(cls) -> list[Peer]:
        return [cls()]

    def prepare(self, gate_up, down, device) -> None:
        swapped = [torch.cat(t.to(device).chunk(2, 1)[::-1], 1) for t in gate_up]
        codes, scales = zip(swapped, [t.to(device) for t in down], strict=True)
        self.layer = SimpleNamespace(
            weights=[self.names.weights(t.contiguous(), "fp4") for t in codes],
            scales=[self.names.scales(t.contiguous(), group_size=BLOCK_SIZE).view(torch.int32) for t in scales])

    def route(self, index: torch.Tensor) -> torch.Tensor:
        return index

    def compute(self, x: torch.Tensor, weight: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        self.names.experts(input=x, token_selected_experts=routes, token_final_scales=weight,
                           fc1_expert_weights=self.layer.weights[0], fc2_expert_weights=self.layer.weights[1],
                           output_dtype=torch.bfloat16, quant_scales=self.layer.scales, use_w4_group_scaling=True, output=out)
        return out
