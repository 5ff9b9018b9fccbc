"""Pretrain the embedded seed: one process, one command, a wall-clock budget.

    python tools/seed/corpus.py   --work DIR --code-root SITE_PACKAGES … --prose-root DOCS …
    python tools/seed/pretrain.py --work DIR --out DIR --minutes 75

A plain loop through the product's own model class, so that the seed is by construction what the later jobs load.

- **Budget in minutes, not steps.** The learning rate is a function of the share of `--minutes` that has been spent:
  short warm-up, constant, then linear decay to zero over the last `DECAY_SHARE`. On a machine that others use, a
  schedule in steps either ends early or never reaches its decay; this one always ends fully decayed.
- **bf16 weights and activations, float32 masters.** bf16 products are 2.2 times as fast as float32 on AVX512-BF16.
- **Muon** (orthogonalised momentum) for every matrix inside the layers, expert stacks in one batch, and AdamW for
  embeddings, head, norms, sinks and routers.
- **Router balance without an auxiliary loss**: after each step the correction bias of an expert moves by a constant
  towards the mean load (DeepSeek-V3's rule), in steps that shrink with the learning rate.
- Every parameter must receive a gradient on the first step, each expert included; otherwise the run refuses to go on.

`--out` holds `log.jsonl`, `checkpoint.pt` (written every few minutes under a temporary name, then renamed; `--resume`
continues from it, clock included) and at the end `model/`, a Hugging Face folder, and `loss.png`.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TextIO

if __name__ == "__main__":  # launched by path: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from modeling.configuration_mimo_v2 import MiMoV2Config
from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM
from tools.seed import build_tokenizer
from tools.seed.packing import RowLoader, build_streams, load_documents

WARMUP_SHARE, DECAY_SHARE = 0.01, 0.7
BALANCE_RATE = 0.01
MOMENTUM = 0.95
# Quintic iterations of the Polar Express (Amsel et al., arXiv 2505.16932): each set of coefficients is the best one for
# the range of singular values that its predecessor leaves. Four of them orthogonalise as well as five equal ones.
POLAR_EXPRESS = ((8.28721201814563, -23.595886519098837, 17.300387312530933),
                 (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                 (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                 (3.3184196573706015, -2.488488024314874, 0.51004894012372))
POLAR_SAFETY = 1.01
ADAM_BETAS, ADAM_EPS = (0.8, 0.95), 1e-10
SMALL_PARAMETER_RATE = 0.4  # norms, sinks and routers, relative to embedding and head
MAX_GRAD_NORM = 1.0
INSTRUCTION_WEIGHT = 0.1
CHECKPOINT_SECONDS, LOG_STEPS = 300, 10


def seed_config() -> MiMoV2Config:
    """The seed's geometry: every feature of the released models at about 10 million parameters."""
    return MiMoV2Config(
        vocab_size=build_tokenizer.VOCAB_SIZE, hidden_size=256, num_hidden_layers=5, intermediate_size=1024,
        hybrid_layer_pattern=[0, 1, 1, 1, 0], moe_layer_freq=[0, 1, 1, 1, 1], sliding_window=128,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, v_head_dim=64,
        swa_num_attention_heads=8, swa_num_key_value_heads=4, swa_head_dim=64, swa_v_head_dim=64,
        add_swa_attention_sink_bias=True, add_full_attention_sink_bias=False, attention_value_scale=0.707,
        partial_rotary_factor=0.5, rope_theta=1_000_000, swa_rope_theta=10_000, max_position_embeddings=4096,
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=256, scoring_func="sigmoid",
        topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=1.0, n_group=1, topk_group=1,
        attention_projection_layout="fused_qkv", tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=build_tokenizer.SPECIALS.index(build_tokenizer.END),
        pad_token_id=build_tokenizer.SPECIALS.index(build_tokenizer.PAD),
    )


