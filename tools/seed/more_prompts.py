"""Write many training prompts for a drafter, from the frozen training text alone.

    python tools/seed/more_prompts.py --out runs/prompts.jsonl --tasks 4000 --open 900

The prompts of `prompts.train.jsonl` keep a demo short; a drafter that is trained for an hour wants more of them. Tasks
are drawn as there (functions of the frozen training files and synthetic ones), open prompts begin anywhere in a
training document. An instruction that is held out (`prompts.jsonl`) is never drawn. Deterministic in `--seed`.
"""

import argparse
import json
import random
import sys
from pathlib import Path

if __name__ == "__main__":  # launched by path: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from storage.files import write_text
from tools.seed import tasks
from tools.seed.build_tokenizer import ASSISTANT, USER
from tools.seed.corpus import DOMAINS, read_frozen
from tools.seed.packing import function_pool, read_prompts
from tools.seed.prompts import OPEN_CHARACTERS


def open_prompts(domain: str, rng: random.Random, count: int) -> list[str]:
    """`count` stretches of training text that begin and end at line ends, drawn in proportion to document length."""
    texts = [document["text"] for document in read_frozen(domain, "train")]
    found = []
    while len(found) < count:
        text = rng.choices(texts, weights=[len(t) for t in texts])[0]
        begin = text.find("\n", rng.randrange(len(text))) + 1
        end = text.find("\n", begin + rng.randint(*OPEN_CHARACTERS)) + 1
        if begin and end:
            found.append(text[begin:end])
    return found


def task_prompts(domain: str, rng: random.Random, count: int, pool: list[str], known: set[str]) -> list[str]:
    """`count` rendered tasks whose instruction is not in `known`; taken instructions are added to `known`."""
    found = []
    while len(found) < count:
        instruction = tasks.sample_task(domain, rng, pool).instruction
        if instruction not in known:
            known.add(instruction)
            found.append(f"{USER}{instruction}{ASSISTANT}")
    return found


def more_prompts(task_count: int, open_count: int, seed: int) -> list[dict]:
    """Rows of `id`, `domain`, `kind`, `prompt`; the counts are per domain."""
    known = {p["instruction"] for p in read_prompts() if p["kind"] == "task"}
    pool = function_pool([document["text"] for document in read_frozen("code", "train")])
    rows = []
    for domain in DOMAINS:
        rng = random.Random(f"more/{domain}/{seed}")
        for kind, prompts in (("open", open_prompts(domain, rng, open_count)),
                              ("task", task_prompts(domain, rng, task_count, pool, known))):
            rows += [{"id": f"{domain}-{kind}-more-{i:05d}", "domain": domain, "kind": kind, "prompt": prompt}
                     for i, prompt in enumerate(prompts)]
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--tasks", type=int, default=4000, help="tasks per domain")
    parser.add_argument("--open", type=int, default=900, help="open prompts per domain")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = more_prompts(args.tasks, args.open, args.seed)
    write_text(args.out, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.out}: {len(rows)} prompts, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
