"""Loads exports with several versions of transformers, each in an environment of its own: `make test-versions`.

    python tests/versions.py ENVIRONMENTS [--run runs/tiny] [--write docs/results/versions.md]

Loaded are the demo's export in every layout of its family, its drafter, and tiny random Qwen3-MoE and gpt-oss models. Compared
are expert weights bit for bit, logits (float32) within tests/tolerance.py, token ids of a text. Exit code 1 if a version reads
anything else, or if one that pyproject.toml allows cannot load a folder; a refusal by an older one is written down.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = "def add(a, b):\n    return a + b  # naïve\n"


def load(folder: Path, reference: dict) -> str:
    """In an environment: what its transformers makes of a folder; "equal ..." if all is as in `reference`."""
    import torch
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": True, "dtype": torch.bfloat16}
    if reference["kind"] == "drafter":
        model = AutoModel.from_pretrained(folder, **options)
        differ = [n for n, t in model.named_parameters()
                  if n != "mask_embedding" and not torch.equal(t, reference["weights"][n])]
        return f"differs: {differ[0]}" if differ else "weights equal"
    if transformers.__version__ < "5" and reference["layout"] == "compressed-tensors":
        # Or it decodes to bf16 at every call, and nothing could be compared in float32.
        options["quantization_config"] = transformers.CompressedTensorsConfig(run_compressed=False)
    said = []
    if "tokens" in reference:
        ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(TEXT)["input_ids"]
        if ids != reference["tokens"]:
            return f"differs: token ids {ids[:8]}..., expected {reference['tokens'][:8]}..."
        said.append("tokens")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    except (ImportError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        return f"{'tokenizer equal; ' if said else ''}model refused: {str(error).strip().splitlines()[0]}"
    torch.nn.Module.float(model)
    weights = fused(dict(model.state_dict()))
    with torch.no_grad():
        logits = model(input_ids=reference["ids"]).logits
    differ = [n for n, t in reference["experts"].items() if n not in weights or not torch.equal(weights[n], t.float())]
    if differ:
        return f"differs: {differ[0]}"
    worst = float((logits - reference["logits"]).abs().max())
    if not torch.allclose(logits, reference["logits"], **reference["tolerance"]):
        return f"differs: logits by {worst:.2g}"
    return f"{', '.join([*said, 'experts'])} equal; logits {worst:.0e}"


def fused(weights: dict) -> dict:
    """With per-expert matrices, as older versions hold them, joined into the 3-D tensors of newer ones."""
    import re

    import torch

    parts: dict = {}
    for name in [n for n in weights if re.search(r"experts\.\d+\.", n) and n.endswith("_proj.weight")]:
        layer, expert, kind = re.fullmatch(r"(.+experts)\.(\d+)\.(\w+)_proj\.weight", name).groups()
        parts.setdefault(layer, {}).setdefault(int(expert), {})[kind] = weights.pop(name)
    for layer, experts in parts.items():
        held = [experts[i] for i in range(len(experts))]
        weights[f"{layer}.gate_up_proj"] = torch.stack([torch.cat((e["gate"], e["up"])) for e in held])
        weights[f"{layer}.down_proj"] = torch.stack([e["down"] for e in held])
    return weights


def expectation(model, ids, layout: str, tokenizer=None) -> dict:
    """What a client must find: experts in bf16, logits of the float32 model, token ids."""
    import torch
    from tolerance import MODEL_FP32

    experts = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items() if ".experts." in n and t.ndim == 3}
    assert experts
    with torch.no_grad():
        logits = torch.nn.Module.float(model)(input_ids=ids).logits
    tokens = {} if tokenizer is None else {"tokens": tokenizer(TEXT)["input_ids"]}
    return tokens | {"kind": "model", "layout": layout, "ids": ids, "logits": logits, "experts": experts,
                     "tolerance": MODEL_FP32}


def folders(run: Path, root: Path):
    """(description, folder, expectation) of everything that is loaded."""
    import torch
    from toy_layouts import exported, gpt_oss, qwen3

    from checkpoint.load import load_model, load_tokenizer
    from modeling.drafter import load_drafter

    ids = (torch.arange(200)[None] * 37) % 1000
    ours = load_model(run / "export/model", dtype=torch.bfloat16)
    expected = expectation(ours, ids, "native", load_tokenizer(run / "export/model"))
    yield "MiMo-V2, native (shipped code)", run / "export/model", expected
    drafter = load_drafter(run / "export/model/dflash") if (run / "export/model/dflash").is_dir() else None
    for layout in ("hf-fp8", "compressed-tensors", "bf16", "native"):
        options = ["export.dense=fp8"] if layout == "native" else []
        subprocess.run([sys.executable, "export/to_hf.py", run / "export/model/resolved.yaml", "--layout", layout, "--weights",
                        run / "qat/model", "--out", root / layout, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        if layout == "native":  # the rest rounded to FP8, as the released checkpoints have it: another model
            expected = expectation(load_model(root / layout, dtype=torch.bfloat16), ids, layout, load_tokenizer(root / layout))
        yield f"MiMo-V2, {layout}{' (FP8 around the experts)' if options else ''}", root / layout, expected | {"layout": layout}
    if drafter is not None:
        yield "its drafter (shipped code)", run / "export/model/dflash", {
            "kind": "drafter", "weights": dict(drafter.named_parameters())}
    for config, layout in ((qwen3(), "compressed-tensors"), (gpt_oss(), "gpt-oss")):
        (root / config.model_type).mkdir()
        folder, model = exported(root / config.model_type, config, layout)
        yield f"{config.model_type}, {layout}", folder, expectation(model, ids % config.vocab_size, layout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("environments", type=Path, help="folder of environments, each named by its version")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/tiny", help="a run that exported (%(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the table, in Markdown")
    options = parser.parse_args()
    if not (options.run / "export/model").is_dir():
        parser.error(f"--run: {options.run}: no export/model there: run `make demo` (or make smoke) first")
    pythons = sorted(options.environments.absolute().glob("*/bin/python"))
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    names, table, bad = {}, {}, []
    with tempfile.TemporaryDirectory() as temporary:
        for what, folder, expected in folders(options.run.resolve(), Path(temporary)):
            torch.save(expected, Path(temporary) / "expected.pt")
            for python in pythons:
                done = subprocess.run([python, __file__, "--load", folder, Path(temporary) / "expected.pt"], text=True,
                                      capture_output=True, env=os.environ | {"HF_HOME": temporary, "OMP_NUM_THREADS": "1"})
                last = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
                answer = json.loads(last) if last.startswith("{") else {"version": python.parts[-3], "found": f"broke: {last}"}
                names[python], table[what, python] = answer["version"], answer["found"]
                print(f"transformers {answer['version']}: {what}: {answer['found']}", flush=True)
                old = int(answer["version"].split(".")[0]) < 5
                if answer["found"].startswith("differs") or ("equal; logits" not in answer["found"]
                                                             and answer["found"] != "weights equal" and not old):
                    bad.append((what, answer["version"]))
    if options.write:
        write(options.write, pythons, names, table)
    return 1 if bad else 0


def write(path: Path, pythons: list[Path], names: dict, table: dict) -> None:
    import torch

    from storage.revision import git_revision

    order = sorted(pythons, key=lambda p: [int(part) for part in names[p].split(".")[:3]])
    lines = ["# Exports in other versions of transformers", "",
             f"Written by `make test-versions` (tests/versions.py), {datetime.date.today():%d %B %Y}, revision "
             f"`{git_revision()}`, Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()} CPU.",
             "",
             "Each version loads each folder by AutoModelForCausalLM in an environment of its own. Equal: experts bit for bit,",
             "and the token ids of a text; the number is the largest difference of a logit from our own loader's, in float32.",
             "The folders of MiMo-V2 are exports of a run of recipes/tiny.yaml, the others tiny random models.", ""]
    for what in dict.fromkeys(what for what, _ in table):
        lines += [f"**{what}**", "", "| transformers | found |", "|---|---|"]
        lines += [f"| {names[python]} | {table[what, python].replace('|', '/')} |" for python in order] + [""]
    path.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        sys.modules["torchao"] = None  # its import prints, and nothing here is of it
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        found = load(Path(sys.argv[2]), torch.load(sys.argv[3], weights_only=False))
        print(json.dumps({"version": transformers.__version__, "found": found}))
    else:
        sys.exit(main())
