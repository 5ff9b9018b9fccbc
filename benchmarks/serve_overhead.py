#!/usr/bin/env python
"""What the server adds to the engine.

    python benchmarks/serve_overhead.py CHECKPOINT_DIR [--rounds 7] [--clients 1,8,64] [--json FILE]

The same prompts, tokens and parameters, greedy and without a drafter (the cheapest tokens, so the largest share of
overhead): by an engine in the main thread, and as streams from a server that runs in threads of this process on an engine
of its own, in turns. One client, then more at a time; the clients are a process of their own. Overhead per token is the
median over the rounds of (server - engine) / engine. CPU time of the server is that of its engine's thread and of its event
loop, HTTP included, read from the threads' own clocks; wall time has the client's work in it where cores are scarce. Nothing
is printed if a streamed answer differs from the engine's.

In one process, because two processes with the same engine differ by more than what is measured here: by up to 25 % from start
to start on a shared machine. With a drafter, adaptive drafting would decide for itself in each of the engines.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path.
sys.path[0] = str(Path(__file__).resolve().parents[1])

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 512


def through_server(url: str, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]], int]:
    """Seconds until all streams have ended, their tokens, and in how many events they came; runs in the clients' process."""
    return asyncio.run(_streams(url, prompts, tokens))


async def _streams(url: str, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]], int]:
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
        began = time.perf_counter()
        found = await asyncio.gather(*(one(client, p) for p in prompts))
        return time.perf_counter() - began, list(found), events


def prompts_of(tokenizer, count: int) -> list[list[int]]:
    rows = [json.loads(line) for line in (ROOT / "recipes" / "seed" / "prompts.jsonl").open(encoding="utf-8")]
    return [tokenizer.encode(row["prompt"])[:CONTEXT // 2] for row in rows[:: len(rows) // count][:count]]


@contextlib.contextmanager
def serving(engine, tokenizer, folder: Path):
    """(url, clocks) of a server in a thread: CPU seconds so far of its engine's thread and of its event loop."""
    import socket

    import uvicorn

    from runtime_ref.server.app import application
    from runtime_ref.server.connections import limited
    from runtime_ref.server.engine_thread import EngineWorker
    from runtime_ref.server.handlers import Api, Settings
    from runtime_ref.server.request_workers import RequestWorkers

    worker = EngineWorker(engine)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    preparing = RequestWorkers(folder)
    app = application(Api(worker, tokenizer, Settings(("model",)), preparing))
    server = uvicorn.Server(uvicorn.Config(app, http=limited(512), log_level="error"))
    loop = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    loop.start()
    while not server.started:
        time.sleep(0.01)
    computing = next(t for t in threading.enumerate() if t.name == "engine")

    def clocks() -> tuple[float, float]:
        return tuple(time.clock_gettime(time.pthread_getcpuclockid(t.ident)) for t in (computing, loop))

    yield f"http://127.0.0.1:{listening.getsockname()[1]}", clocks
    server.should_exit = True
    loop.join(30)
    preparing.close()


def measure(engine, served: tuple, clients: ProcessPoolExecutor, prompts: list[list[int]], tokens: int, rounds: int) -> dict:
    """Medians over the rounds.

    Raises:
        ValueError: the server's tokens are not the engine's.
    """
    from runtime_ref.core.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    (url, clocks), rows, events = served, [], 0
    for _ in range(rounds + 1):
        wall, cpu = time.perf_counter(), time.thread_time()
        expected = engine.generate(prompts, params)
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        before = clocks()
        seconds, found, sent = clients.submit(through_server, url, prompts, tokens).result()
        computing, loop = (b - a for a, b in zip(before, clocks(), strict=True))
        rows.append((wall, seconds, cpu, computing + loop, loop / computing))
        events += sent
        if found != expected:
            raise ValueError("the server's tokens are not the engine's")
    wall, through, cpu, served_cpu, shares = zip(*rows[1:], strict=True)  # the first round fills the prefix caches of both
    per_token = 1e3 / (tokens * len(prompts))
    report = {"clients": len(prompts), "tokens": tokens * len(prompts),
              "event_loop_over_engine_thread_cpu": round(statistics.median(shares), 4),
              "tokens_per_event": round((rounds + 1) * tokens * len(prompts) / events, 2)}
    for name, alone, other in (("cpu", cpu, served_cpu), ("wall", wall, through)):
        ratios = [t / a - 1 for a, t in zip(alone, other, strict=True)]
        report |= {f"engine_{name}_ms_per_token": round(per_token * statistics.median(alone), 4),
                   f"server_{name}_ms_per_token": round(per_token * statistics.median(other), 4),
                   f"{name}_overhead": round(statistics.median(ratios), 4),
                   f"{name}_overhead_of_each_round": [round(r, 3) for r in ratios]}
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/serve_overhead.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clients", default="1,8", help="numbers of clients, comma-separated (default 1,8)")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if not all(n.isdecimal() and int(n) for n in options.clients.split(",")):
        parser.error(f"--clients {options.clients}: expected whole numbers from 1 on, separated by commas")
    if not options.folder.is_dir():
        parser.error(f"{options.folder}: no such folder")

    import platform

    import torch

    from checkpoint.load import load_tokenizer
    from runtime_ref.engine.engine import Engine, EngineOptions
    from storage.revision import git_revision

    try:
        tokenizer = load_tokenizer(options.folder)
        alone, other = (Engine.from_folder(options.folder, drafter=False, tokenizer=tokenizer,
                                           options=EngineOptions(max_context=CONTEXT)) for _ in range(2))
        with serving(other, tokenizer, options.folder) as served, ProcessPoolExecutor(1, get_context("spawn")) as clients:
            found = [measure(alone, served, clients, prompts_of(tokenizer, n), options.tokens, options.rounds)
                     for n in map(int, options.clients.split(","))]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = {"date": time.strftime("%Y-%m-%d"), "revision": git_revision(),
              "machine": platform.processor() or platform.machine(),
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
