"""What expert-only QAT costs a training step: with it, without it, and with torchao's fake quantization of the same weights.

    python benchmarks/qat_step.py [--device cuda] [--json docs/results/qat-step.json]

One MoE layer of 64 experts (hidden 512, intermediate 256, top-4: 25.2 M expert parameters; on a GPU hidden 2048, intermediate
768, 302 M), 1,024 tokens (8,192), bf16, grouped matrix products; a step is forward, backward, and AdamW on float32 masters. The
three variants alternate in one process (so that a noisy machine disturbs all alike) and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from modeling.cpu_products import speed_up_bf16_products

# hidden, intermediate, tokens
SIZES = {"cpu": (512, 256, 1024), "cuda": (2048, 768, 8192)}


def make_layer(device: str):
    """A transformers Qwen3-MoE sparse block inside a module, bf16, on the grouped-matmul path."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    hidden, inner, _ = SIZES[device]
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=64, num_experts_per_tok=4)
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    layer = nn.ModuleDict({"mlp": Qwen3MoeSparseMoeBlock(config)}).to(device, torch.bfloat16)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def torchao_fake_quantize(weight: torch.Tensor) -> torch.Tensor:
    """torchao's MXFP4 (RCEIL) quantize and dequantize with a straight-through gradient."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    with torch.no_grad():
        rounded = MXTensor.to_mx(weight.detach(), torch.float4_e2m1fn_x2, block_size=32,
                                 scaling_mode=ScaleCalculationMode.RCEIL).dequantize(weight.dtype)
    return weight + (rounded - weight).detach()


class Variant:
    """A layer, its masters and optimizer, and how its experts are rounded ("none", "ours", "torchao")."""

    def __init__(self, kind: str, device: str):
        from qat.expert_quantizer import ExpertQuantizer, find_expert_tensors

        self.kind, self.layer, self.device = kind, make_layer(device), device
        self.layer.mlp.gate.requires_grad_(False)
        self.tensors = find_expert_tensors(self.layer)
        if kind == "ours":
            self.quantizer = ExpertQuantizer(self.layer)
            self.masters = self.quantizer.masters
        else:
            for t in self.tensors:
                t.parameter.grad_dtype = torch.float32
            self.masters = [nn.Parameter(t.parameter.detach().float()) for t in self.tensors]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4)
        hidden, _, tokens = SIZES[device]
        self.x = torch.randn(1, tokens, hidden, dtype=torch.bfloat16).to(device)

    def step(self) -> float:
        began = self._now()
        if self.kind == "torchao":
            with torch.no_grad():
                for tensor, master in zip(self.tensors, self.masters, strict=True):
                    tensor.parameter.copy_(torchao_fake_quantize(master.to(torch.bfloat16)))
        out = self.layer.mlp(self.x)
        out = out[0] if isinstance(out, tuple) else out
        out.float().square().mean().backward()
        if self.kind == "ours":
            self.quantizer.pull_gradients()
        else:
            for tensor, master in zip(self.tensors, self.masters, strict=True):
                master.grad, tensor.parameter.grad = tensor.parameter.grad, None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.kind == "ours":
            self.quantizer.requantize()
        elif self.kind == "none":
            with torch.no_grad():
                for tensor, master in zip(self.tensors, self.masters, strict=True):
                    tensor.parameter.copy_(master)
        return self._now() - began

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    speed_up_bf16_products()  # as a run's model has them
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no GPU on this machine", file=sys.stderr)
        return 2
    kinds = ["none", "ours"]
    try:
        import torchao  # noqa: F401

        kinds.append("torchao")
    except ImportError:
        print("torchao is not installed: its row is left out", file=sys.stderr)
    variants = [Variant(kind, args.device) for kind in kinds]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(args.repeats + 1):
        for variant in variants:
            seconds = variant.step()
            if repeat:  # the first is warm-up
                times[variant.kind].append(seconds)
    median = {kind: statistics.median(values) for kind, values in times.items()}
    print(f"{'step':24} {'ms':>10} {'ratio':>8}")
    for kind, seconds in median.items():
        label = {"none": "bf16, no quantization", "ours": "expert QAT (ours)", "torchao": "torchao fake-quant"}[kind]
        print(f"{label:24} {1e3 * seconds:10.1f} {seconds / median['none']:8.2f}")
    if args.json:
        from training.report import environment

        record = {"environment": environment(), "seconds": median, "all_seconds": times,
                  "ratio": {kind: seconds / median["none"] for kind, seconds in median.items()}}
        args.json.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
