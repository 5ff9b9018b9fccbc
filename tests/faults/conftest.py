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
    copies of it as they were after step 8 of QAT, and of the drafter. `exported`: copy with the export."""
    for name in ("qat.trainer", "dflash_train.trainer", "export.job", "runtime_ref.validation.folder_run"):
        importlib.import_module(name)  # once, before processes are forked
    root = tmp_path_factory.mktemp("faults")
    work = root / "work"
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
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
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    def copied(name):
        return Path(shutil.copytree(work, root / name))

    done("qat", path, "--max-steps", 8)
    stopped = copied("stopped")
    done("qat", path, "--resume")
    done("dflash", path, "--max-steps", 8)
    half_drafted = copied("half_drafted")
    done("dflash", path, "--resume")
    drafted = copied("drafted")
    done("export", path)
    exported = copied("exported")
    yield SimpleNamespace(work=work, recipe=path, run=work / "runs" / "t", stopped=stopped, half_drafted=half_drafted,
                          drafted=drafted, exported=exported, export=content(exported / "runs" / "t" / "export" / "model"),
                          at=lambda pristine: pristine / "runs" / "t")
    patch.undo()
