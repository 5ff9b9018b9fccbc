"""Commands that the documentation and the recipes give can be typed: script, options, recipe and keys exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.load import valid_keys

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.yaml")),
         *sorted((ROOT / "recipes").rglob("README.md"))]
SCRIPT = r"(?:qat|dflash_train|export|runtime_ref|benchmarks|tools|tools/seed|recipes/smollm2)/\w+\.py"
# A command ends where its line does, unless the line is continued; in running text it stands between backticks.
COMMAND = re.compile(rf"(?:python3?|accelerate launch|torchrun)\b[^\n`]*?\b({SCRIPT})((?:[^\n`\\]|\\\n)*)")
# Options that are the job's own come from the shared parser.
SHARED = (ROOT / "recipes/command.py").read_text(encoding="utf-8")


def commands() -> list[tuple[str, str, str]]:
    """(where, script, the rest of the command line) of every command."""
    found = []
    for path in TEXTS:
        text = re.sub(r"\\\n#?\s*", " ", path.read_text(encoding="utf-8"))
        for match in COMMAND.finditer(text):
            found.append((str(path.relative_to(ROOT)), match[1], re.split(r"\s#|#\s|\s{3,}|&&|;|\|", match[2])[0]))
    return found


COMMANDS = commands()


def test_the_search_finds_the_commands_of_every_job():
    scripts = {script for _, script, _ in COMMANDS}
    assert {"qat/train.py", "dflash_train/train.py", "export/to_hf.py", "export/verify.py", "runtime_ref/serve.py",
            "runtime_ref/validate.py", "benchmarks/fake_quant.py", "benchmarks/qat_variants.py"} <= scripts


@pytest.mark.parametrize("where, script, rest", COMMANDS, ids=lambda v: v.strip()[:60])
def test_a_documented_command_can_be_typed(where, script, rest):
    assert (ROOT / script).is_file(), f"{where}: {script}"
    source = (ROOT / script).read_text(encoding="utf-8") + SHARED * ("recipes.command" in (ROOT / script).read_text("utf-8"))
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest):
        assert f'"{option}"' in source or f'"--no-{option[2:]}"' in source, f"{where}: {script} has no {option}"
    for recipe in re.findall(r"(?<![\w./])recipes/[\w-]+\.yaml", rest):
        assert (ROOT / recipe).is_file(), f"{where}: {recipe}"
    sections = "model|data|quantization|qat|drafter|dflash|export|cluster|tracking"
    for key in re.findall(rf"(?<![\w.\[{{/-])((?:{sections})\.[\w.]+)=", rest):
        assert key in set(valid_keys()), f"{where}: {script} … {key}"


def test_the_page_of_recipe_keys_is_what_the_schema_says():
    done = subprocess.run([sys.executable, "tools/recipe_reference.py", "--check"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
