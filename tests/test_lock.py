"""The locked versions are those that pyproject.toml asks for, all of them, and can be installed on any machine."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = sorted((ROOT / "requirements").glob("python*.txt"))
# Name, version, marker or "", and the lines that say by whom it is asked for.
PIN = re.compile(r"^([\w.-]+)==(\S+)(?: ; (.+))?\n((?:    # .*\n)*)", re.MULTILINE)


def python_of(file: Path) -> str:
    return file.stem.removeprefix("python")


def on_linux(file: Path) -> dict[str, str]:
    python = python_of(file)
    return default_environment() | {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
                                    "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}


def pins(file: Path) -> dict[str, str]:
    """Version by name of what is installed on Linux."""
    found = [(name, number) for name, number, marker, _ in PIN.findall(file.read_text())
             if not marker or Requirement(f"x ; {marker}").marker.evaluate(on_linux(file))]
    assert len(dict(found)) == len(found)
    return dict(found)


def fits(locked: dict[str, str], requirement: Requirement) -> bool:
    number = locked.get(canonicalize_name(requirement.name))
    return number is not None and requirement.specifier.contains(number, prereleases=True)


def asked_for() -> list[Requirement]:
    project = SETTINGS["project"]
    extras = project["optional-dependencies"]
    return [Requirement(text) for text in [*project["dependencies"], *extras["dev"], *extras["serve"]]]


def test_there_is_one_file_for_each_python_that_is_supported():
    supported = SpecifierSet(SETTINGS["project"]["requires-python"])
    assert {python_of(file) for file in FILES} == {f"3.{minor}" for minor in range(8, 20) if f"3.{minor}.1" in supported}


@pytest.mark.parametrize("file", FILES, ids=python_of)
def test_what_pyproject_asks_for_is_locked_and_nothing_that_it_no_longer_asks_for(file):
    locked = pins(file)
    for requirement in [*asked_for(), *map(Requirement, SETTINGS["build-system"]["requires"])]:
        assert fits(locked, requirement), f"{requirement}: not what {file.name} has: make lock"
    direct = {name for name, _, _, by in PIN.findall(file.read_text()) if "fp4-dflash (pyproject.toml)" in by}
    assert direct == {canonicalize_name(requirement.name) for requirement in asked_for()}, "make lock"


@pytest.mark.parametrize("file", FILES, ids=python_of)
def test_the_lock_names_no_build_no_place_and_no_cuda_library(file):
    text = file.read_text()
    assert not re.search(r"[+@]|://|^-", re.sub(r"#.*", "", text), re.MULTILINE)
    assert not re.search(r"^(nvidia|cuda)-", text, re.MULTILINE)


@pytest.mark.parametrize("file", FILES, ids=python_of)
def test_the_lock_is_complete(file):
    """Of every package that is installed here in its locked version, all requirements are locked, in their ranges."""
    locked = pins(file)
    chosen = {canonicalize_name(Requirement(line).name) for line in (ROOT / "requirements/torch.txt").read_text().splitlines()}
    for name, number in locked.items():
        try:
            if version(name).split("+")[0] != number:
                continue
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, requires(name) or []):
            wanted = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate(on_linux(file)):
                continue
            if name == "torch" and (wanted in chosen or re.match("(nvidia|cuda)-", wanted)):
                continue  # of builds for GPUs: requirements/README.md
            assert fits(locked, requirement), f"{name} {number}: {requirement}"
