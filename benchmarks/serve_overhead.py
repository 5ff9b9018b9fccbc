#!/usr/bin/env python
"""What the server adds to the engine: `python benchmarks/serve_overhead.py CHECKPOINT_DIR [--rounds 7] [--json FILE]`.

The same prompts, tokens and parameters, greedy: by the engine in this process, and as streams from a server (a process of its
own), in turns, so that a busy machine slows both alike. One client, then eight at a time. Overhead per token is the median over
the rounds of (server - engine) / engine, HTTP included: in CPU time of the server's process, and in wall time, which has the
client's own work in it where cores are scarce. Beside it, from the server alone and therefore without the noise between two
processes: CPU time of its event loop over that of its engine thread. Nothing is printed if a streamed answer differs from the
engine's.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path.
sys.path[0] = str(Path(__file__).resolve().parents[1])

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 512


async def through_server(url: str, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]], int]:
    """Seconds until all streams have ended, their tokens, and in how many events they came."""
    import httpx

    events = 0

    async def one(client: httpx.AsyncClient, prompt: list[int]) -> list[int]:
        nonlocal events
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "return_token_ids": True}
        found: list[int] = []
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    found += json.loads(line[6:])["choices"][0]["token_ids"]
                    events += 1
        return found

    async with httpx.AsyncClient(timeout=600) as client:
        await client.get(f"{url}/health")
        began = time.perf_counter()
        found = await asyncio.gather(*(one(client, p) for p in prompts))
        return time.perf_counter() - began, list(found), events


def prompts_of(tokenizer, count: int) -> list[list[int]]:
    rows = [json.loads(line) for line in (ROOT / "recipes" / "seed" / "prompts.jsonl").open(encoding="utf-8")]
    return [tokenizer.encode(row["prompt"])[:CONTEXT // 2] for row in rows[:: len(rows) // count][:count]]


def cpu_by_thread(process) -> dict[int, float]:
    """Seconds by thread; the main thread, which runs the event loop, has the process's id."""
    return {t.id: t.user_time + t.system_time for t in process.threads()}


def measure(engine, url: str, pid: int, prompts: list[list[int]], tokens: int, rounds: int) -> dict:
    """Medians over the rounds.

    Raises:
        ValueError: the server's tokens are not the engine's.
    """
    import psutil

    from runtime_ref.sampler import SamplingParams

    params = SamplingParams(max_tokens=tokens, ignore_eos=True, adaptive=True)
    process, rows, loop, computing, events = psutil.Process(pid), [], 0.0, 0.0, 0
    for _ in range(rounds + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        expected = engine.generate(prompts, params)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        before, threads = sum(process.cpu_times()[:2]), cpu_by_thread(process)
        seconds, found, sent = asyncio.run(through_server(url, prompts, tokens))
        events += sent
        rows.append((wall, seconds, cpu, sum(process.cpu_times()[:2]) - before))
        spent = {i: t - threads.get(i, 0.0) for i, t in cpu_by_thread(process).items()}
        loop += spent.pop(pid)
        computing += sum(spent.values())
        if found != expected:
            raise ValueError("the server's tokens are not the engine's")
    wall, served, cpu, served_cpu = zip(*rows[1:], strict=True)  # the first round fills the prefix caches of both
    per_token = 1e3 / (tokens * len(prompts))
    report = {"clients": len(prompts), "tokens": tokens * len(prompts),
              "event_loop_over_engine_cpu": round(loop / computing, 4),
              "tokens_per_event": round((rounds + 1) * tokens * len(prompts) / events, 2)}
    for name, alone, through in (("cpu", cpu, served_cpu), ("wall", wall, served)):
        ratios = [t / a - 1 for a, t in zip(alone, through, strict=True)]
        report |= {f"engine_{name}_ms_per_token": round(per_token * statistics.median(alone), 4),
                   f"server_{name}_ms_per_token": round(per_token * statistics.median(through), 4),
                   f"{name}_overhead": round(statistics.median(ratios), 4),
                   f"{name}_overhead_of_each_round": [round(r, 3) for r in ratios]}
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/serve_overhead.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        parser.error(f"{options.folder}: no such folder")

    import platform

    import torch

    from modeling.load import load_tokenizer
    from runtime_ref.engine import Engine, EngineOptions

    command = [sys.executable, str(ROOT / "runtime_ref" / "serve.py"), str(options.folder), "--port", "0", "--quiet",
               "--max-context", str(CONTEXT)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = next((li for li in server.stdout if li.startswith("serving ")), None)
        if line is None:
            raise ValueError("the server did not start")
        url = line.split(" on ")[1].split()[0]
        tokenizer = load_tokenizer(options.folder)
        engine = Engine.from_folder(options.folder, tokenizer=tokenizer, options=EngineOptions(max_context=CONTEXT))
        found = [measure(engine, url, server.pid, prompts_of(tokenizer, n), options.tokens, options.rounds) for n in (1, 8)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        server.terminate()
        server.wait(60)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    report = {"date": time.strftime("%Y-%m-%d"), "revision": revision, "machine": platform.processor() or platform.machine(),
              "cores": os.cpu_count(), "load_average": os.getloadavg()[0], "threads": torch.get_num_threads(),
              "torch": torch.__version__, "rounds": options.rounds, "results": found}
    print(json.dumps(report, indent=1))
    if options.json:
        aside = options.json.with_suffix(".tmp")
        aside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        aside.replace(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
