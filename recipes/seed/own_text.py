"""Text that a model writes itself, for training it on more tokens than there is text: expert QAT of the embedded seed, say.

    python recipes/seed/own_text.py --out runs/own.jsonl --tokens 600000
    accelerate launch --config_file recipes/accelerate/cpu.yaml qat/train.py recipes/tiny.yaml \\
        "data.train=[recipes/seed/text/*.train.jsonl, runs/own.jsonl]" qat.steps=570

Each row begins with a few tokens from anywhere in the frozen training text, domain after domain, and goes on with what the
model draws at temperature 1. What it is trained on then has its own distribution, which is where quantization must not change
it.
Rows that are there are kept: a second run goes on where the first one ended.
"""

import argparse
import json
import random
import sys
from pathlib import Path

if __name__ == "__main__":  # launched by path: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.seed.corpus import DOMAINS, read_frozen

MODEL = Path(__file__).with_name("model")
BEGINNING = 24


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
    parser.add_argument("--out", type=Path, required=True, help="JSONL file; rows are added to one that is there")
    parser.add_argument("--tokens", type=int, default=600_000, help="in all, beginnings included (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=192, help="rows at a time (%(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder (default: the embedded seed)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.length <= BEGINNING or args.batch_size < 1 or args.tokens < 1:
        parser.error(f"--length {args.length}, --batch-size {args.batch_size}, --tokens {args.tokens}: expected more than "
                     f"{BEGINNING}, 0 and 0")
    if not args.model.is_dir():
        parser.error(f"--model: {args.model}: no such folder")
    import torch

    from modeling.load import load_model, load_tokenizer

    tokenizer, model = load_tokenizer(args.model), load_model(args.model, dtype=torch.float32).eval()
    done, rows, batch = whole_rows(args.out), -(-args.tokens // args.length), args.batch_size
    starts = beginnings(tokenizer, random.Random(args.seed), rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        for begin in range(done, rows, batch):
            ids = torch.tensor(starts[begin:begin + batch])
            torch.manual_seed((args.seed << 32) + begin)
            with torch.inference_mode():
                drawn = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
                                       top_p=1.0, max_new_tokens=args.length - BEGINNING,
                                       min_new_tokens=args.length - BEGINNING, pad_token_id=0)
            file.writelines(json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in drawn.tolist())
            file.flush()
            print(f"\r{min(begin + batch, rows)} of {rows} rows", end="", flush=True)
    print(f"\n{args.out}: {rows} rows, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
