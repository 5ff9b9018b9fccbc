"""Text that a model writes itself, for training it on more tokens than there is text: expert QAT of the embedded seed, say.

    python export/to_hf.py recipes/tiny.yaml --from recipes/seed/model --out runs/rounded
    python tools/seed/own_text.py runs/rounded --out runs/own.jsonl --tokens 4000000
    accelerate launch --config_file recipes/accelerate/cpu.yaml qat/train.py recipes/tiny.yaml \\
        "data.train=[recipes/seed/text/*.train.jsonl, runs/own.jsonl]" qat.steps=2200

The reference runtime writes, from an export: several thousand tokens a second and core, six times what `generate` of
transformers makes of the unrounded model. Each row begins with a few tokens from anywhere in the frozen training text, domain
after domain, and goes on with what the model draws at temperature 1. What it is trained on then has its own distribution,
which is where quantization must not change it.
A row depends on its number and the seed alone. Rows that are there are kept: a second run goes on where the first one ended.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # launched by path: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.seed.corpus import DOMAINS, read_frozen

BEGINNING, AT_ONCE = 24, 128


def beginnings(tokenizer, rng: random.Random, count: int) -> list[list[int]]:
    """`count` runs of BEGINNING tokens of training text, of the domains in turn."""
    texts = {d: [ids for document in read_frozen(d, "train") if len(ids := tokenizer.encode(document["text"])) > BEGINNING]
             for d in DOMAINS}
    found = []
    for i in range(count):
        ids = rng.choice(texts[DOMAINS[i % len(DOMAINS)]])
        start = rng.randrange(len(ids) - BEGINNING)
        found.append(ids[start:start + BEGINNING])
    return found


def whole_rows(path: Path) -> int:
    """Rows of a file that is there; half a row, left by a killed process, is cut off."""
    if not path.is_file():
        return 0
    text = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(text.rfind(b"\n") + 1)
    return text.count(b"\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="exported folder")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file; rows are added to one that is there")
    parser.add_argument("--tokens", type=int, default=600_000, help="in all, beginnings included (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.length <= BEGINNING or args.tokens < 1:
        parser.error(f"--length {args.length}, --tokens {args.tokens}: expected more than {BEGINNING} and 0")
    from checkpoint.load import load_tokenizer
    from runtime_ref.core.sampling_params import SamplingParams
    from runtime_ref.engine.engine import Engine, EngineOptions

    try:
        engine = Engine.from_folder(args.model, drafter=False, options=EngineOptions(
            max_running=AT_ONCE, max_context=args.length, prefix_cache=False))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    tokenizer, rows = load_tokenizer(args.model), -(-args.tokens // args.length)
    starts = beginnings(tokenizer, random.Random(args.seed), rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done, began = whole_rows(args.out), time.monotonic()
    with args.out.open("a", encoding="utf-8") as file:
        for first in range(done, rows, AT_ONCE):
            here = range(first, min(first + AT_ONCE, rows))
            params = [SamplingParams(max_tokens=args.length - BEGINNING, temperature=1.0, ignore_eos=True,
                                     seed=(args.seed << 32) + i) for i in here]
            drawn = engine.generate([starts[i] for i in here], params)
            file.writelines(json.dumps({"text": tokenizer.decode(starts[i] + ids)}) + "\n"
                            for i, ids in zip(here, drawn, strict=True))
            file.flush()
            rate = (here.stop - done) * args.length / (time.monotonic() - began)
            print(f"\r{here.stop} of {rows} rows, {rate:,.0f} tokens/s", end="", flush=True)
    print(f"\n{args.out}: {rows} rows, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
