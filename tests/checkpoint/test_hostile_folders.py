"""Folders by anybody end in findings: never in a traceback, never in a wait, never in memory that the folder does not have."""

import json
import os
import resource
import shutil
import struct
import time

import pytest
from toy_export import export, make_run

from checkpoint.verify import verify


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    return export(make_run(root))


def set_key(file, key, value):
    def edit(folder):
        content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        home = content
        *parents, last = key.split(".")
        for parent in parents:
            home = home[parent]
        home[last] = value
        (folder / file).write_text(json.dumps(content))

    return edit


def put(file, content):
    def edit(folder):
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(content)

    return edit


def pipe(file):
    def edit(folder):
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return edit


def link(file, target):
    def edit(folder):
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return edit


def header(entries) -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text)) + text


EMPTY = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}
HOSTILE = {f"{file}:{key}={value!r}"[:90]: set_key(file, key, value) for file, key, values in [
    ("config.json", "num_hidden_layers", [10**9, 10**12, -1, "4", None, 2.5, [], True]),
    ("config.json", "n_routed_experts", [10**9, "x", None]), ("config.json", "hidden_size", [10**12, "x", 0, -3]),
    ("config.json", "rope_parameters", [3, "x", []]), ("config.json", "rope_scaling", [3, "x"]),
    ("config.json", "partial_rotary_factor", [1e308, float("nan"), "x"]), ("config.json", "model_type", [[], {}, "\x1b[2J", 3]),
    ("config.json", "quantization_config", [3, [], "x", {"quant_method": []}]),
    ("config.json", "auto_map", [3, ["x"], {"a": 3}]),
    ("config.json", "hybrid_layer_pattern", [[2, 3], "x", 10**9]), ("config.json", "eos_token_id", ["x", [10**30], {}]),
    ("config.json", "dflash_config", [3, {}]),
    ("dflash/config.json", "num_hidden_layers", [7, 10**9, "2", None, -1]),
    ("dflash/config.json", "hidden_size", [10**12, "x", None]),
    ("dflash/config.json", "head_dim", [10**9, "x", 0]), ("dflash/config.json", "rope_parameters", [3, "x"]),
    ("dflash/config.json", "dflash_config", [3, [], {}]),
    ("dflash/config.json", "dflash_config.target_layer_ids", ["x", [1e9], [[]]]),
    ("dflash/config.json", "dflash_config.block_size", [10**9, "x"]), ("dflash/config.json", "layer_types", [3, "x", [3]]),
    ("dflash/config.json", "vocab_size", ["x", 10**15]), ("export.json", "layout", [3, [], "x"]),
    ("export.json", "scale_rule", [3, "x"]),
    ("export.json", "drafter", ["x", {}]), ("model.safetensors.index.json", "weight_map", [3, [], {"a": 3}, {"a": "../../x"}]),
    ("model.safetensors.index.json", "metadata", [3, []]), ("checksums.json", "tensors_crc32", [3, [], {"a": 3}]),
    ("tokenizer.json", "model", [3, {"vocab": 3}]), ("tokenizer.json", "added_tokens", [3, [3]]),
    ("generation_config.json", "eos_token_id", ["x", [{}]]),
] for value in values} | {
    f"{file} is {words}": put(file, content) for file in (
        "config.json", "export.json", "checksums.json", "checksums.sha256", "model.safetensors.index.json", "README.md",
        "dflash/config.json", "dflash/mask_embedding.pt", "dflash/dflash_reference.safetensors", "tokenizer.json", "x.py",
        "model-00001-of-00001.safetensors", "dflash/x.safetensors")
    for words, content in (("empty", b""), ("deep", (b"-" if file.endswith(".py") else b"[") * 200_000),
                           ("bytes", bytes(range(256)) * 8))
} | {f"{file} is a pipe": pipe(file) for file in (
    "x.py", "x.safetensors", "config.json", "export.json", "checksums.sha256", "model.safetensors.index.json", "tokenizer.json",
    "dflash/config.json",
    "dflash/x.safetensors", "dflash/mask_embedding.pt", "dflash/dflash_reference.safetensors", "README.md")
} | {f"{file} is /dev/zero": link(file, "/dev/zero") for file in ("config.json", "x.safetensors", "dflash/mask_embedding.pt")
} | {
    "a link to itself": link("x.safetensors", "x.safetensors"),
    "a link to its folder": link("loop", "."),
    "300,000 empty tensors": put("x.safetensors", header(EMPTY)),
    "300,000 empty tensors of the drafter": put("dflash/x.safetensors", header(EMPTY)),
    "a header of 2^63 bytes": put("x.safetensors", struct.pack("<Q", 1 << 63)),
    "a negative shape": put("x.safetensors", header({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 0]}})),
    "a shape of 2^62": put("x.safetensors", header({"a": {"dtype": "U8", "shape": [1 << 62, 4], "data_offsets": [0, 0]}})),
    "an unknown dtype": put("x.safetensors", header({"a": {"dtype": "Q9", "shape": [0], "data_offsets": [0, 0]}})),
    "a name of a megabyte": put("x.safetensors", header({"a" * (1 << 20): EMPTY["t0"]})),
}
# Read by nobody that verifies, or as good as what stood there.
HARMLESS = {"a link to its folder", "config.json:rope_parameters=[]"}


def bounded(check, seconds=60, gib=3.0):
    """What `check` returns, in time and without taking much more memory than before."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    found = check()
    assert time.monotonic() - began < seconds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20 < gib
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n.startswith("300,000") else n for n in HOSTILE])
def test_a_hostile_folder_ends_in_findings(name, exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    HOSTILE[name](folder)
    found = bounded(lambda: verify(folder))
    assert found.wrong or name in HARMLESS
    assert all(len(finding.text) < 3000 for finding in found.wrong)


VALIDATED = ["dflash/config.json:num_hidden_layers=7", "dflash/config.json:num_hidden_layers=1000000000",
             "dflash/config.json:hidden_size='x'", "config.json:rope_parameters=3", "config.json:partial_rotary_factor=1e+308",
             "config.json:num_hidden_layers=1000000000000", "x.py is a pipe", "config.json is a pipe", "tokenizer.json is deep",
             "export.json is deep", "checksums.json:tensors_crc32=3", "dflash/mask_embedding.pt is a pipe"]


@pytest.mark.parametrize("name", VALIDATED)
def test_a_hostile_folder_ends_in_a_verdict_of_validate(name, exported, tmp_path):
    from runtime_ref.core.tensor_parallel import ranks_from_environment
    from runtime_ref.validate import arguments
    from runtime_ref.validation.folder_run import validate_folder

    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    HOSTILE[name](folder)
    verdict = bounded(lambda: validate_folder(arguments([str(folder), "--tokens", "8"]), ranks_from_environment(), None), 120)
    assert not verdict.passed and verdict.lines()
