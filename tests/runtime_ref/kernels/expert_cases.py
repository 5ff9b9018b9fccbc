"""Random experts, their pages and their oracle, for the kernel's tests."""

import torch

from modeling.configuration_mimo_v2 import MiMoV2Config
from modeling.modeling_mimo_v2 import Experts
from mxfp4 import dequantize, quantize
from mxfp4.mxfp8 import dequantize_mxfp8, quantize_mxfp8
from runtime_ref.kernels.experts import Launch, Workspace
from runtime_ref.kernels.repack import Tile, repack_experts
from tests.runtime_ref.kernels.at_once import INTERPRETED

E, H, I, A = 4, 160, 96, 2  # no multiples of the tile: 1.25 pages of hidden, 0.75 of inner, 5 tiles of 32 rows
SMALL, HW_FP4 = Tile(32, 128), Tile(64, 128, hw_fp4=True)


def make_weights(seed=0, experts=E, hidden=H, inner=I):
    generator = torch.Generator().manual_seed(seed)
    return (quantize(torch.randn(experts, 2 * inner, hidden, generator=generator) * 0.1),
            quantize(torch.randn(experts, hidden, inner, generator=generator) * 0.1))


def make_pages(weights, rank=0, ranks=1, tile=SMALL):
    return repack_experts(*weights, rank=rank, ranks=ranks, up_tile=tile, down_tile=tile)


def oracle(weights, hw_fp4: bool = False):
    """The model's experts on the decoded weights, in float32; hw_fp4: between activations rounded to MXFP8."""
    gate_up, down = (dequantize(*w, dtype=torch.float32) for w in weights)
    config = MiMoV2Config(n_routed_experts=down.shape[0], num_experts_per_tok=1, hidden_size=down.shape[1],
                          moe_intermediate_size=down.shape[2], num_hidden_layers=1,
                          hybrid_layer_pattern=[0], moe_layer_freq=[1])
    experts = Experts(config)
    experts.gate_up_proj.data, experts.down_proj.data = gate_up, down
    experts.requires_grad_(False)
    if not hw_fp4:
        return experts

    def rounded(x):
        return dequantize_mxfp8(*quantize_mxfp8(x))

    gate = experts._apply_gate
    experts._apply_gate = lambda gate_up: rounded(gate(gate_up))
    return lambda x, index, weight: experts(rounded(x), index, weight)


def make_tokens(count, seed=0, experts=E, hidden=H, choices=A):
    """x bf16, index int32 (distinct per token; the last expert is never chosen), weight float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, hidden, generator=generator).to(torch.bfloat16)
    index = torch.stack([torch.randperm(experts - 1, generator=generator)[:choices] for _ in range(count)]).to(torch.int32)
    return x, index, torch.rand(count, choices, generator=generator)


def launched(**options) -> Launch:
    """One program; as a GPU is given it where nothing is interpreted."""
    here = {"ptx": False, "float_dot": True, "prefetch": 0} if INTERPRETED else {"prefetch": 128}
    return Launch(**({"programs": 1} | here | options))


def poisoned(pages, tokens, choices=A, **options) -> Workspace:
    """Scratch full of NaN: whatever is read without having been written shows in the result."""
    space = Workspace(pages, tokens, choices, launched(**options))
    space.inner.fill_(0x7F if pages.hw_fp4 else float("nan"))
    if pages.hw_fp4:
        space.rounded.fill_(0x7F)
    space.partial.fill_(float("nan"))
    space.plan.fill_(2**30)
    return space
