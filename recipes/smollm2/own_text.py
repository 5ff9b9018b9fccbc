#!/usr/bin/env python
"""Text that a model writes itself, for distillation without data of others: rows of equal length, sampled side by side.

    python recipes/smollm2/own_text.py MODEL --out runs/own.jsonl --tokens 200000 [--openings FILE ...]

Two kinds of rows, in equal numbers:

- `chat`: the chat template's words before a user's first one, then 256 tokens without an end: an instruction-tuned model
  writes the question, the answer and the next question (the idea of Magpie, arXiv 2406.08464).
- `opening`: the first tokens of a piece of the user's own text, continued by the model (only with --openings).

MODEL is what convert.py takes: the dense model has the mixture's distribution and writes faster. Rows are written batch by
batch; started again, the command goes on after the last whole one. Every batch has its own random stream.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from recipes.smollm2.convert import load_dense


def chat_prefix(tokenizer) -> str:
    """What the chat template puts before the first user's words.

    Raises:
        ValueError: a tokenizer without a chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    mark = "\u0007"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=False)
    return text[:text.index(mark)]


def openings(files: list[str], tokenizer, length: int) -> list[list[int]]:
    """The first `length` tokens of every piece of about 2,000 characters of the texts (JSONL with "text").

    Raises:
        ValueError: a file that is no such JSONL; no piece that is long enough.
    """
    found = []
    for file in files:
        for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{file}:{number}: expected a JSON object with "text"') from None
            pieces = [text[i:i + 400] for i in range(0, len(text), 2000)]
            found += [ids[:length] for ids in tokenizer(pieces, add_special_tokens=False).input_ids if len(ids) >= length]
    if not found:
        raise ValueError(f"--openings: no piece of {length} tokens in {', '.join(files)}")
    return found


@torch.no_grad()
def write_rows(model, starts_BP: torch.Tensor, length: int, temperature: float) -> torch.Tensor:
    """int64 [B, length]: the starts [B, P] and what the model samples after them, whatever end-of-text it meets."""
    new = length - starts_BP.shape[1]
    return model.generate(input_ids=starts_BP, attention_mask=torch.ones_like(starts_BP), max_new_tokens=new,
                          do_sample=True, temperature=temperature, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)


def whole_batches(path: Path, rows: int) -> int:
    """Batches of a file that is there; what a killed process left of another one is cut off."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    done = sum(line.endswith(b"\n") for line in lines) // rows
    if lines:
        with path.open("r+b") as file:
            file.truncate(sum(map(len, lines[:done * rows])))
    return done


def run(args: argparse.Namespace) -> None:
    model, tokenizer = load_dense(args.model)
    model = model.to(torch.bfloat16)
    chat = torch.tensor(tokenizer(chat_prefix(tokenizer), add_special_tokens=False).input_ids)
    texts = openings(args.openings, tokenizer, args.opening_tokens) if args.openings else []
    per_batch = args.batch_size
    done = whole_batches(args.out, per_batch)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    batches = -(-args.tokens // (args.sequence_length * per_batch))
    with args.out.open("a", encoding="utf-8") as out:
        for batch in range(done, batches):
            torch.manual_seed((args.seed << 20) + batch)
            began = time.perf_counter()
            if texts and batch % 2:
                kind, starts = "opening", torch.tensor([texts[i] for i in torch.randint(len(texts), (per_batch,))])
            else:
                kind, starts = "chat", chat.expand(per_batch, -1)
            rows = write_rows(model, starts, args.sequence_length, args.temperature)
            out.write("".join(json.dumps({"source": kind, "licence": "generated", "text": text}) + "\n"
                              for text in tokenizer.batch_decode(rows)))
            out.flush()
            speed = rows.numel() / (time.perf_counter() - began)
            print(f"batch {batch + 1}/{batches}: {kind}, {speed:,.0f} tokens/s", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="recipes/smollm2/own_text.py", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what convert.py takes")
    parser.add_argument("--out", type=Path, required=True, help="JSONL; continued if it exists")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--openings", nargs="*", default=[], help="JSONL files with text whose beginnings are continued")
    parser.add_argument("--opening-tokens", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"recipes/smollm2/own_text.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
