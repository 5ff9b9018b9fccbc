"""Writes docs/families.md: what every fused-experts model type of the installed transformers can be trained and exported as.

    python tools/family_table.py            # write the page
    python tools/family_table.py --check    # exit code 1 if the page is not what the code says

Asked of a tiny configuration of each type; `make test-families` trains, exports and loads each of them.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # launched by path: import from the root, not from this folder
    sys.path[0] = str(ROOT)

PAGE = ROOT / "docs/families.md"
HEAD = """# Model families

<!-- Written by tools/family_table.py: change the code, not this page. transformers {version}. -->

Every model type of transformers {version} whose experts are fused tensors and that `AutoModelForCausalLM` builds, and MiMo-V2.
Each is trained a step, exported in the layouts of its row and loaded again bit for bit by stock transformers
(`make test-families`; a dozen of them in `make test`).

- **on disk**: how the experts are published. One matrix per expert can be stored packed under its own name; experts that are
  published fused have no packed form that clients know (but gpt-oss's).
- **layouts**: the first is what `export.layout: auto` writes. `bf16` holds the experts decoded exactly, for any engine.
- **drafter**: whether `dflash_train/train.py` trains a drafter for it, or why it refuses to before it starts. A drafter is
  exported beside every layout; an engine must be able to hand it the outputs of this family's layers.
- **runtime**: this project's engine, server and `validate` run the first layout on a CPU, or also on a GPU by Triton
  kernels; attention biases (gpt-oss) run on the slower torch backend alone.

What is not in the table is refused before training, with the reason: a type without a causal language model, experts of another
form, a layout that its client cannot load. `checkpoint/families/` has one object per family that has something of its own.

| model type | on disk | layouts | drafter | runtime |
|---|---|---|---|---|
"""


def page() -> str:
    """The page's text."""
    import transformers

    from checkpoint.families.registry import FAMILIES, family_of, refuse_layout
    from tools.family_configs import tiny, types

    logging.disable(logging.WARNING)
    rows, refused = [("mimo_v2", "one matrix per expert", FAMILIES["mimo_v2"].layouts, "yes", FAMILIES["mimo_v2"])], []
    for model_type in types():
        config = tiny(model_type)
        family = family_of(config)
        try:
            names = family.published(config)
        except ValueError as error:
            refused.append(f"| {model_type} | {str(error).split(': ', 1)[1]} | refused before training | | |")
            continue
        form = "one matrix per expert" if names.experts else "fused"
        if names.experts:
            form += f" (`{'.'.join(next(iter(names.experts)).split('.')[3:])}`)"
        layouts = [layout for layout in family.layouts if _holds(refuse_layout, layout, config)]
        rows.append((model_type, form, layouts, _drafter(config), family))
    text = HEAD.format(version=transformers.__version__)
    for model_type, form, layouts, drafter, family in rows:
        runs = "" if not family.runtime_layout else "CPU, GPU" if family.kernels else "CPU"
        text += f"| {model_type} | {form} | {', '.join(layouts)} | {drafter} | {runs} |\n"
    return text + "\n".join(refused) + "\n"


def _drafter(config) -> str:
    """Whether a tiny model of this configuration can be a drafter's target, asked of the trainer itself."""
    import types

    import torch
    from transformers import AutoModelForCausalLM

    from dflash_train.target import target_of

    torch.manual_seed(0)
    try:
        target_of(AutoModelForCausalLM.from_config(config), types.SimpleNamespace(eos_token_id=2), [0], Path("it"))
    except ValueError as error:
        return "no: " + re.sub(r"^(model\.path: it|model type \w+): ", "", str(error)).partition(";")[0]
    return "yes"


def _holds(refuse, layout: str, config) -> bool:
    try:
        refuse(layout, config)
    except ValueError:
        return False
    return True


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is old")
    args = parser.parse_args(argv)
    text = page()
    if args.check:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
