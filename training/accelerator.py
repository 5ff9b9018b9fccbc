"""The Accelerator, and the launch mistakes it does not notice."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch

T = TypeVar("T")

LAUNCH_HELP = ("several processes on a CPU: ACCELERATE_USE_CPU=true torchrun --nproc-per-node N {script} RECIPE; "
               "on GPUs: accelerate launch --multi_gpu --num_processes N {script} RECIPE")

# Accelerate's own ways of dividing a model, which `accelerate launch` asks for with a variable ACCELERATE_USE_...: its FSDP
# plugin knows no expert parallelism, wraps one model together with the optimizer that holds its parameters (here are a student
# and a teacher, and the optimizer holds local shards), and has rank 0 read and send out the whole model.
_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
# How long processes wait for the first one, which tokenizes a corpus alone (torch's default is ten minutes on GPUs). One that
# dies is noticed by the launcher at once, whatever this says.
PATIENCE = timedelta(hours=12)
_PR_SET_PDEATHSIG = 1


def make_accelerator(gradient_accumulation: int = 1):
    """An `Accelerator` whose idea of the number of processes agrees with the launcher's.

    Raises:
        ValueError: WORLD_SIZE > 1 but Accelerate sees one process. It would run that many independent jobs, each
            writing the same folder, and report success. A launch that shards the model, or that runs it under autocast
            (often in the user's own Accelerate defaults): of the models here it would change some and not the others.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    _refuse_launch()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Epochs end in the middle of an update when they like: only the number of micro-steps decides when to step.
    _begin_again()
    accumulation = GradientAccumulationPlugin(num_steps=gradient_accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(gradient_accumulation_plugin=accumulation,
                              kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    if launched > 1 and accelerator.num_processes == 1:
        found = "" if torch.accelerator.is_available() else " (no GPU is visible to torch on this machine)"
        raise ValueError(f"launched with WORLD_SIZE={launched}, but Accelerate sees one process{found}: {launched} independent "
                         f"runs would overwrite each other. Launch {LAUNCH_HELP.format(script=sys.argv[0])}")
    return accelerator


def _begin_again() -> None:
    """After a restart by torchrun (`--max-restarts`), makes the process group of a store's own corner.

    With a static rendezvous (`--master-port`) torchrun keeps its store over restarts, and torch 2.13 gives workers no prefix in
    it: a rank that is early finds the addresses of the ranks that died, and cannot connect to them.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.accelerator.is_available()
    backend = dist.get_default_backend_for_device("cpu" if on_cpu else torch.accelerator.current_accelerator().type)
    store, rank, ranks = next(rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=ranks,
                            timeout=PATIENCE)


def _refuse_launch() -> None:
    """Reads the environment, before Accelerate looks for the packages that such a launch needs."""
    for kind in _SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise ValueError(f"launched with distributed_type {kind}, but models are sharded by the recipe (cluster.sharding: "
                             f"fsdp2), not by Accelerate. Launch {LAUNCH_HELP.format(script=sys.argv[0])}")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":
        raise ValueError(f"launched with mixed_precision {precision}, but weights carry their dtype: set model.dtype, and "
                         "launch with --mixed_precision no (what is not given comes from Accelerate's own configuration)")


def end_with_launcher() -> None:
    """Asks Linux for SIGTERM when the launcher that started this process ends.

    `accelerate launch` and torchrun pass most signals on, but not all of them and not when they are killed: their trainer would
    go on, unseen, beside the one that is started next. A process that no launcher started is left alone: shells end before it.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # another system: nothing is asked
        with open(f"/proc/{parent}/cmdline", "rb") as file:
            words = {word.rpartition(b"/")[2] for word in file.read().split(b"\0")}
        if words & {b"accelerate", b"torchrun", b"torch.distributed.run", b"accelerate.commands.launch"}:
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != parent:  # it ended meanwhile
                signal.raise_signal(signal.SIGTERM)


def from_first(accelerator, make: Callable[[], T]) -> T:
    """What `make` returns on the first process, on all of them; its ValueError or OSError is raised on all of them."""
    if accelerator.num_processes == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    box: list = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = make()
        except (ValueError, OSError) as error:
            box[1] = error
    broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


class StopRequest:
    """Context manager: turns SIGTERM, SIGINT and SIGUSR1 (a batch system's warning) into a flag that is read between steps.

    A second signal of the same kind gets the default behaviour (the process ends at once).
    """

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        end_with_launcher()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        self.signal = number
        if os.environ.get("RANK", "0") == "0":  # by the system call: a print could be in the middle of another
            os.write(2, b"\nstopping after this step, with a checkpoint (the same signal again: at once, without one)\n")
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def agreed(self, accelerator) -> int | None:
        """The signal that any process received (all processes get the same answer), or None."""
        if accelerator.num_processes == 1:
            return self.signal
        mine = torch.tensor([self.signal or 0], device=accelerator.device)
        highest = int(accelerator.gather(mine).max())
        return highest or None
