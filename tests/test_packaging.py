"""What a wheel holds is enough to work outside a clone: packages, recipes, the data files beside the code.

The wheel is not built here (that needs the network or a build tool); its content is what pyproject.toml says, laid out in a
folder as an installer would.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES = find_packages(str(ROOT), include=SETTINGS["packages"]["find"]["include"])
# Data, scripts that make it, and tests stay in the clone.
NOT_INSTALLED = {"tests", "tools", "benchmarks", "docs"}


def installed_files() -> list[Path]:
    found = []
    for package in PACKAGES:
        folder = ROOT / package.replace(".", "/")
        found += folder.glob("*.py")
        for pattern in SETTINGS["package-data"].get(package, []):
            found += folder.glob(pattern)
    return [path.relative_to(ROOT) for path in found]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder as site-packages would be."""
    target = tmp_path_factory.mktemp("site")
    for path in installed_files():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target / path)
    return target


def test_every_package_and_every_file_beside_the_code_is_installed():
    tops = {path.parent.name for path in ROOT.glob("*/__init__.py")} - NOT_INSTALLED
    assert tops == {package.split(".")[0] for package in PACKAGES}
    held, kinds = set(installed_files()), {".py", ".c", ".h", ".html", ".jinja", ".cu"}
    for top in tops:
        for path in (ROOT / top).rglob("*"):
            if path.suffix in kinds and not path.is_relative_to(ROOT / "recipes/seed"):
                assert path.relative_to(ROOT) in held, path
    assert {path.relative_to(ROOT) for path in (ROOT / "recipes").glob("*.yaml")} <= held
    assert {path.relative_to(ROOT) for path in (ROOT / "recipes/accelerate").glob("*.yaml")} <= held


@pytest.mark.parametrize("module", ["qat.train", "dflash_train.train", "dflash_train.regenerate", "export.to_hf",
                                    "export.verify", "runtime_ref.serve", "runtime_ref.validate", "runtime_ref.bench"])
def test_every_command_answers_from_an_installed_copy(module, site, tmp_path):
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=tmp_path, text=True, capture_output=True, timeout=600,
                          env=os.environ | {"PYTHONPATH": str(site)})
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_an_installed_copy_finds_the_shipped_recipes_plans_and_tells_mistakes_in_one_line(site, tmp_path):
    code = ("import contextlib, io, json, sys\n"
            "from qat.train import main\n"
            "import qat\n"
            "out = [qat.__file__]\n"
            "for arguments in (['mimo.yaml', '--plan'], ['recipes/mimo.yaml'], ['tiny.yaml'], ['nimo.yaml']):\n"
            "    said = io.StringIO()\n"
            "    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):\n"
            "        out.append((main(arguments), said.getvalue()))\n"
            "from training.report import git_revision\n"
            "print('RESULT', json.dumps([*out, git_revision()]))\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # somebody's repository, not this one
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=600,
                          env=os.environ | {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    where, plan, without_weights, seed, unknown, revision = json.loads(done.stdout.split("RESULT", 1)[1])
    assert Path(where).is_relative_to(site)
    assert plan[0] == 3 and "79,488 expert matrices" in plan[1]
    assert without_weights[0] == 2 and "model.path: required to train" in without_weights[1]
    assert seed[0] == 2 and "model.path: recipes/seed/model: no such checkpoint folder, neither from" in seed[1]
    assert unknown[0] == 2 and "nimo.yaml: no such recipe file" in unknown[1]
    assert revision == "unknown"
