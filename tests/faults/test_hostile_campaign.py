"""Random hostile folders: every command that reads one ends in findings or one line, in bounded time and memory."""

import os
import random
import resource
from pathlib import Path

import pytest

from tests.faults.attempts import RIGHT, TOLD, Tally, attempt, put_back
from tests.faults.conftest import DAMAGES, SEED
from tests.faults.hostile import make_hostile

pytestmark = pytest.mark.slow
COMMANDS = {
    "verify": ("verify", "{folder}"),
    "validate": ("validate", "{folder}", "--tokens", "2", "--prompts-per-domain", "1", "--backend", "torch"),
    "serve": ("serve", "{folder}", "--port", "0", "--backend", "torch", "--request-workers", "1", "--max-context", "64"),
    "export": ("export", "{recipe}", "--from", "{folder}", "--out", "{out}"),
    "train": ("qat", "{recipe}", "model.path={folder}", "--max-steps", "1", "output={out}"),
}
# How a refusal begins; verify and validate print findings instead.
ERRORS = {"verify": (), "validate": (), "serve": ("runtime_ref/serve.py:",), "export": ("error:",), "train": ("error:",)}
MEMORY = 12 << 30


def bounds() -> None:
    """Of the process: memory; and a server that has loaded ends."""
    from runtime_ref.server.connections import Server

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    Server.run = lambda self, sockets: os._exit(0)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_hostile_folder_ends_a_command_in_findings_or_one_line(name, trained):
    rng, tally = random.Random(f"hostile {name} {SEED}"), Tally()
    for _ in range(DAMAGES * (4 if name == "verify" else 1)):
        put_back(trained.exported, trained.work)
        folder = trained.run / "export" / "model"
        where = Path.cwd()
        what = make_hostile(rng, folder)
        os.chdir(where)
        command = [part.format(folder=folder, recipe=trained.recipe, out=trained.work / "out") for part in COMMANDS[name]]
        found = attempt(*command, seconds=150, first=bounds)
        said = [line for line in found.said.splitlines() if line.startswith(ERRORS[name])]
        fault = found.fault(ERRORS[name] if name != "serve" else ())
        if name == "export" and "FOUND" in found.said and found.code == 1:
            fault = None
        tally.add(fault or (TOLD if found.code and (said or not ERRORS[name]) else RIGHT), what, found.said)
    tally.close(f"hostile folders, {name}")
