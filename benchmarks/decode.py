#!/usr/bin/env python
"""Decoding speed of the runtime on a CPU, as ratios within one process.

    python benchmarks/decode.py CHECKPOINT [--prompts recipes/seed/prompts.jsonl] [--json FILE]

For each domain of the prompts: transformers' `generate` on the same folder in the same dtype, and the runtime's plain,
drafting and adaptive decoding, on task prompts at temperature 0; then plain and adaptive decoding of open text at
temperature 1. Every prompt is decoded in every way before the next one, and everything is repeated, so that whatever else the
machine does hits all alike; a figure is the median over repeats of CPU seconds per answered token (wall seconds are in the JSON
too), prompts included, without the prefix cache. Answers to tasks end where the model ends them; open text runs on. With one
backend, drafting, adaptive and plain decoding must give the same tokens, or nothing is printed and the exit code is 1.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # benchmarks/ itself is no package


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="benchmarks/decode.py", description=__doc__.splitlines()[0])
    parse.add_argument("folder", metavar="CHECKPOINT", type=Path)
    parse.add_argument("--prompts", type=Path, default=ROOT / "recipes/seed/prompts.jsonl")
    parse.add_argument("--backends", default="c,torch", help="of the runtime, comma-separated (default c,torch)")
    parse.add_argument("--drafter-precision", default="bf16", help="bf16, or int8 (the c backend only; default bf16)")
    parse.add_argument("--count", type=int, default=4, help="prompts per domain and kind (default 4)")
    parse.add_argument("--tokens", type=int, default=96, help="tokens per answer (default 96)")
    parse.add_argument("--repeats", type=int, default=3, help="default 3")
    parse.add_argument("--without-transformers", action="store_true", help="leave out transformers' generate")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    return parse


class Ways:
    """Named ways to decode: function of (prompt ids, seed) -> token ids."""

    def __init__(self, options):
        from checkpoint.load import load_tokenizer
        from runtime_ref.engine.engine import Engine, EngineOptions

        self.tokens = options.tokens
        self.tokenizer = load_tokenizer(options.folder, trust_remote_code=True)
        sizes = EngineOptions(max_context=2048, prefix_cache=False)
        self.engines = {name: Engine.from_folder(options.folder, backend=name, options=sizes,
                                                 drafter_precision=options.drafter_precision)
                        for name in options.backends.split(",")}
        self.model = None
        if not options.without_transformers:
            import torch
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16, trust_remote_code=True)
            self.model.eval()

    def of(self, kind: str) -> dict:
        """The ways for prompts of a kind: "task" (temperature 0) or "open" (temperature 1)."""
        from runtime_ref.core.sampling_params import SamplingParams

        def ours(engine, **changes):
            def decode(ids, seed):
                before = engine.stats()
                temperature = 0.0 if kind == "task" else 1.0
                params = SamplingParams(max_tokens=self.tokens, ignore_eos=kind == "open", temperature=temperature, seed=seed,
                                        **changes)
                found = engine.generate([ids], params)[0]
                after = engine.stats()
                self.rounds = after["rounds"] - before["rounds"], after["accepted"] - before["accepted"]
                return found
            return decode

        ways = {}
        for name, engine in self.engines.items():
            ways[f"{name} plain"] = ours(engine, speculate=False)
            if engine.drafter is not None:
                if kind == "task":
                    ways[f"{name} drafting"] = ours(engine)
                ways[f"{name} adaptive"] = ours(engine, adaptive=True)
        if kind == "task" and self.model is not None:
            ways["transformers"] = self._generate
        return ways

    def _generate(self, ids, seed):
        import torch

        with torch.inference_mode():
            inputs = torch.tensor([ids])
            out = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, use_cache=True,
                                      max_new_tokens=self.tokens, pad_token_id=0)
        return out[0, len(ids):].tolist()


def measure(ways: dict, owner: Ways, prompts: list[list[int]], repeats: int) -> dict:
    """CPU and wall seconds per token by way, one figure per repeat; rounds and accepted drafts; whether tokens agree."""
    found = {name: {"cpu": [], "wall": [], "rounds": 0, "accepted": 0} for name in ways}
    agree = True
    for repeat in range(repeats + 1):  # the first warms up
        answered = dict.fromkeys(found, 0)
        for name in found:
            found[name]["cpu"].append(0.0)
            found[name]["wall"].append(0.0)
        for seed, ids in enumerate(prompts):
            answers = {}
            for name, decode in ways.items():
                owner.rounds = 0, 0
                wall, cpu = time.perf_counter(), time.process_time()
                answers[name] = decode(ids, seed)
                found[name]["cpu"][-1] += time.process_time() - cpu
                found[name]["wall"][-1] += time.perf_counter() - wall
                answered[name] += len(answers[name])
                if repeat == repeats:
                    found[name]["rounds"] += owner.rounds[0]
                    found[name]["accepted"] += owner.rounds[1]
            for name, answer in answers.items():
                agree = agree and answer == answers.get(f"{name.split()[0]} plain", answer)
        for name, numbers in found.items():
            numbers["cpu"][-1] /= answered[name]
            numbers["wall"][-1] /= answered[name]
    for numbers in found.values():
        numbers["cpu"], numbers["wall"] = numbers["cpu"][1:], numbers["wall"][1:]
        numbers["milliseconds per token"] = 1e3 * statistics.median(numbers["cpu"])
        if numbers["rounds"]:
            numbers["acceptance length"] = 1 + numbers["accepted"] / numbers["rounds"]
    return {"ways": found, "tokens agree": agree}


def report(results: dict) -> str:
    lines = []
    for kind, title in (("task", "task prompts, T=0"), ("open", "open text, T=1")):
        lines += ["", title, f"{'':8}{'way':20}{'CPU ms/token':>14}{'x its plain':>13}{'x transformers':>16}{'acceptance':>12}"]
        for domain, result in results[kind].items():
            ways = result["ways"]
            for name, numbers in ways.items():
                own, plain = numbers["milliseconds per token"], ways.get(f"{name.split()[0]} plain")
                ratios = [f"{reference['milliseconds per token'] / own:.2f}" if reference else ""
                          for reference in (plain, ways.get("transformers"))]
                length = numbers.get("acceptance length")
                accepted = f"{length:.2f}" if length else ""
                lines.append(f"{domain:8}{name:20}{own:14.3f}{ratios[0]:>13}{ratios[1]:>16}{accepted:>12}")
    return "\n".join(lines)


def environment() -> dict:
    import torch
    import transformers

    from storage.revision import git_revision

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor()]
    return {"date": time.strftime("%Y-%m-%d"), "revision": git_revision(), "processor": model[0],
            "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
            "load average": os.getloadavg()[0]}


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    try:
        if min(options.count, options.tokens, options.repeats) < 1:
            raise ValueError("--count, --tokens and --repeats must be 1 or more")
        if not options.prompts.is_file():
            raise ValueError(f"--prompts {options.prompts}: no such file")
        rows = [json.loads(line) for line in options.prompts.read_text(encoding="utf-8").splitlines() if line]
        ways = Ways(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results: dict = {"environment": environment(), "tokens": options.tokens, "prompts per domain": options.count}
    for kind in ("task", "open"):
        results[kind] = {}
        for domain in dict.fromkeys(row["domain"] for row in rows):
            texts = [row["prompt"] for row in rows if (row["domain"], row["kind"]) == (domain, kind)][:options.count]
            prompts = [ways.tokenizer(text)["input_ids"] for text in texts]
            if prompts:
                results[kind][domain] = measure(ways.of(kind), ways, prompts, options.repeats)
                if not results[kind][domain]["tokens agree"]:
                    print(f"{kind} {domain}: drafts change tokens: no speed is printed", file=sys.stderr)
                    return 1
    results["measured costs of rounds"] = {name: engine.adaptive.costs for name, engine in ways.engines.items()
                                           if engine.adaptive is not None}
    if options.json:
        aside = options.json.with_name(options.json.name + ".tmp")
        aside.write_text(json.dumps(results, indent=2), encoding="utf-8")
        aside.replace(options.json)
    print(json.dumps(results["environment"]), report(results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
