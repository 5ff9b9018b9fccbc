"""The tokenizer's files of a checkpoint: never trained, so they are handed on byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")
# What some tokenizers have beside them: code of their own, vocabularies of other libraries, further templates.
MORE = ("tokenization_*.py", "*.tiktoken", "tiktoken.model", "tekken.json", "additional_chat_templates/*.jinja")
# What transformers 5 writes for a tokenizer without a class of its own, and the class that 4 and 5 both know.
_NEW_CLASS, _OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
_NEW_KEYS = ("backend", "is_local", "local_files_only")


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the tokenizer's files that `folder` has."""
    more = {path.relative_to(folder).as_posix() for pattern in MORE for path in folder.glob(pattern) if path.is_file()}
    return [name for name in TOKENIZER if (folder / name).is_file()] + sorted(more)


def shipped_bytes(path: Path) -> bytes:
    """The file as an export ships it: as it is, except that a tokenizer_config.json which only transformers 5 can read (its
    class name) is put into the words that 4 knows too.

    Raises:
        ValueError: a tokenizer_config.json that is no JSON object.
    """
    data = path.read_bytes()
    if path.name != "tokenizer_config.json" or _NEW_CLASS.encode() not in data:
        return data
    settings = json.loads(data)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object")
    if settings.get("tokenizer_class") != _NEW_CLASS:
        return data
    settings = {k: v for k, v in settings.items() if k not in _NEW_KEYS} | {"tokenizer_class": _OLD_CLASS}
    if isinstance(settings.get("extra_special_tokens"), list):  # in 4 it is a mapping
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def copy_tokenizer(folder: Path, out: Path) -> list[str]:
    """Copies the tokenizer's files that `folder` has, byte for byte; returns their names."""
    names = tokenizer_files(folder)
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, out / name)
    return names
