#!/usr/bin/env python
"""Serves an exported checkpoint over the OpenAI API, with a page to chat at /.

    python runtime_ref/serve.py CHECKPOINT_DIR [--port 8000]
    torchrun --nproc-per-node 8 runtime_ref/serve.py CHECKPOINT_DIR …

Listens on loopback unless told otherwise. SIGTERM and Ctrl-C finish the answers that are under way, up to --drain-seconds.
Exit code 0: ended on request; 1: the engine broke; 2: a mistake in arguments or folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import warnings
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path, where runtime_ref/'s files would shadow real packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.own_lines import own_lines_only
from storage.reading import read_json, read_text
from storage.terminal import printable

NAME = "runtime_ref/serve.py"
KEY_VARIABLE = "FP4_DFLASH_API_KEY"
LAUNCHES = ("auto", "persistent", "graph", "ops")
RECIPE_BYTES = 1 << 20  # of a resolved.yaml that is looked at for a name
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="CHECKPOINT_DIR", type=Path)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one, which is printed (%(default)s)")
    parser.add_argument("--served-name", metavar="NAME", action="append",
                        help="the model's name in the API; again: another name for it (default: the recipe's, or the folder's)")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--api-key", metavar="KEY", help=f"wanted from clients (default: ${KEY_VARIABLE}, else none); other "
                      "users of this machine can read a command's arguments")
    keys.add_argument("--api-key-file", metavar="FILE", type=Path, help="the same, in a file")
    parser.add_argument("--allowed-host", metavar="NAME", action="append", default=[],
                        help="a name under which the server is reached; '*' is any (default: addresses and localhost)")
    parser.add_argument("--allow-origin", metavar="ORIGIN", action="append", default=[],
                        help="web pages that may ask (scheme://name[:port]); '*' is all of them")
    parser.add_argument("--max-context", type=int, default=4096, metavar="N", help="tokens of prompt and answer (%(default)s)")
    parser.add_argument("--max-running", type=int, default=8, metavar="N", help="answers decoded side by side (%(default)s)")
    parser.add_argument("--max-requests", type=int, default=64, metavar="N",
                        help="answers running or waiting; more are told to come back, 429 (%(default)s)")
    parser.add_argument("--max-body-mib", type=float, default=4.0, metavar="MIB", help="largest body (%(default)s)")
    parser.add_argument("--max-bodies-mib", type=float, default=64.0, metavar="MIB",
                        help="all bodies that are arriving together (%(default)s)")
    parser.add_argument("--max-connections", type=int, default=512, metavar="N", help="(%(default)s)")
    parser.add_argument("--request-workers", type=int, default=2, metavar="N",
                        help="processes that parse requests and run the chat template (%(default)s)")
    parser.add_argument("--ignore-unknown-fields", action="store_true",
                        help="answer requests that have fields which nobody knows, instead of refusing them")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of activations (%(default)s)")
    parser.add_argument("--backend", default="auto",
                        help="what runs the steps: auto, c, torch, triton, triton-mxfp8 (%(default)s)")
    parser.add_argument("--launch", choices=LAUNCHES, default="auto",
                        help="how steps of --backend triton reach the device: in one persistent launch, as a CUDA graph, or op "
                             "by op; auto: the fastest that has every bit of ops at start-up (%(default)s)")
    parser.add_argument("--drafter-precision", choices=("bf16", "int8"), default="bf16",
                        help="of --backend c: int8 halves the time of a draft; the target verifies as ever, so only "
                             "how many drafts are accepted may change (%(default)s)")
    parser.add_argument("--no-drafter", action="store_true", help="decode without the drafter")
    parser.add_argument("--fixed-drafts", action="store_true", help="always draft whole blocks, whatever is accepted")
    parser.add_argument("--ignore-generation-config", action="store_true",
                        help="sampling defaults are OpenAI's (temperature 1, no cuts), not those of generation_config.json")
    parser.add_argument("--checksum", action="store_true", help="compare files with their checksums while loading")
    parser.add_argument("--drain-seconds", type=int, default=30, metavar="S", help="(%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no line per request")
    options = parser.parse_args(argv)
    for name in ("max_context", "max_running", "max_requests", "max_body_mib", "max_bodies_mib", "max_connections",
                 "request_workers"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)}, expected more than 0")
    if not 0 <= options.port < 65536:
        parser.error(f"--port: {options.port}, expected 0 to 65535")
    if options.drain_seconds < 0:
        parser.error(f"--drain-seconds: {options.drain_seconds}, expected 0 or more")
    for origin in options.allow_origin:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin, re.IGNORECASE):
            parser.error(f"--allow-origin: {origin!r}, expected scheme://name[:port] or '*'")
    for name in options.served_name or []:
        if not name.strip():
            parser.error(f"--served-name: {name!r}, expected a name")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    import importlib.util

    missing = [name for name in ("fastapi", "uvicorn", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        return report(f"needs {', '.join(missing)}: pip install -e '.[serve]'", 2)
    if not options.folder.is_dir():
        return report(f"{options.folder}: no such folder, expected an exported checkpoint", 2)
    try:
        rules = access_rules(options)
    except ValueError as error:
        return report(error, 2)
    from runtime_ref.core.tensor_parallel import RankLost, leave, ranks_from_environment

    try:
        ranks = ranks_from_environment()
    except ValueError as error:
        return report(error, 2)
    try:
        code = serve(options, ranks, rules) if ranks.rank == 0 else assist(options, ranks)
    except ValueError as error:
        return report(error, 2) if ranks.rank == 0 else 2
    except RankLost as error:
        return report(error, 1)
    except MemoryError as error:
        return report(f"not enough memory ({error}); --max-running or --max-context lower what is reserved", 1)
    leave(ranks)
    return code


def report(message: object, code: int) -> int:
    print(printable(f"{NAME}: {message}"), file=sys.stderr, flush=True)
    return code


def load(options: argparse.Namespace, ranks, tokenizer):
    """The engine, on any rank."""
    import torch

    from runtime_ref.engine.engine import Engine, EngineOptions

    warnings.formatwarning = lambda message, *_: f"{NAME}: {message}\n"
    shown = sys.stderr.isatty() and ranks.rank == 0

    def progress(done: int, of: int) -> None:
        if shown:
            print(f"\rloading {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)

    if ranks.rank == 0 and options.backend.startswith("triton") and options.launch != "ops":
        report(f"--launch {options.launch}: ways to launch are compared first; where kernels were never compiled before, that "
               "takes a minute or two (Triton keeps them in its cache folder)", 0)
    engine = Engine.from_folder(
        options.folder, ranks=ranks, dtype=torch.float32 if options.dtype == "float32" else torch.bfloat16,
        backend=options.backend, launch=options.launch, drafter=not options.no_drafter,
        drafter_precision=options.drafter_precision, checksum=options.checksum, tokenizer=tokenizer, progress=progress,
        options=EngineOptions(max_context=options.max_context, max_running=options.max_running,
                              rows=max(256, 8 * options.max_running)))
    ranks.shorten_timeout()
    if ranks.rank == 0 and (engine.launch.compared or engine.launch.refused):
        report(engine.launch.line(), 0)
    return engine


def serve(options: argparse.Namespace, ranks, rules) -> int:
    """Rank 0: loads, listens, answers until told to end."""
    import signal

    import uvicorn

    from checkpoint.checksums import declared_digest
    from checkpoint.load import load_tokenizer
    from runtime_ref.server.app import application
    from runtime_ref.server.connections import Server, limited, possible_connections
    from runtime_ref.server.engine_thread import EngineWorker
    from runtime_ref.server.handlers import Api, Settings
    from runtime_ref.server.request_workers import RequestWorkers

    names = tuple(options.served_name or [default_name(options.folder)])
    settings = Settings(names, rules, body_bytes=int(options.max_body_mib * 2**20),
                        bodies_bytes=int(options.max_bodies_mib * 2**20), adaptive=not options.fixed_drafts,
                        defaults={} if options.ignore_generation_config else sampling_defaults(options.folder),
                        unknown_fields=options.ignore_unknown_fields, checksums=declared_digest(options.folder))
    connections = limited(possible_connections(options.max_connections))
    listening = listen(options.host, options.port)
    tokenizer = load_tokenizer(options.folder)
    with contextlib.closing(RequestWorkers(options.folder, options.request_workers)) as preparing:
        preparing.start()
        worker = EngineWorker(load(options, ranks, tokenizer), ranks, max_requests=options.max_requests)
        api = Api(worker, tokenizer, settings, preparing)
        preparing.wait(api.limits)  # whoever finds the server healthy is answered at once
        config = uvicorn.Config(application(api), http=connections, log_level="warning" if options.quiet else "info",
                                access_log=not options.quiet, timeout_keep_alive=30, ws="none", lifespan="on")
        # uvicorn raises the signals that ended it once more; by then everything is done and the exit code is ours.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        warn(options, rules)
        where = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{listening.getsockname()[1]}"
        print(f"serving {names[0]} on {where} (OpenAI API at {where}/v1, chat page at {where}/)", flush=True)
        print(cache_line(worker.engine), flush=True)
        if worker.engine.drafter is not None and settings.adaptive:
            print("drafts: as many as pay here, none where they do not (--fixed-drafts: always whole blocks)", flush=True)
        Server(config, drain_seconds=options.drain_seconds,
               cut=lambda: worker.cut("the server is shutting down")).run(sockets=[listening])
    if worker.stopped:
        return 0 if worker.ended_well else 1
    print(f"{NAME}: the engine's step did not end; left behind", file=sys.stderr, flush=True)
    os._exit(1)  # a thread that hangs in a step would keep the process


def listen(host: str, port: int):
    """A bound socket.

    Raises:
        ValueError: it cannot be had.
    """
    import errno
    import socket

    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        hint = ", expected a free port (--port 0 takes any)" if error.errno == errno.EADDRINUSE else ""
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}{hint}") from None
    return listening


def access_rules(options: argparse.Namespace):
    """Who may ask.

    Raises:
        ValueError: a key that is empty, or cannot be sent in a header.
    """
    import socket

    from runtime_ref.server.access import LOOPBACK, AccessRules, host_name

    where, key = "--api-key", options.api_key
    if options.api_key_file is not None:
        where = f"--api-key-file {options.api_key_file}"
        try:
            key = options.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ValueError(f"{where}: {reason}, expected a file with a key") from None
    elif key is None:
        where, key = f"${KEY_VARIABLE}", os.environ.get(KEY_VARIABLE)
    if key is not None and (not key.strip() or key != key.strip() or not key.isprintable()):
        reason = "spaces around it, or unprintable" if key.strip() else "empty"
        raise ValueError(f"{where}: {reason}, expected a key (leave it out, or unset the variable, to serve without one)")
    own = (options.host, socket.gethostname(), socket.getfqdn()) if options.host not in LOOPBACK else ()
    hosts = tuple(host_name(name) for name in (*own, *options.allowed_host))
    # Beyond loopback a key keeps rebound pages out, and nobody can list the names of proxies and networks.
    anyhow = "*" in options.allowed_host or key is not None and options.host not in LOOPBACK and not options.allowed_host
    return AccessRules(key, None if anyhow else hosts, tuple(origin.lower().rstrip("/") for origin in options.allow_origin))


def warn(options: argparse.Namespace, rules) -> None:
    """Says who can reach a server that asks for no key."""
    from runtime_ref.server.access import LOOPBACK

    if rules.api_key is not None:
        return
    if options.host not in LOOPBACK:
        print(f"{NAME}: {options.host} can be reached by others and no --api-key is set", file=sys.stderr)
    if "*" in rules.origins:
        print(f"{NAME}: --allow-origin '*' without --api-key: every page in a browser of this network may ask", file=sys.stderr)


def cache_line(engine) -> str:
    """What keys and values take once the server is as busy as it may be; memory of a CPU is taken when it is written to."""
    full, options = sum(pool.cache_bytes for pool in engine.cache.pools.values()), engine.options
    line = (f"cache: {options.max_running} sequences of {engine.context:,} tokens, {full / 2**30:.1f} GiB "
            f"{'of this rank ' if engine.backend.ranks.count > 1 else ''}when all are full")
    if engine.backend.device == "cpu" and full > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        line += f": more than this machine has ({memory / 2**30:.1f} GiB); --max-running or --max-context lower it"
    return line


def default_name(folder: Path) -> str:
    """What a checkpoint is called: its recipe's name, that of the hub's cache, or the folder's own."""
    import yaml

    with contextlib.suppress(ValueError, RecursionError, yaml.YAMLError):  # no such file, or not one of ours
        recipe = yaml.safe_load(read_text(folder / "resolved.yaml", RECIPE_BYTES))
        if isinstance(recipe, dict) and isinstance(recipe.get("name"), str) and recipe["name"].strip():
            return recipe["name"]
    cached = re.search(r"models--([^/]+)/snapshots/[^/]+$", str(folder.absolute()))
    return cached[1].replace("--", "/") if cached else folder.resolve().name


