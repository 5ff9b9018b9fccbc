#!/usr/bin/env python
"""A dense Llama checkpoint as a Mixture of Experts of the same function, in Mixtral's form.

    python recipes/smollm2/convert.py SOURCE OUT [--experts 8] [--experts-per-token 8] [--deal order|cluster]

Why: quantization and drafting of experts are to be measured on real language, and no small MoE with public weights can be
had from a package registry. A feed-forward layer is a sum over its inner units, so it can be cut into experts without a
change of its function:

    down @ (silu(gate x) * (up x))  =  sum over experts e of  1/E * (E * down_e) @ (silu(gate_e x) * (up_e x))

Each expert takes I / E of the inner units (rows of gate and up, columns of down). All E experts are chosen for every token,
the router's weights are zero, so its softmax gives each of them exactly 1/E, and `down` carries the factor E: a power of two,
so that the multiplication is exact in every floating-point dtype. Only the order of the sums differs.

With fewer experts per token than experts the function is another one, which has to be trained: `--deal cluster` puts units
that react alike into one expert (balanced spherical k-means of the gate's rows, as in MoEfication, arXiv 2110.01786) and makes
the clusters' centres the router's rows, scaled so that its weights stay near 1 / (experts per token).

Prints the largest difference of logits, in float32, between the dense model in the written dtype and the mixture.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

if __name__ == "__main__":  # launched by path, Python puts this script's own folder first
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch.nn import functional as F

from storage.reading import first_line

# Text whose logits are compared: prose, code, arithmetic, a chat turn's words.
PROBE = ("The kettle had gone cold by the time she found the letter, folded twice and pushed under the clock.\n\n"
         "def mean(values):\n    return sum(values) / len(values)\n\n"
         "A farmer sells 12 eggs a day at $3 each. In a week he earns 12 * 3 * 7 = 252 dollars.\n\n"
         "Can you explain why the sky is blue? Sunlight is scattered by the air, and blue light more than red.")
# Of the clusters' centres as router rows: they order the experts, while their weights stay near 1 / (experts per token).
ROUTER_SCALE = 2.0**-6
# Share of the largest logit by which float32 sums in another order may differ; 2e-6 is seen.
ROUNDING = 5e-5


def load_dense(source: str) -> tuple:
    """(Llama model in float32, tokenizer) of a .gguf file, a Hugging Face folder, or a hub name.

    Raises:
        ValueError: it cannot be read, or is not a Llama model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(source)
    where, options = source, {}
    if path.suffix == ".gguf":
        where, options = str(path.parent), {"gguf_file": path.name}
    if path.suffix == ".gguf" and not path.is_file() or source.startswith((".", "/")) and not path.exists():
        raise ValueError(f"{source}: no such file or folder")
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{source}: cannot be loaded: {first_line(error)}") from None
    if model.config.model_type != "llama":
        raise ValueError(f"{source}: model type {model.config.model_type!r}, expected llama")
    return _unmarked(model), tokenizer


