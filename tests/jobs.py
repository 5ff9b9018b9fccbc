"""Jobs as a user starts them: in processes of their own that can be killed and stopped, but most of them without the seconds
that imports cost each."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
# Of every job: one process on one core, whatever the tests themselves run in.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONFAULTHANDLER": "1"}
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch", "torch._dynamo", "transformers.modeling_utils", "transformers.models.auto",
                               "accelerate", "datasets", "matplotlib.pyplot", "rich.console"])


def run_alone(*arguments) -> str:
    """What `python arguments` says, in a fresh interpreter; it must end with code 0."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, text=True, timeout=600,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _run(script: str, arguments: list[str], environment: dict[str, str], before: str, writer) -> None:
    for number in (1, 2):
        os.dup2(writer.fileno(), number)
    writer.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.stdin = open(os.devnull)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(1), "w", buffering=1) for _ in range(2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [script, *arguments]
    sys.path[0] = str(ROOT)
    exec(before, {})
    sys.path[0] = str(ROOT / Path(script).parent)
    runpy.run_path(script, run_name="__main__")


class Job:
    """`python script arguments`, forked from a process that has imported torch, transformers and what else is slow, but nothing
    of this project. As far as tests look at it, what subprocess.Popen has, with stdout and stderr in one text.

    Args:
        before: Python that runs first in the process, to break something.
    """

    def __init__(self, script: str, *arguments, before: str = ""):
        reader, writer = FORKED.Pipe(duplex=False)
        given = script, [str(a) for a in arguments], ENVIRONMENT, before, writer
        self._process = FORKED.Process(target=_run, args=given, daemon=True)
        with mock.patch.dict(os.environ, ENVIRONMENT):  # also the first job's: that of the process that others are forked from
            self._process.start()
        writer.close()
        self.pid = self._process.pid
        self.stdout = os.fdopen(os.dup(reader.fileno()), encoding="utf-8")
        reader.close()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 600) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise TimeoutError(f"not done in {timeout} s")
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, None]:
        said = self.stdout.read()
        self.wait(timeout)
        return said, None


def run_job(script: str, *arguments, expect: int = 0, **options) -> str:
    """What a job says; it must end with code `expect`."""
    job = Job(script, *arguments, **options)
    said, _ = job.communicate()
    assert job.returncode == expect, said
    return said
