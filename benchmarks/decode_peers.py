#!/usr/bin/env python
"""Greedy decoding on a CPU, one sequence at a time or a batch: the runtime beside other engines, one process each, as ratios.

    python benchmarks/decode_peers.py --prompts FILE.jsonl [--batch 1,8] [--json FILE] \\
        fp4=runtime:runs/smollm2/export/model \\
        drafts=runtime-drafts:runs/smollm2/export/model \\
        bf16=transformers:runs/smollm2-moe \\
        vllm=vllm:runs/smollm2-moe@.venv-clients/bin/python \\
        llama.cpp=llama.cpp:model.gguf@/path/to/python

Each argument is NAME=ENGINE:MODEL[@PYTHON]: an engine (runtime, runtime-drafts, runtime-torch, transformers, vllm, llama.cpp),
the folder or file that it loads, and the interpreter of the environment that has it (this one unless given). Every prompt goes
to every engine as the same token ids (the first MODEL's tokenizer and chat template) before the next prompt does, for a fixed
number of tokens, and all is repeated: whatever else the machine does hits all alike. Figures are medians over prompts and
repeats, the prompt's pass included: tokens per second of wall time, and processor time per token, which knows little of
other jobs; memory is the process's own after the last answer. --batch 1,8 decodes 1 prompt, then 8 together (consecutive ones;
a file that has fewer gives some again): tokens per second, and processor time per token, are then over all of the batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)


def runtime(model: str, batch: int, *, backend: str = "c", drafts: bool = False):
    from runtime_ref.core.sampling_params import SamplingParams
    from runtime_ref.engine.engine import Engine, EngineOptions

    engine = Engine.from_folder(model, backend=backend, drafter=drafts,
                                options=EngineOptions(max_running=max(8, batch), rows=max(256, batch), max_context=4096,
                                                      prefix_cache=False))

    def decode(rows: list[list[int]], count: int) -> list[list[int]]:
        return engine.generate(rows, SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, speculate=drafts))
    return decode


def transformers(model: str, batch: int):
    import torch
    from transformers import AutoModelForCausalLM

    held = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def decode(rows: list[list[int]], count: int) -> list[list[int]]:
        width = max(map(len, rows))
        given = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        there = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            found = held.generate(given, attention_mask=there, max_new_tokens=count, min_new_tokens=count,
                                  do_sample=False, eos_token_id=None, pad_token_id=0)
        return found[:, width:].tolist()
    return decode


def vllm(model: str, batch: int):
    from vllm import LLM, SamplingParams

    engine = LLM(model=model, dtype="bfloat16", max_model_len=4096, enable_prefix_caching=False, max_num_seqs=max(8, batch),
                 trust_remote_code=True)

    def decode(rows: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        found = engine.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]
    return decode


def llama_cpp(model: str, batch: int):
    from llama_cpp import Llama

    engine = Llama(model, n_ctx=4096, n_threads=int(os.environ["OMP_NUM_THREADS"]), verbose=False)

    def decode(rows: list[list[int]], count: int) -> list[list[int]]:
        engine.reset()
        return [list(itertools.islice(engine.generate(rows[0], temp=0.0, reset=False), count))]
    return decode


ENGINES = {"runtime": runtime, "runtime-drafts": lambda *a: runtime(*a, drafts=True),
           "runtime-torch": lambda *a: runtime(*a, backend="torch"), "transformers": transformers, "vllm": vllm,
           "llama.cpp": llama_cpp}
ALONE = {"llama.cpp"}  # its Python binding decodes one sequence at a time


def used() -> tuple[int, float]:
    """(resident bytes, processor seconds) of this process and its children (vLLM's engine is one)."""
    import psutil

    me = psutil.Process()
    own = [me, *me.children(recursive=True)]
    return sum(p.memory_info().rss for p in own), sum(p.cpu_times().user + p.cpu_times().system for p in own)


def serve(kind: str, model: str, batch: str) -> None:
    """Answers requests of standard input, a line of JSON each, until it closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints is none of the answers
    decode = ENGINES[kind](model, int(batch))
    decode([[1, 2, 3]], 4)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        (_, before), began = used(), time.perf_counter()
        found = decode(ask["ids"], ask["tokens"])
        taken, (resident, after) = time.perf_counter() - began, used()
        said = {"ids": found, "seconds": taken, "cpu_seconds": after - before, "resident": resident}
        print(json.dumps(said), file=answers, flush=True)


class Way:
    """One engine in a process of its own.

    Raises:
        ValueError: not NAME=ENGINE:MODEL[@PYTHON]; an engine that is not one of ENGINES; a model that is not there.
        RuntimeError: the process ended.
    """

    def __init__(self, text: str, threads: int, batch: int = 1):
        self.name, _, rest = text.partition("=")
        self.kind, _, rest = rest.partition(":")
        self.model, _, python = rest.partition("@")
        if self.kind not in ENGINES:
            raise ValueError(f"{text!r}: expected NAME=ENGINE:MODEL[@PYTHON] with an engine of {', '.join(ENGINES)}")
        if not Path(self.model).exists():
            raise ValueError(f"{self.name}: {self.model}: no such file or folder")
        self.command = [python or sys.executable, str(Path(__file__).resolve()), "--serve", self.kind, self.model, str(batch)]
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.resident = 0

    def start(self, log) -> None:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                                        env=self.environment)
        self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: its process ended with {self.process.wait()} (--log has what it printed)")
        return json.loads(line)

    def decode(self, rows: list[list[int]], tokens: int) -> tuple[list[list[int]], float, float]:
        """(tokens of each, wall seconds, processor seconds)."""
        self.process.stdin.write(json.dumps({"ids": rows, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        said = self._read()
        self.resident = said["resident"]
        return said["ids"], said["seconds"], said["cpu_seconds"]


def prompts(files: list[Path], folder: str, count: int) -> dict[str, list[list[int]]]:
    """{file: token ids of its first prompts}: rows with "turns", "prompt" or "question", as chats if there is a template.

    Raises:
        ValueError: a row without any of these.
    """
    from checkpoint.load import load_tokenizer

    tokenizer = load_tokenizer(Path(folder))
    found = {}
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
        texts = [r["turns"][0] if "turns" in r else r.get("prompt", r.get("question")) for r in rows]
        if None in texts:
            raise ValueError(f'{file}:{texts.index(None) + 1}: expected "turns", "prompt" or "question"')
        found[file.name.split(".")[0]] = [
            tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True, return_dict=False)
            if tokenizer.chat_template else tokenizer.encode(t) for t in texts]
    return found


def batched(asked: dict[str, list[list[int]]], sizes: list[int], count: int) -> dict[str, list[list[list[int]]]]:
    """{"file" or "file xN": `count` batches of N consecutive prompts, from the beginning again after the last}."""
    return {domain if n == 1 else f"{domain} x{n}": [[rows[(i * n + j) % len(rows)] for j in range(n)] for i in range(count)]
            for domain, rows in asked.items() for n in sizes}


def sizes(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive numbers, as in 1,8")
    return [int(n) for n in text.split(",")]


def measure(ways: list[Way], asked: dict[str, list[list[list[int]]]], tokens: int, repeats: int) -> dict:
    """{domain: {name: {"tokens_per_second", "cpu_ms_per_token", "equal"}}}; equal: answers that are the first way's."""
    table = {}
    for domain, batches in asked.items():
        able = [w for w in ways if len(batches[0]) == 1 or w.kind not in ALONE]
        rates: dict[str, list[float]] = {w.name: [] for w in able}
        costs: dict[str, list[float]] = {w.name: [] for w in able}
        equal = dict.fromkeys(rates, 0)
        for repeat in range(repeats):
            for rows in batches:
                first = None
                for way in able:
                    answers, seconds, processor = way.decode(rows, tokens)
                    first, count = first or answers, sum(map(len, answers))
                    rates[way.name].append(count / seconds)
                    costs[way.name].append(1e3 * processor / count)
                    equal[way.name] += (repeat == 0) * sum(map(list.__eq__, answers, first))
        table[domain] = {n: {"tokens_per_second": statistics.median(r), "cpu_ms_per_token": statistics.median(costs[n]),
                             "equal": equal[n], "of": len(batches) * len(batches[0])} for n, r in rates.items()}
        print_table(domain, table[domain])
        for way in (w for w in ways if w not in able):
            print(f"{domain:14} {way.name:14} not run: {way.kind} decodes one sequence at a time", flush=True)
    return table


def print_table(domain: str, rows: dict) -> None:
    first = next(iter(rows.values()))["tokens_per_second"]
    for name, row in rows.items():
        print(f"{domain:14} {name:14} {row['tokens_per_second']:8.1f} tokens/s  {row['tokens_per_second'] / first:5.2f}x  "
              f"{row['cpu_ms_per_token']:7.2f} ms of CPU a token  "
              f"answers equal to the first's: {row['equal']} of {row['of']}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="benchmarks/decode_peers.py", description=__doc__.splitlines()[0])
    parse.add_argument("ways", nargs="+", metavar="NAME=ENGINE:MODEL[@PYTHON]")
    parse.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL, a row of the table each")
    parse.add_argument("--count", type=int, default=4, help="prompts, or batches, of each file (default 4)")
    parse.add_argument("--batch", type=sizes, default=[1], metavar="N[,N]", help="prompts decoded together (default 1)")
    parse.add_argument("--tokens", type=int, default=96, help="per answer (default 96)")
    parse.add_argument("--repeats", type=int, default=3, help="default 3")
    parse.add_argument("--threads", type=int, default=1, help="of each engine (default 1)")
    parse.add_argument("--log", type=Path, default=Path(os.devnull), help="what the engines print")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    options = parse.parse_args(argv)
    from training.report import environment

    ways: list[Way] = []
    try:
        ways = [Way(text, options.threads, max(options.batch)) for text in options.ways]
        given = prompts(options.prompts, ways[0].model, options.count * max(options.batch))
        with options.log.open("a") as log:
            for way in ways:
                way.start(log)
            table = measure(ways, batched(given, options.batch, options.count), options.tokens, options.repeats)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"benchmarks/decode_peers.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    finally:
        for way in ways:
            if hasattr(way, "process"):
                way.process.stdin.close()
                way.process.wait(60)
    for way in ways:
        print(f"{way.name:14} {way.resident / 2**20:,.0f} MiB resident")
    if options.json:
        options.json.write_text(json.dumps({
            "ways": {w.name: {"engine": w.kind, "model": Path(w.model).name, "resident_bytes": w.resident} for w in ways},
            "table": table, "tokens": options.tokens, "count": options.count, "repeats": options.repeats,
            "threads": options.threads, "environment": environment()}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(*sys.argv[2:5]))
    sys.exit(main())
