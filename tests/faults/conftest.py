"""One trained run of everything (QAT, drafter, export), made once, and the places where campaigns damage copies of it."""

import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny_models import draft_recipe_text

from tests.faults.attempts import attempt, content

# Of each campaign: damages, kills, full disks. A few in `make test-slow`; hundreds where somebody has an hour.
DAMAGES, KILLS, DISKS = (int(os.environ.get(f"FP4_TEST_{name}", usual)) for name, usual in (
    ("DAMAGES", "8"), ("KILLS", "3"), ("DISKS", "3")))
SEED = int(os.environ.get("FP4_TEST_SEED", "0"))


def done(command, *arguments, code=0):
    found = attempt(command, *arguments)
    assert found.code == code, found.said
    return found


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_checkpoint, text_files, prompt_files) -> Iterator[SimpleNamespace]:
    """`work`: base, texts, recipe and the run's folders, made by a run that nothing interrupted. `stopped`, `half_drafted`:
    copies of it as they were after step 8 of QAT, and of the drafter; `drafted`: of all but the export. `exported`: of all."""
    for name in ("qat.trainer", "dflash_train.trainer", "export.job", "runtime_ref.validation.folder_run"):
        importlib.import_module(name)  # once, before processes are forked
    kept = os.environ.get("FP4_TEST_FAULTS_AT")
    root = Path(kept) if kept else tmp_path_factory.mktemp("faults")
    found = SimpleNamespace(**{name: root / name for name in ("work", "stopped", "half_drafted", "drafted", "exported")})
    found.recipe, found.run = found.work / "recipe.yaml", found.work / "runs" / "t"
    found.at = lambda pristine: pristine / "runs" / "t"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        if not (root / "made").is_file():
            _make(root, found, tiny_checkpoint, text_files, prompt_files)
            (root / "made").touch()
        found.export = content(found.at(found.exported) / "export" / "model")
        yield found


def _make(root: Path, found: SimpleNamespace, tiny_checkpoint: Path, text_files: dict, prompt_files: dict) -> None:
    work = found.work
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(tiny_checkpoint, work / "base")
    (work / "text").mkdir()
    texts, prompts = ({name: Path(shutil.copy(path, work / "text")) for name, path in files.items()}
                      for files in (text_files, prompt_files))
    recipe = draft_recipe_text(work / "base", prompts, texts, work / "runs")
    recipe["model"]["dtype"] = "bfloat16"
    recipe["qat"] = {"steps": 12, "batch_size": 2, "checkpoint_every": 4, "log_every": 1, "health_every": 3,
                     "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2}}
    recipe["data"]["eval_sequences"] = 4
    recipe["dflash"] |= {"target": "qat"}
    recipe["export"] = {"shard_bytes": 100_000, "reference_gib": 1.0}
    found.recipe.write_text(yaml.safe_dump(recipe))
    for command, arguments, copy in (("qat", ("--max-steps", 8), found.stopped), ("qat", ("--resume",), None),
                                     ("dflash", ("--max-steps", 8), found.half_drafted),
                                     ("dflash", ("--resume",), found.drafted), ("export", (), found.exported)):
        done(command, found.recipe, *arguments)
        if copy is not None:
            shutil.copytree(work, copy)