def assist(options: argparse.Namespace, ranks) -> int:
    """Other ranks: compute what rank 0 says. Rank 0 decides when to end, so that answers under way are finished."""
    import signal

    from checkpoint.load import load_tokenizer
    from runtime_ref.server.engine_thread import follower_loop

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    follower_loop(load(options, ranks, load_tokenizer(options.folder)), ranks)
    return 0


def sampling_defaults(folder: Path) -> dict[str, float]:
    """What the checkpoint recommends to those who ask for nothing: the numbers of generation_config.json.

    As vLLM's server does. `do_sample` is not looked at: it speaks of transformers' own generate, where False means greedy
    whatever the temperature; over this API a request without a temperature means OpenAI's default, 1.

    Raises:
        ValueError: not JSON, or a number that the sampler refuses.
    """
    from runtime_ref.core.sampling_params import SamplingParams

    file = folder / "generation_config.json"
    found = read_json(file) if file.exists() else {}
    numbers = {name: found.get(name) for name in SAMPLING}
    chosen = {name: v for name, v in numbers.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    if chosen.get("top_k", 0) < 0:
        chosen["top_k"] = 0  # -1 is another way to say off
    try:
        SamplingParams(**chosen)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{file}: {error}") from None
    return chosen


if __name__ == "__main__":
    own_lines_only()
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while importing or loading; later ones are the server's
        sys.exit(report("interrupted while loading", 1))
