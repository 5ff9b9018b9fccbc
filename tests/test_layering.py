"""The house keeps its layers: imports point downwards, entry scripts are leaves, file names shadow nothing."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What a room may import, besides itself.
ALLOWED = {
    "storage": set(),
    "mxfp4": {"storage"},
    "recipes": {"storage", "mxfp4"},
    "modeling": {"storage", "mxfp4"},
    "checkpoint": {"storage", "mxfp4", "modeling", "recipes"},
    "training": {"storage", "mxfp4", "modeling", "recipes", "checkpoint"},
    "qat": {"storage", "mxfp4", "modeling", "recipes", "checkpoint", "training"},
    "dflash_train": {"storage", "mxfp4", "modeling", "recipes", "checkpoint", "training", "qat"},
    "export": {"storage", "mxfp4", "modeling", "recipes", "checkpoint", "training"},
    "runtime_ref": {"storage", "mxfp4", "modeling", "recipes", "checkpoint"},
    "tools": {"storage", "mxfp4", "modeling", "recipes", "checkpoint", "training", "qat", "dflash_train",
              "runtime_ref"},
}
# The same inside the runtime: a storey may import those named, and itself.
STOREYS = {
    "core": set(),
    "kernels": {"core"},
    "checkpoints": {"core", "kernels"},
    "triton_cpu": {"core", "kernels"},
    "backends": {"core", "kernels", "checkpoints", "triton_cpu"},
    "engine": {"core", "kernels", "checkpoints", "backends"},
    "server": {"core", "checkpoints", "backends", "engine"},
    "validation": {"core", "kernels", "checkpoints", "backends", "engine", "measure"},
    "measure": {"core", "kernels", "checkpoints", "backends", "engine", "triton_cpu"},
}
ENTRY_SCRIPTS = {"qat.train", "dflash_train.train", "dflash_train.regenerate", "export.to_hf", "export.verify",
                 "training.compare", "runtime_ref.serve", "runtime_ref.validate", "runtime_ref.bench"}
FILES = sorted(p for package in ALLOWED for p in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    package = path.relative_to(ROOT).parts[0]
    used = {name.split(".")[0] for name in imports(path)} & ALLOWED.keys() - {package}
    assert used <= ALLOWED[package]


@pytest.mark.parametrize("path", sorted((ROOT / "runtime_ref").glob("*/**/*.py")),
                         ids=lambda p: str(p.relative_to(ROOT / "runtime_ref")))
def test_imports_inside_the_runtime_point_downwards(path):
    storey = path.relative_to(ROOT / "runtime_ref").parts[0]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("runtime_ref.")} - {storey}
    assert used <= STOREYS[storey]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_imports_an_entry_script(path):
    assert not imports(path) & ENTRY_SCRIPTS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_names_shadow_nothing_and_say_something(path):
    third_party = {"torch", "transformers", "accelerate", "datasets", "safetensors", "muon", "pydantic", "yaml", "rich",
                   "numpy", "matplotlib", "wandb", "deepspeed", "triton", "tokenizers", "huggingface_hub"}
    assert path.stem not in third_party | set(sys.stdlib_module_names) | {"utils", "common", "helpers", "misc"}


def test_remote_code_files_are_self_contained():
    for name in ("configuration_mimo_v2", "modeling_mimo_v2", "native_loading", "drafter", "block_mask"):
        used = {n.split(".")[0] for n in imports(ROOT / "modeling" / f"{name}.py")}
        assert used - set(sys.stdlib_module_names) <= {"torch", "transformers", "safetensors"}
