#!/usr/bin/env python
"""llm-compressor's MXFP4 on the experts of a Mixtral folder, beside plain rounding and the recipe's own start.

    python benchmarks/llmcompressor_peer.py rows ROWS.json                           # calibration rows, those of the start
    PEER/bin/python benchmarks/llmcompressor_peer.py rtn|gptq OUT --rows ROWS.json   # in llm-compressor's own environment
    python benchmarks/llmcompressor_peer.py measure FIGURES.json even start gptq=OUT # KL to the original on held-out text

The model is that of recipes/smollm2.yaml (--recipe, --folder); overrides of the recipe may follow. OUT/compressed is what
llm-compressor writes; OUT is a copy of the original with these experts decoded, so that one measure judges all. `even` is plain
rounding, `start` the initial codes that the recipe chooses, both made here. Held-out figures are those of training (bf16), with
the KL of every row and, against `even`, its interval.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

EXPERTS = [r"re:.*experts\.\d+\.(gate|up|down)_proj$"]
THEIRS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # the folder's names, and those of the linear experts


def compress(folder: Path, method: str, rows: Path | None, out: Path) -> None:
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # In float32: bf16 is slow on processors without its products, and the weights have the same values.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linearize_moe(model)
    scheme = preset_name_to_scheme("MXFP4A16", EXPERTS)
    options = {"config_groups": {"experts": scheme}, "ignore": ["lm_head"]}
    began = time.process_time()
    if method == "rtn":
        oneshot(model=model, recipe=QuantizationModifier(**options), pipeline="datafree")
    else:
        ids = json.loads(rows.read_text())
        data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
        oneshot(model=model, tokenizer=AutoTokenizer.from_pretrained(folder), dataset=data, recipe=GPTQModifier(**options),
                num_calibration_samples=len(ids), max_seq_length=len(ids[0]), shuffle_calibration_samples=False)
    worked = time.process_time() - began
    model.save_pretrained(out / "compressed", save_compressed=True)
    facts = {"method": method, "processor_seconds": worked, "matrices": decode(folder, scheme, out),
             "versions": {name: version(name) for name in ("torch", "llmcompressor", "compressed-tensors", "transformers")}}
    (out / "peer.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts))


def decode(folder: Path, scheme, out: Path) -> int:
    """Writes `folder` with the experts of out/compressed, decoded by compressed-tensors; how many matrices."""
    from compressed_tensors.compressors.base import BaseCompressor
    from safetensors.torch import load_file, save_file

    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    packed = {}
    for file in (out / "compressed").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if found := re.search(r"layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.(weight_\w+)$", name):
                layer, expert, matrix, part = found.groups()
                packed[layer, expert, THEIRS.get(matrix, matrix), part] = tensor
    tensors, count = load_file(folder / "model.safetensors"), 0
    for name, tensor in tensors.items():
        if found := re.search(r"layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight$", name):
            layer, expert, matrix = found.groups()
            parts = {part: packed[layer, expert, THEIRS[matrix], part] for part in ("weight_packed", "weight_scale")}
            tensors[name] = compressor.decompress(parts, scheme)["weight"].to(tensor.dtype).contiguous()
            count += 1
    for file in folder.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            shutil.copy(file, out / file.name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return count


def calibration_rows(recipe):
    """int64 [sequences, T], spread over the training text as `qat.trainer` spreads them."""
    import torch

    from checkpoint.load import load_tokenizer
    from modeling.dialogue_tokens import Rendering
    from qat.data import packed_dataset, split_rows

    rendering = Rendering(recipe.chat.prompts, recipe.chat.template_options)
    dataset = packed_dataset(recipe.data.train, load_tokenizer(recipe.model.path), recipe.data, rendering=rendering, say=print)
    spread = torch.linspace(0, len(dataset) - 1, recipe.qat.warm_start.sequences).long().tolist()
    return split_rows(torch.stack(list(dataset.select(spread)["input_ids"])))[0]


def measure(recipe, entries: list[str], file: Path) -> None:
    import torch

    from checkpoint.load import load_model, load_tokenizer
    from modeling.all_experts import use_all_experts
    from modeling.dialogue_tokens import Rendering
    from qat.data import heldout_domains
    from qat.evaluate import HeldOut
    from qat.expert_quantizer import ExpertQuantizer
    from qat.trainer import make_quantizer
    from qat.warm_start import choose_first_codes
    from training.intervals import ratio_interval
    from training.report import environment

    def model_of(folder: str):
        model = load_model(folder, dtype=torch.bfloat16).eval().requires_grad_(False)
        use_all_experts(model)
        return model

    rendering = Rendering(recipe.chat.prompts, recipe.chat.template_options)
    domains = heldout_domains(recipe.data.heldout, load_tokenizer(recipe.model.path), recipe.data, rendering)
    teacher = model_of(recipe.model.path)
    held = HeldOut(teacher, domains, sequences=recipe.data.eval_sequences, batch_size=8, chunk_tokens=512)
    found = json.loads(file.read_text()) if file.is_file() else {"environment": environment()}
    for entry in entries:
        name, _, folder = entry.partition("=")
        model = model_of(folder or recipe.model.path)
        began = time.process_time()
        if name == "even":
            ExpertQuantizer(model, scale_rule="even")
        elif not folder:
            choose_first_codes(teacher, make_quantizer(model, recipe), calibration_rows(recipe), recipe.qat.warm_start,
                               seed=recipe.seed, model=model, say=print)
        worked = time.process_time() - began
        found[name] = row = held.measure(model) | {"processor_seconds": worked}
        line = f"{name}: KL {row['kl']:.4f}, top-1 {100 * row['top1_agreement']:.1f} %, loss {row['loss']:.4f}"
        if "even" in found and name != "even":
            pairs = [list(zip(of, found["even"]["row_kl"][domain], strict=True)) for domain, of in row["row_kl"].items()]
            low, high = ratio_interval(pairs)
            line += f", gap closed {1 - row['kl'] / found['even']['kl']:.3f} ({1 - high:.3f} to {1 - low:.3f})"
        print(line, flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/llmcompressor_peer.py", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2-moe"), help="for rtn and gptq: the original")
    parser.add_argument("--rows", type=Path, help="for gptq: what `rows` wrote")
    parser.add_argument("--recipe", default="recipes/smollm2.yaml")
    parser.add_argument("job", choices=["rows", "rtn", "gptq", "measure"])
    parser.add_argument("out", type=Path)
    parser.add_argument("entries", nargs="*", help="for measure: even, start, NAME=FOLDER; and section.key=value of the recipe")
    args = parser.parse_intermixed_args(argv)
    if args.job in ("rtn", "gptq"):
        if args.job == "gptq" and (args.rows is None or not args.rows.is_file()):
            parser.error(f"--rows {args.rows}: no such file; the job `rows` writes it")
        compress(args.folder, args.job, args.rows, args.out)
        return 0
    from recipes.command import run_command

    overrides = [entry for entry in args.entries if "." in entry.split("=")[0]]

    def job(recipe) -> int:
        if args.job == "rows":
            args.out.write_text(json.dumps(calibration_rows(recipe).tolist()))
        else:
            measure(recipe, [entry for entry in args.entries if entry not in overrides], args.out)
        return 0

    return run_command(args.recipe, overrides, job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