def learning_rate_share(spent: float) -> float:
    """Share of the peak learning rate after `spent` (0…1) of the budget: warm-up, constant, linear decay to zero."""
    return max(0.0, min(1.0, spent / WARMUP_SHARE, (1.0 - spent) / DECAY_SHARE))


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly the closest orthogonal matrix of each of `matrices` [N, rows, columns]; computed and returned in bf16."""
    wide = matrices.size(-2) <= matrices.size(-1)
    x = (matrices if wide else matrices.mT).bfloat16().contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * POLAR_SAFETY + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b / POLAR_SAFETY**3, alpha=c / POLAR_SAFETY**5)
        x = torch.baddbmm(x, poly, x, beta=a / POLAR_SAFETY)
    return x if wide else x.mT


class MasterOptimizer:
    """Muon and AdamW over float32 masters of a bf16 model; peak learning rates per group.

    Matrices of equal shape are orthogonalised in one batched call. `state()` is a dict of tensors.
    """

    def __init__(self, model: torch.nn.Module, muon_lr: float, adam_lr: float):
        self.parameters = dict(model.named_parameters())
        self.master = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        self.first = {n: torch.zeros_like(m) for n, m in self.master.items()}
        self.muon = [n for n in self.master if self._is_hidden_matrix(n)]
        self.adam = [n for n in self.master if n not in set(self.muon)]
        self.second = {n: torch.zeros_like(self.master[n]) for n in self.adam}
        self.muon_lr, self.adam_lr, self.steps = muon_lr, adam_lr, 0

    def _is_hidden_matrix(self, name: str) -> bool:
        return self.master[name].ndim >= 2 and ".layers." in name and not name.endswith("gate.weight")

    @torch.no_grad()
    def step(self, share: float) -> float:
        """One update at `share` of the peak rates; returns the gradient norm before clipping."""
        grads = {n: p.grad.float() for n, p in self.parameters.items()}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        if not torch.isfinite(norm):
            bad = [n for n, g in grads.items() if not torch.isfinite(g).all()]
            raise FloatingPointError(f"step {self.steps}: non-finite gradient in {', '.join(bad)}")
        scale = min(1.0, MAX_GRAD_NORM / (float(norm) + 1e-6))
        self.steps += 1
        by_shape: dict[torch.Size, list[str]] = {}
        for name in self.muon:
            self.first[name].lerp_(grads[name], 1 - MOMENTUM)
            by_shape.setdefault(grads[name].shape[-2:], []).append(name)
        for shape, names in by_shape.items():
            nesterov = [grads[n].lerp(self.first[n], MOMENTUM).reshape(-1, *shape) for n in names]
            update = orthogonalise(torch.cat(nesterov)).float()
            pieces = update.split([len(piece) for piece in nesterov])
            rate = self.muon_lr * share * max(1.0, shape[0] / shape[1]) ** 0.5
            for name, piece in zip(names, pieces, strict=True):
                self.master[name].add_(piece.view_as(self.master[name]), alpha=-rate)
        for name in self.adam:
            grad = grads[name] * scale
            self.first[name].lerp_(grad, 1 - ADAM_BETAS[0])
            self.second[name].lerp_(grad.square(), 1 - ADAM_BETAS[1])
            first = self.first[name] / (1 - ADAM_BETAS[0] ** self.steps)
            second = self.second[name] / (1 - ADAM_BETAS[1] ** self.steps)
            rate = self.adam_lr * share * (1.0 if self.master[name].ndim == 2 and "gate" not in name else SMALL_PARAMETER_RATE)
            self.master[name].sub_(first / (second.sqrt() + ADAM_EPS), alpha=rate)
        for name, parameter in self.parameters.items():
            parameter.copy_(self.master[name])
            parameter.grad = None
        return float(norm)

    def state(self) -> dict:
        return {"master": self.master, "first": self.first, "second": self.second, "steps": self.steps}

    def restore(self, state: dict) -> None:
        self.master, self.first, self.second, self.steps = (state[k] for k in ("master", "first", "second", "steps"))
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.master[name])


class RouterBalance:
    """Counts the tokens of every expert by hooks on the routers and moves their correction bias towards equal load."""

    def __init__(self, model: MiMoV2ForCausalLM):
        self.gates = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
        self.counts: list[torch.Tensor] = [torch.empty(0)] * len(self.gates)
        for index, gate in enumerate(self.gates):
            gate.register_forward_hook(lambda module, _, output, i=index: self._count(i, module, output))

    def _count(self, index: int, gate: torch.nn.Module, output: tuple) -> None:
        chosen = next(t for t in output if torch.is_tensor(t) and not t.is_floating_point())
        self.counts[index] = torch.bincount(chosen.flatten(), minlength=len(gate.e_score_correction_bias)).float()

    @torch.no_grad()
    def step(self, share: float) -> float:
        """Move every bias by `BALANCE_RATE * share` towards balance; returns the largest load of an expert over the mean."""
        for gate, count in zip(self.gates, self.counts, strict=True):
            gate.e_score_correction_bias.add_(torch.sign(count.mean() - count), alpha=BALANCE_RATE * share)
        return max(float(c.max() / c.mean()) for c in self.counts)


def target_weights(tokens: torch.Tensor) -> torch.Tensor:
    """Weight of every target, float32 [rows, length]: `INSTRUCTION_WEIGHT` inside a user turn, 1 elsewhere.

    Instructions are random by design: their tokens carry much loss and nothing to learn beyond their form.
    """
    inputs = tokens[:, :-1]
    user, assistant = (build_tokenizer.SPECIALS.index(t) for t in (build_tokenizer.USER, build_tokenizer.ASSISTANT))
    inside = (inputs == user).cumsum(1) > (inputs == assistant).cumsum(1)
    return torch.where(inside, INSTRUCTION_WEIGHT, 1.0)


def row_losses(model: MiMoV2ForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Weighted mean next-token cross entropy of every row, nats; tokens int64 [rows, length + 1]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    weights = target_weights(tokens)
    return (loss.view_as(weights) * weights).sum(1) / weights.sum(1)


def compile_parts(model: MiMoV2ForCausalLM) -> None:
    """Compile attention, norms, dense MLP and experts one by one; the routers stay eager because hooks count there."""
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm,
                     getattr(layer.mlp, "experts", layer.mlp)):
            part.compile()


def require_gradients(model: torch.nn.Module) -> None:
    """Raise unless every parameter, and every expert of a stack, has a finite gradient that is not all zero."""
    for name, parameter in model.named_parameters():
        parts = [parameter.grad] if parameter.grad is None or parameter.ndim < 3 else list(parameter.grad)
        for index, grad in enumerate(parts):
            if grad is None or not torch.isfinite(grad).all() or not grad.any():
                raise ValueError(f"{name}[{index}]: no usable gradient on the first step")


def new_model(seed: int) -> MiMoV2ForCausalLM:
    """The seed's model with fresh weights: projections into the residual stream start smaller by the depth."""
    torch.manual_seed(seed)
    model = MiMoV2ForCausalLM(seed_config()).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.mul_((2 * model.config.num_hidden_layers) ** -0.5)
    return model


