"""Nothing of a folder that is read can run: no code of this project uses a loader that runs what it reads, and pickles planted
under every name that a checkpoint, a drafter or a run may have stay asleep."""

import ast
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from toy_export import export, make_run

from checkpoint.detect_format import open_source
from checkpoint.verify import verify
from export.job import Request, run
from recipes.load import _RecipeYaml, load_recipe

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("storage", "mxfp4", "modeling", "recipes", "checkpoint", "training", "qat", "dflash_train", "export", "runtime_ref",
         "tools", "benchmarks")
SOURCES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
# Loaders that run what they read, and the one file that may name some of them (restricted there).
UNSAFE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.loads", "dill.load", "dill.loads", "cloudpickle.load",
          "cloudpickle.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle",
          "torch.jit.load", "torch.package.PackageImporter", "FileSystemReader", "DefaultLoadPlanner", "yaml.load",
          "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "load_state", "read_pickle"}
PERMITTED = {("checkpoint/pickles.py", "pickle.Unpickler"), ("checkpoint/distributed.py", "FileSystemReader"),
             ("checkpoint/distributed.py", "DefaultLoadPlanner"), ("recipes/load.py", "yaml.load")}


def dotted(node: ast.expr) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else []), *reversed(parts)])


def unsafe_uses(text: str, where: str) -> list[str]:
    """Unsafe loaders that a source text names, but for those permitted in the file `where`."""
    tree, found = ast.parse(text), []
    imported = {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.module for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Attribute, ast.Name)):
            continue
        name = dotted(node)
        name = imported.get(name, name)
        hit = next((bad for bad in UNSAFE if name == bad or name.endswith("." + bad)), None)
        if hit in ("eval", "exec") and isinstance(node, ast.Attribute):
            hit = None  # a module's method
        if hit == "load_state" and name in ("training.state_files.load_state", "state_files.load_state"):
            hit = None  # this project's own, which reads safetensors
        if hit and (where, hit) not in PERMITTED:
            found.append(f"{where}:{node.lineno}: {name}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, options = dotted(node.func), {k.arg: k.value for k in node.keywords}
        if name == "torch.load" and getattr(options.get("weights_only"), "value", None) is not True:
            found.append(f"{where}:{node.lineno}: torch.load without weights_only=True")
        if getattr(options.get("allow_pickle"), "value", False) is True:
            found.append(f"{where}:{node.lineno}: allow_pickle")
        if name.endswith("checkpoint.load") and not {"storage_reader", "planner"} <= options.keys():
            found.append(f"{where}:{node.lineno}: {name} with torch's own reader")
    return found


def test_no_source_uses_a_loader_that_runs_what_it_reads():
    assert len(SOURCES) > 100 and issubclass(_RecipeYaml, yaml.SafeLoader)
    assert not [use for p in SOURCES for use in unsafe_uses(p.read_text(encoding="utf-8"), p.relative_to(ROOT).as_posix())]


@pytest.mark.parametrize("text", [
    "import pickle\npickle.load(f)", "from pickle import loads\nloads(b)", "import torch\ntorch.load(f)",
    "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "accelerator.load_state(p)", "yaml.load(f)",
    "from torch.distributed.checkpoint import FileSystemReader\nFileSystemReader(p)", "dcp.checkpoint.load(s, checkpoint_id=p)",
    "class A(pickle.Unpickler): pass"])
def test_the_search_finds_each_of_them(text):
    assert unsafe_uses(text, "x.py")


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def plain(mark: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(mark)))


def torch_zip(mark: Path, path: Path) -> None:
    content = io.BytesIO()
    torch.save({"mask_token_id": Evil(mark), "embedding": torch.zeros(96), "weight": Evil(mark)}, content)
    path.write_bytes(content.getvalue())


def torch_legacy(mark: Path, path: Path) -> None:
    torch.save({"embedding": Evil(mark)}, path, _use_new_zipfile_serialization=False)


