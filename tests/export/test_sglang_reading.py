"""What SGLang's own code makes of a drafter's config.json: the functions of its wheel, run without its GPU libraries.

`make test-clients` unpacks the wheel. Its modules are executed from source; what they import of the rest of SGLang are empty
classes. So configurations are really read; models are not built and no weights are loaded.
"""

import ast
import enum
import importlib.machinery
import os
import sys
import types
from pathlib import Path

import pytest
from toy_export import export, make_run
from transformers import AutoConfig

from tests.released_folders import write_release

WHEEL = Path(os.environ.get("FP4_CLIENTS_READ", "nowhere")) / "sglang/srt"
pytestmark = [pytest.mark.clients,
              pytest.mark.skipif(not WHEEL.is_dir(), reason="SGLang's wheel is not unpacked: make test-clients")]


class Attention(enum.Enum):
    DECODER = 1
    ENCODER_ONLY = 2


class Empty(types.ModuleType):
    AttentionType = Attention

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None, "__new__": lambda cls, *args, **kwargs: None})


def executed(name: str, monkeypatch, functions: str = "", **known) -> types.ModuleType:
    """A module of the wheel with everything else of SGLang empty; of `functions`, only those that begin so."""
    tree = ast.parse((WHEEL / name).read_text(encoding="utf-8"))
    if functions:
        tree.body = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import) or isinstance(
            node, ast.FunctionDef) and node.name.startswith(functions)]
    for node in ast.walk(tree):
        found = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(
            node, ast.Import) else []
        for module in found:
            if module and module.startswith("sglang"):
                for parent in (".".join(module.split(".")[:i + 1]) for i in range(module.count(".") + 1)):
                    monkeypatch.setitem(sys.modules, parent, known.get(parent.rpartition(".")[2]) or Empty(parent))
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, made)  # dataclasses look their module up
    made.__dict__["__name__"] = name
    exec(compile(tree, name, "exec"), made.__dict__)
    return made


def read_by_sglang(folder: Path, monkeypatch):
    """(its parsed configuration, window_left and kind of attention of every layer)."""
    utils = executed("speculative/dflash_utils.py", monkeypatch)
    model = executed("models/dflash.py", monkeypatch, "_get_dflash", dflash_utils=utils)
    config = AutoConfig.from_pretrained(folder)  # as it does
    layers = [model._get_dflash_layer_attention_params(config, i) for i in range(config.num_hidden_layers)]
    return utils.parse_dflash_draft_config(draft_hf_config=config), layers


def test_sglang_reads_the_drafter_as_it_was_trained(tmp_path, monkeypatch):
    parsed, layers = read_by_sglang(export(make_run(tmp_path)) / "dflash", monkeypatch)
    assert (parsed.block_size, parsed.target_layer_ids, parsed.num_target_layers, parsed.mask_token_id) == (8, [0, 2], 4, 89)
    assert parsed.attention_sink_bias is True and parsed.attention_value_scale == 0.612
    assert parsed.resolve_target_layer_ids(target_num_layers=4) == [0, 2]
    # 15 keys to the left and the query: a window of 16. Not causal within the block.
    assert layers == [(15, Attention.ENCODER_ONLY)] * 2


def test_sglang_runs_the_released_drafter_without_its_window(tmp_path, monkeypatch):
    """Why exports write every key: the released spelling, read by the same code, has no window (a note of the verifier)."""
    folder = write_release(tmp_path / "model", "V2.5-Pro-FP4-DFlash")
    _, layers = read_by_sglang(folder / "dflash", monkeypatch)
    assert layers == [(-1, Attention.ENCODER_ONLY)] * 2