def atomic_save(value: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def save_model(model: MiMoV2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder: bf16 weights, configuration, generation configuration and tokenizer."""
    model.generation_config.update(do_sample=False, eos_token_id=model.config.eos_token_id,
                                   pad_token_id=model.config.pad_token_id)
    model.save_pretrained(folder)
    build_tokenizer.save_tokenizer(tokenizer, folder)


class Pretraining:
    """State of one run: model, optimizer, data position, clock."""

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer):
        self.args, self.tokenizer = args, tokenizer
        masters = new_model(args.seed)
        self.optimizer = MasterOptimizer(masters, args.muon_lr, args.adam_lr)
        self.model = masters.to(torch.bfloat16)
        for gate in (m for m in self.model.modules() if hasattr(m, "e_score_correction_bias")):
            gate.e_score_correction_bias.data = gate.e_score_correction_bias.data.float()
        self.optimizer.parameters = dict(self.model.named_parameters())
        self.balance = RouterBalance(self.model)
        if args.compile:
            compile_parts(self.model)
        self.loader = RowLoader(args.work / "tokens", args.rows, args.length, args.seed)
        self.step, self.tokens, self.clock = 0, 0, 0.0  # clock: seconds spent by this run and the ones it resumes

    def state(self) -> dict:
        return {"optimizer": self.optimizer.state(), "loader": self.loader.state(), "step": self.step,
                "tokens": self.tokens, "clock": self.clock,
                "bias": [g.e_score_correction_bias for g in self.balance.gates]}

    def restore(self, state: dict) -> None:
        self.optimizer.restore(state["optimizer"])
        self.loader.restore(state["loader"])
        self.step, self.tokens, self.clock = state["step"], state["tokens"], state["clock"]
        for gate, bias in zip(self.balance.gates, state["bias"], strict=True):
            gate.e_score_correction_bias.copy_(bias)

    def train_step(self, spent: float) -> dict:
        batch, names = self.loader.next_batch()
        losses = row_losses(self.model, torch.from_numpy(batch))
        losses.mean().backward()
        if self.step == 0:
            require_gradients(self.model)
        norm = self.optimizer.step(learning_rate_share(spent))
        load = self.balance.step(learning_rate_share(spent))
        self.step += 1
        self.tokens += batch.size - len(batch)
        by_stream = {s: float(losses.detach()[[n == s for n in names]].mean()) for s in self.loader.rows}
        return {"loss": by_stream, "norm": norm, "load": load}

    def run(self) -> None:
        """Train until the budget is spent, then write the last checkpoint and `model/`."""
        budget = self.args.minutes * 60
        began, saved = time.monotonic() - self.clock, self.clock
        window: list[dict] = []
        with (self.args.out / "log.jsonl").open("a") as log:
            while (spent := (time.monotonic() - began) / budget) < 1.0:
                window.append(self.train_step(spent))
                self.clock = time.monotonic() - began
                if len(window) == LOG_STEPS:
                    self._write_line(log, window, spent)
                    window = []
                if self.clock - saved > CHECKPOINT_SECONDS:
                    saved = self.clock
                    atomic_save(self.state(), self.args.out / "checkpoint.pt")
            if window:
                self._write_line(log, window, spent)
        atomic_save(self.state(), self.args.out / "checkpoint.pt")
        save_model(self.model, self.tokenizer, self.args.out / "model")

    def _write_line(self, log: TextIO, window: list[dict], spent: float) -> None:
        mean = {s: round(sum(w["loss"][s] for w in window) / len(window), 4) for s in self.loader.rows}
        line = {"step": self.step, "tokens": self.tokens, "seconds": round(self.clock, 1), "loss": mean,
                "norm": round(window[-1]["norm"], 3), "load": round(window[-1]["load"], 2),
                "share": round(learning_rate_share(spent), 4),
                "tokens_per_second": round(self.tokens / self.clock), "epochs": self.loader.epochs()}
        log.write(json.dumps(line) + "\n")
        log.flush()


def draw_curve(log: Path, picture: Path) -> None:
    """Loss per stream over tokens, from `log.jsonl`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for stream in lines[0]["loss"]:
        axes.plot([x["tokens"] / 1e6 for x in lines], [x["loss"][stream] for x in lines], label=stream, linewidth=1)
    axes.set(xlabel="tokens, millions", ylabel="training loss, nats per token", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def train_seed_tokenizer(work: Path, seed: int) -> Tokenizer:
    """The tokenizer, from a balanced sample of the training text and of tasks."""
    texts: list[str] = []
    for domain, characters in (("code", 5_000_000), ("prose", 5_000_000), ("math", 700_000)):
        used = 0
        for text in load_documents(work, domain, seed):
            if used < characters:
                texts.append(text[:12_000])
                used += len(texts[-1])
    return build_tokenizer.train_tokenizer(texts)


def parse_rows(value: str) -> dict[str, int]:
    """`code=6,prose=4` to a dict."""
    return {name: int(count) for name, count in (item.split("=") for item in value.split(","))}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="pretraining set written by corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock budget of the training loop")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--rows", type=parse_rows, default="code=3,prose=2,math=1,tasks=4", help="rows per batch")
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=0.006, help="peak for embedding and head")
    parser.add_argument("--tokenizer", type=Path, help="reuse this tokenizer.json instead of training one")
    parser.add_argument("--compile", action="store_true", help="compile the layers' parts (needs a C++ compiler)")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = (Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer
                 else train_seed_tokenizer(args.work, args.seed))
    if not (args.work / "tokens" / "tasks.npy").exists():
        build_streams(args.work, tokenizer, args.work / "tokens", seed=args.seed)
    run = Pretraining(args, tokenizer)
    if args.resume:
        run.restore(torch.load(args.out / "checkpoint.pt", weights_only=True))
    run.run()
    draw_curve(args.out / "log.jsonl", args.out / "loss.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
