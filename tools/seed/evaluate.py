"""Measure a model folder on the seed's held-out text and prompts.

    python tools/seed/evaluate.py recipes/seed/model --json docs/results/seed.json

Three figures per domain: bits per byte of the frozen held-out documents, the share of held-out tasks whose greedy
answer is right to the byte, and the share of greedy answers that end by themselves (an end-of-text token before
`MAX_NEW_TOKENS`). A model that loops fails the last one, whatever its loss.

Bits per byte rather than loss per token, because it can be compared between tokenizers. Documents are scored in
windows of 512 tokens that advance by 256, so that all but a document's beginning is predicted from at least 256
tokens. Prompts are decoded in batches of equal prompt length: no padding, nothing to mask.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # launched by path: import from the root, not from this folder
    sys.path[0] = str(ROOT)

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM
from tools.seed.build_tokenizer import END
from tools.seed.corpus import DOMAINS, read_frozen
from tools.seed.packing import read_prompts

WINDOW, STRIDE, ROWS = 512, 256, 16
MAX_NEW_TOKENS = 160


def score_windows(length: int) -> list[tuple[int, int, int]]:
    """(begin, end, first scored) of windows over `length` tokens; every token after the first is scored once."""
    windows, done = [], 1
    while done < length:
        end = min(length, max(WINDOW, done + STRIDE))
        begin = max(0, end - WINDOW)
        windows.append((begin, end, done))
        done = end
    return windows


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Bits of information per UTF-8 byte that `model` needs for `texts`, each text preceded by the end-of-text token."""
    end = tokenizer.token_to_id(END)
    by_length: dict[int, list[tuple[torch.Tensor, int]]] = defaultdict(list)
    for text in texts:
        ids = torch.tensor([end, *tokenizer.encode(text).ids])
        for begin, stop, first in score_windows(len(ids)):
            by_length[stop - begin].append((ids[begin:stop], first - begin))
    nats = 0.0
    for group in by_length.values():
        for start in range(0, len(group), ROWS):
            batch = group[start : start + ROWS]
            tokens = torch.stack([row for row, _ in batch])
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
            losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(batch), -1)
            nats += sum(float(row[first - 1 :].double().sum()) for row, (_, first) in zip(losses, batch, strict=True))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.no_grad()
def greedy(model: torch.nn.Module, tokenizer: Tokenizer, prompts: list[str]) -> list[tuple[str, bool]]:
    """Greedy continuation of every prompt: (text before the end token, whether the end token came)."""
    end = tokenizer.token_to_id(END)
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(encoded):
        by_length[len(ids)].append(index)
    results: list[tuple[str, bool]] = [("", False)] * len(prompts)
    for length, members in by_length.items():
        tokens = torch.tensor([encoded[i] for i in members])
        out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                             max_new_tokens=MAX_NEW_TOKENS, eos_token_id=end, pad_token_id=end)
        for index, row in zip(members, out[:, length:].tolist(), strict=True):
            answer = row[: row.index(end)] if end in row else row
            results[index] = (tokenizer.decode(answer, skip_special_tokens=False), end in row)
    return results


def task_results(model: torch.nn.Module, tokenizer: Tokenizer, domain: str) -> dict:
    """Accuracy and ended share of the held-out tasks of `domain`, whole and per generator, with the first mistakes."""
    prompts = [p for p in read_prompts() if p["domain"] == domain and p["kind"] == "task"]
    answers = greedy(model, tokenizer, [p["prompt"] for p in prompts])
    right = [text == p["answer"] for p, (text, _) in zip(prompts, answers, strict=True)]
    kinds: dict[str, list[bool]] = defaultdict(list)
    for prompt, good in zip(prompts, right, strict=True):
        kinds[prompt["task"]].append(good)
    return {
        "tasks": len(prompts), "right": sum(right) / len(right), "ended": sum(e for _, e in answers) / len(answers),
        "right_by_task": {k: round(sum(v) / len(v), 4) for k, v in sorted(kinds.items())},
        "mistakes": [{"id": p["id"], "answer": p["answer"], "given": text}
                     for p, (text, _), good in zip(prompts, answers, right, strict=True) if not good][:3],
    }


def describe_machine() -> dict:
    """Hardware, versions and revision that a published figure needs."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"date": datetime.now(UTC).date().isoformat(), "cpu": cpu, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "revision": revision.stdout.strip()}


def evaluate(model: torch.nn.Module, tokenizer: Tokenizer) -> dict:
    result = {}
    for domain in DOMAINS:
        texts = [d["text"] for d in read_frozen(domain, "heldout")]
        result[domain] = {"bits_per_byte": round(bits_per_byte(model, tokenizer, texts), 4),
                          **task_results(model, tokenizer, domain)}
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a Hugging Face folder with tokenizer.json")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if not (args.model / "tokenizer.json").exists():
        print(f"{args.model}: no tokenizer.json, expected a Hugging Face model folder", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    model = MiMoV2ForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    result = evaluate(model, Tokenizer.from_file(str(args.model / "tokenizer.json")))
    for domain, row in result.items():
        print(f"{domain:6} {row['bits_per_byte']:.3f} bits/byte   right {row['right']:7.2%}   ended {row['ended']:7.2%}"
              f"   {row['right_by_task']}")
    if args.json:
        report = {"domains": result, "machine": describe_machine(), "seconds": round(time.monotonic() - began)}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
