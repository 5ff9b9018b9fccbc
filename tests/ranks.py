"""Functions run on several gloo ranks: processes forked from one that has imported torch and transformers (see `jobs`)."""

import os
import traceback
from pathlib import Path
from unittest import mock

import torch
from jobs import ENVIRONMENT, FORKED, ROOT
from ports import free_port


def _rank(rank: int, world: int, port: int, out: Path, function, arguments) -> None:
    os.environ.clear()
    os.environ.update(ENVIRONMENT | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})
    os.chdir(ROOT)
    torch.set_num_threads(1)
    try:
        result = ("ok", function(rank, *arguments))
    except BaseException:
        result = ("error", traceback.format_exc())
    torch.save(result, out / f"{rank}.tmp")
    os.replace(out / f"{rank}.tmp", out / f"{rank}.pt")
    os._exit(0)  # process groups are not torn down in order


def begin(world: int, out: Path, function, *arguments) -> list:
    """Processes that run `function(rank, *arguments)`; what it returns, or its traceback, goes to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    with mock.patch.dict(os.environ, ENVIRONMENT):
        processes = [FORKED.Process(target=_rank, args=(r, world, port, out, function, arguments), daemon=True)
                     for r in range(world)]
        for process in processes:
            process.start()
    return processes


def on_ranks(world: int, out: Path, function, *arguments, timeout: float = 600) -> list:
    """What `function(rank, *arguments)` returns on each of `world` ranks.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or was not done in `timeout` seconds.
    """
    processes = begin(world, out, function, *arguments)
    waiting = dict(enumerate(processes))
    while waiting:
        for rank, process in list(waiting.items()):
            process.join(0.05 if timeout > 0 else 0)
            timeout -= 0.05
            file = out / f"{rank}.pt"
            failed = None
            if process.exitcode is not None:
                del waiting[rank]
                kind, value = torch.load(file, weights_only=False) if file.is_file() else ("error", f"died: {process.exitcode}")
                failed = f"rank {rank} of {world}: {value}" if kind == "error" else None
            elif timeout <= 0:
                failed = f"rank {rank} of {world} is not done"
            if failed:
                for other in processes:
                    other.kill()
                raise AssertionError(failed)
    return [torch.load(out / f"{rank}.pt", weights_only=False)[1] for rank in range(world)]
