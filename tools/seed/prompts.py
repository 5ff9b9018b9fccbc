"""Freeze the seed's prompts: `prompts.jsonl` (held out) and `prompts.train.jsonl` (for training a drafter).

    python tools/seed/prompts.py --work DIR

Two kinds per domain, because they answer different questions. An `open` prompt is the beginning of real text, to be
continued by sampling at temperature 1 (greedy continuations of a small model loop). A `task` prompt is an instruction
with one definite answer that ends with the end-of-text token, to be decoded greedily.

One JSON object a line: `id`, `domain`, `kind`, `prompt` (the exact text to tokenize, special tokens included), and

- open: `reference` (how the document goes on), `source`, `licence`;
- task: `task` (the generator), `instruction` (the user turn without template), `answer` (without the end token);

held-out prompts only: the training side is for the model to answer.

Held-out open prompts come from the frozen held-out files, held-out code tasks from functions of held-out files. A task
whose instruction occurs in the pretraining draws or in a training document is not taken; pretraining skips, the other
way round, every instruction frozen here.
"""

import argparse
import json
import random
import sys
from pathlib import Path

if __name__ == "__main__":  # launched by path: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.seed import tasks
from tools.seed.build_tokenizer import ASSISTANT, USER
from tools.seed.corpus import DOMAINS, read_frozen
from tools.seed.packing import TASK_COUNT, draw_tasks, function_pool, load_documents

OPEN_CHARACTERS, REFERENCE_CHARACTERS = (200, 600), 400
COUNTS = {"heldout": {"open": 80, "task": 128}, "train": {"open": 300, "task": 1200}}


def open_prompts(domain: str, side: str, count: int) -> list[dict]:
    """`count` beginnings cut at line ends, spread over the frozen documents of one side."""
    documents, rng, found = read_frozen(domain, side), random.Random(f"open/{domain}/{side}"), []
    for number in range(count):
        document = documents[number % len(documents)]
        text, length = document["text"], rng.randint(*OPEN_CHARACTERS)
        begin = rng.randrange(max(1, len(text) - length - REFERENCE_CHARACTERS))
        begin = text.find("\n", begin) + 1 if begin and number >= len(documents) else 0
        end = text.find("\n", begin + length) + 1 or len(text)
        found.append({"id": f"{domain}-open-{side}-{number:03d}", "domain": domain, "kind": "open",
                      "prompt": text[begin:end], "reference": text[end : end + REFERENCE_CHARACTERS],
                      "source": document["source"], "licence": document["licence"]})
    return found


def task_prompts(domain: str, side: str, count: int, pool: list[str], known: set[str]) -> list[dict]:
    """`count` tasks whose instruction is not in `known`; taken instructions are added to `known`."""
    rng, found = random.Random(f"task/{domain}/{side}"), []
    while len(found) < count:
        task = tasks.sample_task(domain, rng, pool)
        if task.instruction not in known:
            known.add(task.instruction)
            found.append({"id": f"{domain}-task-{side}-{len(found):03d}", "domain": domain, "kind": "task",
                          "prompt": f"{USER}{task.instruction}{ASSISTANT}", "task": task.name,
                          "instruction": task.instruction, "answer": task.answer})
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="pretraining set written by corpus.py")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pretraining run")
    args = parser.parse_args(argv)
    heldout_code = [json.loads(line)["text"] for line in (args.work / "code.heldout.jsonl").open(encoding="utf-8")]
    train_pool = function_pool(load_documents(args.work, "code", args.seed))
    pools = {"heldout": sorted(set(function_pool(heldout_code)) - set(train_pool)), "train": train_pool}
    known = {task.instruction for task in draw_tasks(args.seed, train_pool, TASK_COUNT)}
    for text in load_documents(args.work, "math", args.seed):
        known.update(line for line in text.split("\n") if line.startswith("Compute "))
    for side, name in (("heldout", "prompts.jsonl"), ("train", "prompts.train.jsonl")):
        rows = []
        for domain in DOMAINS:
            rows += open_prompts(domain, side, COUNTS[side]["open"])
            rows += task_prompts(domain, side, COUNTS[side]["task"], pools[side], known)
        if side == "train":  # prompts for the model to answer: what others would have answered is not needed
            rows = [{key: row[key] for key in ("id", "domain", "kind", "prompt")} for row in rows]
        path = Path(__file__).resolve().parents[2] / "recipes/seed" / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{name}: {len(rows)} prompts, {path.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
