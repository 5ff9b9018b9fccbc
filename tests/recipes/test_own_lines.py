"""Commands print lines of their own only, for a reason that is removed, not filtered."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("qat/train", "dflash_train/train", "dflash_train/regenerate", "export/to_hf", "export/verify",
            "runtime_ref/serve", "runtime_ref/validate", "runtime_ref/bench")
SAYS = ("from recipes.own_lines import own_lines_only; own_lines_only(); import os, sys; import transformers.modeling_utils; "
        "print([m for m in sys.modules if m.split('.')[0] == 'torchao' and sys.modules[m] is not None], "
        "os.environ.get('HF_DATASETS_DISABLE_PROGRESS_BARS'))")


@pytest.mark.parametrize(("given", "expected"), [({}, "[] 1"), ({"HF_DATASETS_DISABLE_PROGRESS_BARS": "0"}, "[] 0")])
def test_transformers_imports_no_torchao_and_bars_are_off_in_a_log_unless_the_user_wants_them(given, expected):
    kept = {k: v for k, v in os.environ.items() if "PROGRESS_BARS" not in k}
    done = subprocess.run([sys.executable, "-c", SAYS], cwd=ROOT, env=kept | given | {"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, timeout=600)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_asks_for_it_before_all_else(command):
    last = ast.parse((ROOT / f"{command}.py").read_text()).body[-1]
    assert ast.unparse(last).splitlines()[:2] == ["if __name__ == '__main__':", "    own_lines_only()"]