def _unmarked(model):
    """The same model without what transformers keeps of a GGUF file: a model marked as quantized refuses other dtypes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):
        plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.model.rotary_emb = model.model.rotary_emb
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


def as_mixture(dense, *, experts: int, per_token: int, deal: str = "order", seed: int = 0):
    """The Mixtral model whose experts are the inner units of `dense` (a LlamaForCausalLM), in its dtype.

    Args:
        experts: a divisor of the intermediate size.
        per_token: experts chosen for a token; equal to `experts`, the function is the dense model's.
        deal: "order" deals the units in their order; "cluster" puts those that react alike together.

    Raises:
        ValueError: sizes that do not divide, or parts of Llama that Mixtral does not have (biases, another activation).
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    _require_convertible(dense.config, experts, per_token)
    mixture = MixtralForCausalLM(MixtralConfig(**_mixture_settings(dense.config, experts, per_token))).to(dense.dtype).eval()
    weights = dense.state_dict()
    for layer in range(dense.config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (weights.pop(f"{mlp}.{part}_proj.weight") for part in ("gate", "up", "down"))
        groups, centres = clusters(gate, experts, seed) if deal == "cluster" else (_in_order(len(gate), experts), None)
        weights[f"{mlp}.experts.gate_up_proj"] = torch.stack([torch.cat([gate[g], up[g]]) for g in groups])
        weights[f"{mlp}.experts.down_proj"] = torch.stack([down[:, g] * per_token for g in groups])
        router = torch.zeros(experts, gate.shape[1], dtype=gate.dtype)
        if per_token < experts:
            router = centres.to(gate.dtype) * ROUTER_SCALE
        weights[f"{mlp}.gate.weight"] = router
    mixture.load_state_dict(weights)
    mixture.tie_weights()
    mixture.generation_config = dense.generation_config
    return mixture


def _require_convertible(config, experts: int, per_token: int) -> None:
    inner = config.intermediate_size
    for flag in ("attention_bias", "mlp_bias"):
        if getattr(config, flag, False):
            raise ValueError(f"{flag}: Mixtral has no biases, so this model has no such form")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r}: expected silu")
    if experts < 1 or inner % experts or inner // experts % 32:
        fitting = [e for e in range(1, inner // 32 + 1) if inner % (32 * e) == 0]
        raise ValueError(f"--experts {experts}: {inner} inner units must come to a multiple of 32 each (the MXFP4 block); "
                         f"possible: {', '.join(map(str, fitting))}")
    if not 1 <= per_token <= experts:
        raise ValueError(f"--experts-per-token {per_token}: expected 1 to {experts}")
    if per_token & (per_token - 1):
        raise ValueError(f"--experts-per-token {per_token}: expected a power of two, or down_proj would be rounded")


def _mixture_settings(config, experts: int, per_token: int) -> dict:
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id",
            "pad_token_id", "hidden_act")
    return {key: getattr(config, key) for key in same} | {
        "intermediate_size": config.intermediate_size // experts, "num_local_experts": experts,
        "num_experts_per_tok": per_token, "sliding_window": None}


def _in_order(units: int, experts: int) -> list[torch.Tensor]:
    return list(torch.arange(units).view(experts, -1))


def clusters(gate_IH: torch.Tensor, experts: int, seed: int = 0, rounds: int = 10) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Inner units of equal number per expert, alike in the direction of their gate rows, and the centres [experts, H].

    Balanced spherical k-means: in each round the most similar (unit, centre) pairs are taken first, while the expert has room.
    """
    rows = F.normalize(gate_IH.float(), dim=1)
    room = len(rows) // experts
    start = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:experts]
    centres = rows[start]
    for _ in range(rounds):
        order = (rows @ centres.T).flatten().argsort(descending=True, stable=True).tolist()
        owner, free = [-1] * len(rows), [room] * experts
        for pair in order:
            unit, expert = divmod(pair, experts)
            if owner[unit] < 0 and free[expert]:
                owner[unit], free[expert] = expert, free[expert] - 1
        of = torch.tensor(owner)
        centres = F.normalize(torch.stack([rows[of == e].mean(0) for e in range(experts)]), dim=1)
    return [(of == e).nonzero()[:, 0] for e in range(experts)], centres


@torch.no_grad()
def largest_difference(dense, mixture, ids_BT: torch.Tensor) -> tuple[float, float]:
    """(largest absolute difference of logits, largest absolute logit of the dense model), both run in float32."""
    expected = dense.float()(input_ids=ids_BT).logits
    return float((mixture.float()(input_ids=ids_BT).logits - expected).abs().max()), float(expected.abs().max())


def write(mixture, tokenizer, out: Path) -> None:
    """Writes the checkpoint folder aside and renames it."""
    aside = out.with_name(out.name + ".tmp")
    mixture.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(out)


def run(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise ValueError(f"{args.out}: exists already; expected a new folder")
    dense, tokenizer = load_dense(args.source)
    dense = dense.to(getattr(torch, args.dtype))
    mixture = as_mixture(dense, experts=args.experts, per_token=args.experts_per_token, deal=args.deal, seed=args.seed)
    exact = args.experts_per_token == args.experts
    ids = tokenizer(PROBE, return_tensors="pt").input_ids
    difference, largest = largest_difference(copy.deepcopy(dense), copy.deepcopy(mixture), ids)
    if exact and difference > ROUNDING * largest:
        raise ArithmeticError(f"the mixture's logits differ by {difference:.2g} of {largest:.3g}; nothing was written")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(mixture, tokenizer, args.out)
    print(f"written: {args.out} ({args.experts} experts of {mixture.config.intermediate_size}, {args.experts_per_token} chosen:"
          f" {'the same function' if exact else 'another function, to be trained'})\n"
          f"largest difference of logits in float32: {difference:.2g} of {largest:.3g}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="recipes/smollm2/convert.py", description=__doc__.splitlines()[0])
    parser.add_argument("source", help=".gguf file, Hugging Face folder or hub name of a Llama model")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=8)
    parser.add_argument("--deal", choices=("order", "cluster"), help="default: order, or cluster where not all are chosen")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of the clusters' first centres")
    args = parser.parse_args(argv)
    chosen_few = args.experts_per_token < args.experts
    args.deal = args.deal or ("cluster" if chosen_few else "order")
    try:
        if chosen_few and args.deal == "order":
            raise ValueError("--deal order: experts that are chosen need a router, which --deal cluster gives")
        run(args)
    except (ValueError, OSError) as error:
        print(f"recipes/smollm2/convert.py: {error}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"recipes/smollm2/convert.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
