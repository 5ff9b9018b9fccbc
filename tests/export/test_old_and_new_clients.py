"""Exports mean the same to clients from before transformers 5 and since (docs/results/versions.md: loaded by real ones)."""

import json
import re

import pytest
from toy_export import export, gpt_oss_run, make_run, qwen3_run

from checkpoint import verify
from checkpoint.tokenizer_files import TOKENIZER, shipped_bytes
from export.config_files import both_spellings


@pytest.fixture(scope="module", params=["qwen3", "gpt-oss", "native"])
def folder(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "native":
        return export(make_run(root, drafter=False))
    recipe, _ = (qwen3_run if request.param == "qwen3" else gpt_oss_run)(root)
    return export(recipe, f"export.layout={'compressed-tensors' if request.param == 'qwen3' else 'gpt-oss'}")


def test_every_renamed_key_is_there_under_both_names(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config.get("num_experts") == config.get("num_local_experts")
    if config["model_type"] == "mimo_v2":
        assert "rope_parameters" not in config and "num_experts" not in config  # it has never had these
        return
    assert config["num_experts"] > 0
    rope = dict(config["rope_parameters"])
    assert config["rope_theta"] == rope.pop("rope_theta")
    assert config.get("rope_scaling") == (rope if rope["rope_type"] != "default" else None)


def test_no_file_names_a_class_that_only_transformers_5_has(folder):
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix in (".json", ".py"):
            assert not re.search(r"TokenizersBackend|PreTrainedConfig", file.read_text()), file


@pytest.mark.parametrize(("key", "value"), [("torch_dtype", "float16"), ("num_experts", 128), ("rope_theta", 7.0)])
def test_verify_reports_two_spellings_that_disagree(folder, key, value):
    path = folder / "config.json"
    before = path.read_text()
    config = json.loads(before)
    if config["model_type"] == "mimo_v2" and key != "torch_dtype":
        pytest.skip("a key of one name only")
    path.write_text(json.dumps(config | {key: value}))
    try:
        found = verify.verify(folder)
    finally:
        path.write_text(before)
    assert any(f"{key}={value!r}, but" in text for text in found.findings)


@pytest.mark.parametrize(("config", "expected"), [
    ({"model_type": "qwen3_moe", "rope_theta": 5e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
    ({"model_type": "qwen3_moe", "rope_theta": 5e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
     {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e6}}),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, {}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ({"num_experts": 3, "torch_dtype": "bfloat16"}, {"num_local_experts": 3, "dtype": "bfloat16"}),
    ({"model_type": "mimo_v2", "rope_theta": 5e6}, {}),
])
def test_a_configuration_of_either_age_gets_the_other_spelling_and_keeps_its_own(config, expected):
    assert both_spellings(config) == config | expected


def test_tokenizer_files_are_shipped_byte_for_byte(tmp_path):
    recipe = make_run(tmp_path, drafter=False)
    trained = tmp_path / "runs/toy/qat/model"
    for name, text in {"tokenizer_config.json": '{"eos_token":  "<e>",\n"tokenizer_class": "PreTrainedTokenizerFast"}',
                       "tokenizer.json": '{"model": {"vocab": {"a":  0}}}', "chat_template.jinja": "{{ messages }} \n"}.items():
        (trained / name).write_text(text)
    out = export(recipe)
    held = [name for name in TOKENIZER if (trained / name).is_file()]
    assert len(held) == 3
    assert all((out / name).read_bytes() == (trained / name).read_bytes() for name in held)


def test_a_tokenizer_saved_by_transformers_5_is_put_into_words_that_4_knows(tmp_path):
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True,
                                "local_files_only": False, "extra_special_tokens": ["<u>"], "eos_token": "<é>"}))
    assert json.loads(shipped_bytes(file)) == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<é>",
                                               "additional_special_tokens": ["<u>"]}
    file.write_text('{"tokenizer_class":   "Qwen2Tokenizer", "extra_special_tokens": {"u": "<u>"}}')
    assert shipped_bytes(file) == file.read_bytes()
