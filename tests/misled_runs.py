"""A job that is given one mistake after another."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def misled(job: str, recipe: Path, overrides: list[str], environment: dict[str, str]) -> dict[str, list]:
    """[exit code, what was said] of a run with each mistake, all in one process (imports are most of a run's time).

    Args:
        job: module with `main`, "qat.train" say; each run has a name, and so a folder, of its own.
    """
    script = (
        f"import contextlib, io, json, sys; sys.argv = [{job.replace('.', '/') + '.py'!r}]; sys.path.insert(0, '.')\n"
        f"from {job} import main\n"
        "out = {}\n"
        "for i, override in enumerate(json.loads(sys.stdin.read())):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):\n"
        f"        code = main([{str(recipe)!r}, override, f'name=mistake{{i}}'])\n"
        "    out[override] = code, said.getvalue()\n"
        "print('RESULT', json.dumps(out))\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, text=True, capture_output=True,
                          timeout=200, input=json.dumps(overrides))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT", 1)[1])
