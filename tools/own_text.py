#!/usr/bin/env python
"""Text that a model writes itself, for training it on its own distribution: without data of others, or beside them.

    python tools/own_text.py MODEL --out runs/own.jsonl --tokens 4000000 [--openings FILE ...]

MODEL is a folder that the reference runtime reads; plainly rounded is good enough to begin with:

    python export/to_hf.py RECIPE --from MODEL --out runs/rounded

It writes rows of equal length at temperature 1, past any
end of text, in two kinds that take turns where both can be had:

- `chat`: the chat template's words before a user's first one. An instruction-tuned model then writes the question, the answer
  and the next question (the idea of Magpie, arXiv 2406.08464).
- `opening`: a few tokens from anywhere in the documents of --openings (JSONL with "text"), file after file, continued.

A row depends on its number and the seed alone. Rows that are there are kept: a second run goes on where the first one ended.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # launched by path: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def chat_prefix(tokenizer) -> str:
    """What the chat template puts before the first user's words; empty without a template."""
    if not tokenizer.chat_template:
        return ""
    mark = "\u0007"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=False)
    return text[:text.index(mark)]


def documents(files: list[Path], tokenizer, length: int) -> list[list[list[int]]]:
    """Token ids of each file's documents that have more than `length` of them.

    Raises:
        ValueError: a file that is no JSONL with "text", or without such a document.
        OSError: a file that cannot be read.
    """
    found = []
    for file in files:
        texts = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{file}:{number}: expected a JSON object with "text"') from None
        found.append([ids for text in texts if len(ids := tokenizer.encode(text, add_special_tokens=False)) > length])
        if not found[-1]:
            raise ValueError(f"{file}: no text of more than {length} tokens")
    return found


def starts(count: int, chat: list[int], texts: list[list[list[int]]], length: int, seed: int) -> list[tuple[str, list[int]]]:
    """(kind, token ids) of the first `count` rows' beginnings."""
    kinds, rng = ["chat"] * bool(chat) + ["opening"] * bool(texts), random.Random(seed)
    found = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        if kind == "opening":
            ids = rng.choice(texts[i // len(kinds) % len(texts)])
            first = rng.randrange(len(ids) - length)
            found.append((kind, ids[first:first + length]))
        else:
            found.append((kind, chat))
    return found


def whole_rows(path: Path) -> int:
    """Rows of a file that is there; half a row, left by a killed process, is cut off."""
    if not path.is_file():
        return 0
    text = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(text.rfind(b"\n") + 1)
    return text.count(b"\n")


def write(args: argparse.Namespace) -> None:
    """Adds the rows that are missing to `args.out`.

    Raises:
        ValueError, OSError: what cannot be read, or begins no row.
    """
    from checkpoint.load import load_tokenizer
    from runtime_ref.core.sampling_params import SamplingParams
    from runtime_ref.engine.engine import Engine, EngineOptions

    tokenizer, rows = load_tokenizer(args.model), -(-args.tokens // args.length)
    chat = tokenizer.encode(chat_prefix(tokenizer), add_special_tokens=False)
    texts = documents(args.openings, tokenizer, args.opening_tokens)
    if not chat and not texts:
        raise ValueError(f"{args.model}: no chat template, so rows need --openings")
    if args.length <= max(len(chat), args.opening_tokens if texts else 0):
        raise ValueError(f"--length {args.length}: a row's beginning is as long")
    engine = Engine.from_folder(args.model, drafter=False, options=EngineOptions(
        max_running=args.at_once, max_context=args.length, prefix_cache=False))
    begin = starts(rows, chat, texts, args.opening_tokens, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done, began = whole_rows(args.out), time.monotonic()
    with args.out.open("a", encoding="utf-8") as file:
        for first in range(done, rows, args.at_once):
            here = range(first, min(first + args.at_once, rows))
            params = [SamplingParams(max_tokens=args.length - len(begin[i][1]), temperature=1.0, ignore_eos=True,
                                     seed=(args.seed << 32) + i) for i in here]
            drawn = engine.generate([begin[i][1] for i in here], params)
            file.writelines(json.dumps({"text": tokenizer.decode(begin[i][1] + ids), "source": begin[i][0],
                                        "licence": "generated"}) + "\n" for i, ids in zip(here, drawn, strict=True))
            file.flush()
            rate = (here.stop - done) * args.length / (time.monotonic() - began)
            print(f"{here.stop} of {rows} rows, {rate:,.0f} tokens/s", flush=True)
    print(f"{args.out}: {rows} rows, {args.out.stat().st_size / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/own_text.py", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder that the runtime reads")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file; rows are added to one that is there")
    parser.add_argument("--tokens", type=int, default=600_000, help="in all, beginnings included (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (%(default)s)")
    parser.add_argument("--openings", type=Path, nargs="*", default=[], metavar="FILE", help="JSONL with texts to begin like")
    parser.add_argument("--opening-tokens", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--at-once", type=int, default=128, help="rows written side by side (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        for name in ("tokens", "length", "opening_tokens", "at_once"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 1 or more")
        write(args)
    except (ValueError, OSError) as error:
        print(f"tools/own_text.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