NAMES = [".metadata", "__0_0.distcp", "pytorch_model.bin", "model.bin", "model.safetensors", "mask_embedding.pt",
         "optimizer.bin", "scheduler.bin", "sampler.bin", "random_states_0.pkl", "random_states_0.safetensors",
         "custom_checkpoint_0.pkl", "training_state.safetensors", "training_args.bin", "rng_state.pth",
         "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
         "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "tokenizer.pkl", "tokenizer.json", "vocab.json",
         "tokenizer.model", "config.json", "generation_config.json", "adapter_model.bin",
         "dflash_reference.safetensors", "model.safetensors.index.json", "checksums.json", "export.json",
         "complete.json"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    recipe = make_run(root)
    return recipe, export(recipe)


@pytest.mark.parametrize("writer", [plain, torch_zip, torch_legacy])
def test_planted_pickles_stay_asleep_wherever_weights_are_opened(writer, tmp_path):
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.is_dir()  # the plant works
    mark.rmdir()
    for name in NAMES:
        for home in (tmp_path / "a", tmp_path / "b" / "inner"):
            home.mkdir(parents=True, exist_ok=True)
            writer(mark, home / name)
            if name.endswith("_states.pt"):
                for other in NAMES:
                    if other.endswith("_states.pt"):
                        writer(mark, home / other)
            folder = home if home.name == "a" else home.parent
            with pytest.raises(ValueError):
                source = open_source(folder)
                for tensor in source.infos:
                    source.read(tensor)
                raise ValueError("read")
            shutil.rmtree(home)
            assert not mark.exists(), name


# Planted together where nothing keeps the verifier from looking at the others.
TOGETHER = [[n for n in NAMES if not n.endswith(("json", ".safetensors", ".metadata"))], [".metadata", "__0_0.distcp"],
            ["model.safetensors"], ["config.json"], ["dflash_reference.safetensors", "generation_config.json", "export.json"],
            ["model.safetensors.index.json", "checksums.json", "tokenizer.json"]]


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
@pytest.mark.parametrize("home", ["", "dflash"])
def test_planted_pickles_stay_asleep_when_a_folder_is_verified(exported, home, names, tmp_path):
    mark, folder = tmp_path / "ran", tmp_path / "model"
    shutil.copytree(exported[1], folder)
    for name in names:
        (folder / home / name).unlink(missing_ok=True)
        (plain if name.endswith((".pkl", ".metadata", "json")) else torch_zip)(mark, folder / home / name)
    if ".metadata" in names:  # what makes a reader of several formats look at it
        for path in (folder / home).glob("*.safetensors*"):
            path.unlink()
    assert verify(folder).findings
    assert not mark.exists()


@pytest.mark.parametrize("writer", [plain, torch_zip, torch_legacy])
@pytest.mark.parametrize("name", [".metadata", "pytorch_model.bin", "x/.metadata"])
def test_planted_pickles_stay_asleep_beside_a_folder_that_is_compared_or_exported(exported, writer, name, tmp_path):
    mark, hostile = tmp_path / "ran", tmp_path / "hostile"
    (hostile / name).parent.mkdir(parents=True)
    shutil.copy(exported[1] / "config.json", hostile)
    writer(mark, hostile / name)
    findings = verify(exported[1], hostile).findings
    assert any("could run code" in f or "not a whole torch file" in f or "cannot be checked" in f for f in findings)
    for request in ({"base": hostile}, {"weights": hostile}):
        with pytest.raises(ValueError):
            run(load_recipe(exported[0]), Request(out=tmp_path / "out", **request))
    assert not mark.exists()


def test_planted_pickles_stay_asleep_when_a_folder_is_validated(exported, tmp_path):
    from runtime_ref.core.tensor_parallel import ranks_from_environment
    from runtime_ref.validate import arguments
    from runtime_ref.validation.folder_run import validate_folder

    mark, folder = tmp_path / "ran", tmp_path / "model"
    shutil.copytree(exported[1], folder)
    for name in NAMES:
        for home in (folder, folder / "dflash"):
            if not (home / name).exists() or name.endswith((".pt", ".pth", ".bin", ".pkl")):
                torch_zip(mark, home / name)
    verdict = validate_folder(arguments([str(folder)]), ranks_from_environment(), None)
    assert not verdict.passed and not mark.exists()


def test_a_compressed_mask_embedding_is_refused_before_it_is_unpacked(tmp_path):
    from modeling.drafter import read_mask

    stored, bomb = tmp_path / "stored.pt", tmp_path / "mask_embedding.pt"
    torch.save({"mask_token_id": 1, "embedding": torch.zeros(1 << 24)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in source.infolist():
            out.writestr(entry.filename, source.read(entry))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="compressed"):
        read_mask(bomb)
    with pytest.raises(ValueError, match="at most 16 MiB"):
        read_mask(stored)
    torch.save({"mask_token_id": 1, "embedding": torch.zeros(1).expand(1 << 40)}, stored)  # 4 TiB of one value
    with pytest.raises(ValueError, match="expected one vector"):
        read_mask(stored)


def test_an_index_that_names_files_outside_its_folder_is_refused(exported, tmp_path):
    import json

    from checkpoint.tensor_files import TensorFiles

    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in (f"../{exported[1].name}/x.safetensors", "/etc/passwd", "a/../../b.safetensors", "a\\..\\b"):
        (hostile / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        for opened in (open_source, TensorFiles):
            with pytest.raises(ValueError, match="expected files of its own folder"):
                opened(hostile)


def test_names_of_a_hostile_folder_do_not_reach_the_terminal_as_they_are(exported, tmp_path, capsys):
    from export.verify import main

    folder = tmp_path / "model"
    shutil.copytree(exported[1], folder)
    (folder / "a\x1b[2J\x9d0;title\x07\n\u202eb.txt").write_text("x")
    assert main([str(folder)]) == 1
    said = capsys.readouterr().out
    assert "\\x1b[2J\\x9d0;title\\x07\\n\\u202eb.txt" in said
    assert not set("\x1b\x9d\x07\u202e") & set(said)
