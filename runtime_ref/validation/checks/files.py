"""Check 0: the files beside the weights, and whether anything changed since the export.

Checksums first: a damaged or edited file explains whatever else is found. `checksums.sha256` says which file differs,
`checksums.json` (CRC-32 of each tensor's bytes, written while exporting) which tensors in it, and `diagnosis/file_changes.py`
what was done to them.

Then what turns text into tokens and ends answers. None of it touches a logit, so no comparison of outputs can find it: a
wrong end token makes answers run on, a chat template of another family makes the tokenizer spell its marks out letter by
letter, a larger tokenizer sends ids that the embedding does not have. What is a matter of taste (no template at all) is a
note, not a failure.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from runtime_ref.checkpoints.folder import CHECKSUM_FILE
from runtime_ref.validation.checks.chat_template import check_template
from runtime_ref.validation.context import INCOMPLETE_CAUSE, ValidationContext, Wrong, line_within, read_object
from runtime_ref.validation.diagnosis.file_changes import TRIED, causes_of_tensors, crc, edited_keys, meaning_of
from runtime_ref.validation.quantities import Number
from runtime_ref.validation.result import Check
from storage.reading import first_line

TENSOR_SUMS = "checksums.json"
DAMAGED_CAUSE = "a file is not the one that was exported: a damaged or partial download, or edited afterwards"
TOKENIZER_CAUSE = "the tokenizer is not this model's: its ids must be those of the vocabulary, special tokens included"
STOP_CAUSE = "answers end at the wrong token: generation_config.json, config.json and the tokenizer must agree on eos_token_id"
GENERATION_CAUSE = "generation_config.json cannot be used: clients take sampling defaults and end tokens from it"

def check_files(check: Check, context: ValidationContext, *, checksums: bool) -> None:
    """Adds what is wrong with the files beside the weights.

    Args:
        checksums: read every file and compare.
    """
    folder, raw = context.folder, context.raw
    special = context.drafter_config.get("dflash_config")
    special = special if isinstance(special, dict) else {}
    if checksums:
        _checksums(check, context)
    else:
        check.unchecked.append("the files' checksums: a folder of this size is compared with --checksums only")
    generation = _generation_config(check, folder)
    if not raw:
        check.notes.append("the tokenizer was not looked at: config.json cannot be read")
    elif (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        _tokenizer(check, folder, raw, special, generation)
    else:
        check.notes.append("no tokenizer: the runtime decodes token ids only, the server cannot serve this folder")
    if (folder / "export.json").is_file():
        try:
            read_object(folder / "export.json")
        except Wrong as error:
            check.fail(str(error), error.cause)


def _checksums(check: Check, context: ValidationContext) -> None:
    folder = context.folder
    if not (folder / CHECKSUM_FILE).is_file():
        if (folder / "export.json").is_file():
            check.fail(f"{CHECKSUM_FILE} is missing, every export has it", INCOMPLETE_CAUSE)
        else:
            check.unchecked.append(f"whether files changed since they were published: the folder has no {CHECKSUM_FILE}")
        return
    lines = (folder / CHECKSUM_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    compared, damaged = 0, []
    for number, line in enumerate(filter(str.strip, lines), 1):
        expected, _, name = line.partition("  ")
        path = folder / name.strip().lstrip("*")
        if not re.fullmatch(r"[0-9a-f]{64}", expected) or folder.resolve() not in path.resolve().parents:
            check.fail(f"{CHECKSUM_FILE}:{number}: {line[:80]!r}, expected a SHA-256 and a file of this folder", DAMAGED_CAUSE)
        elif not path.is_file():
            check.fail(f"{name} is missing, {CHECKSUM_FILE} lists it", DAMAGED_CAUSE)
        else:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            compared += 1
            if found != expected:
                damaged.append(name)
                where, causes = _damage(folder, name, expected)
                check.fail(f"{name}: sha256 {found[:12]}..., exported with {expected[:12]}...{where}",
                           None if causes else DAMAGED_CAUSE)
                for cause in causes:
                    check.fail(f"{name}: undoing this gives the exported bytes: {cause}", cause)
    check.measure(Number.FILES_COMPARED, compared)
    check.measure(Number.FILES_DIFFERENT, len(damaged), 0)


def _damage(folder: Path, name: str, expected: str) -> tuple[str, list[str]]:
    """What of a file that differs can be told: (where in it, the causes that are proved)."""
    if name == "config.json":
        edited = edited_keys(folder / name, expected)
        return (f": {edited[0]}" if edited else ""), [meaning_of(line) for line in edited if "exported with" in line]
    if not name.endswith(".safetensors"):
        return "", []
    prefix = "dflash/" if name.startswith("dflash/") else ""
    try:
        sums = json.loads((folder / TENSOR_SUMS).read_text(encoding="utf-8"))["tensors_crc32"]
        with safe_open(str(folder / name), framework="pt") as file:
            listed = [key for key in file.keys() if prefix + key in sums]
            wrong = [key for key in listed if crc(file.get_tensor(key)) != sums[prefix + key]]
            causes = causes_of_tensors({prefix + key: file.get_tensor(key) for key in wrong[:TRIED]}, sums)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        return f" (which tensors, is not known: {first_line(error)[:80]})", []
    if not listed:
        return "", []
    where = f"the first {wrong[0]}" if wrong else ""
    return f": {len(wrong)} of {len(listed)} tensors differ{', ' + where if wrong else ' (its header does)'}", causes


def _generation_config(check: Check, folder: Path) -> dict:
    from runtime_ref.core.sampling_params import SamplingParams

    file = folder / "generation_config.json"
    if not file.is_file():
        check.notes.append("no generation_config.json: end tokens are those of config.json")
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        check.fail(f"generation_config.json: not valid JSON: {first_line(error)}", GENERATION_CAUSE)
        return {}
    if not isinstance(found, dict):
        check.fail(f"generation_config.json: {type(found).__name__}, expected an object", GENERATION_CAUSE)
        return {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    sampling = {name: found[name] for name in names if found.get(name) is not None}
    if isinstance(sampling.get("top_k"), int):
        sampling["top_k"] = max(0, sampling["top_k"])  # -1 is another way to say off
    try:
        SamplingParams(**sampling)
    except (ValueError, TypeError) as error:
        check.fail(f"generation_config.json: {error}", GENERATION_CAUSE)
    return found


def _ids(value) -> list[int]:
    """Token ids of a key that may hold one, several or none."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _tokenizer(check: Check, folder: Path, raw: dict, special: dict, generation: dict) -> None:
    from checkpoint.load import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:  # transformers reads config.json for it too
        check.fail(f"no usable tokenizer: {line_within(error, folder)}".replace("no usable tokenizer: no usable", "no usable"),
                   TOKENIZER_CAUSE if raw else INCOMPLETE_CAUSE)
        return
    size = raw.get("vocab_size") if isinstance(raw.get("vocab_size"), int) else 0
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((i, t) for t, i in vocabulary.items() if i >= size)
    check.measure(Number.TOKENIZER_SIZE, len(vocabulary), size)
    check.measure(Number.VOCABULARY_ROWS, size)
    if beyond:
        check.fail(f"tokenizer: {beyond[0][1]!r} is token {beyond[0][0]}, the vocabulary has {size} rows", TOKENIZER_CAUSE)
    _round_trip(check, tokenizer)
    mask = special.get("mask_token_id")
    if mask is not None and tokenizer.mask_token_id not in (None, mask):
        check.fail(f"dflash_config.mask_token_id {mask} is {tokenizer.convert_ids_to_tokens(mask)!r}, the tokenizer's mask "
                   f"token {tokenizer.mask_token!r} is {tokenizer.mask_token_id}",
                   "the mask token has another id in the drafter's configuration than in the tokenizer")
    _end_tokens(check, tokenizer, raw, generation, size)
    check_template(check, tokenizer, folder)


def _round_trip(check: Check, tokenizer) -> None:
    text = "Naïve café, 东京: x = [1, 2]\n\tdef f(): pass  # 😀"
    back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
    if back != text:
        check.notes.append(f"the tokenizer does not give back what it was given: {back[:60]!r} for {text!r}")


def _end_tokens(check: Check, tokenizer, raw: dict, generation: dict, size: int) -> None:
    """The end tokens that the runtime uses against those that the other files name."""
    ends, config = _ids(generation.get("eos_token_id")), _ids(raw.get("eos_token_id"))
    own = _ids(tokenizer.eos_token_id)
    for where, held in (("generation_config.json", generation), ("config.json", raw)):
        value = held.get("eos_token_id")
        for item in value if isinstance(value, list) else [value]:
            if item is not None and (not isinstance(item, int) or isinstance(item, bool)):
                check.fail(f"{where}: eos_token_id {item!r}, expected a token's number", STOP_CAUSE)
    for where, ids in (("generation_config.json", ends), ("config.json", config)):
        for wrong in (i for i in ids if not 0 <= i < size):
            check.fail(f"{where}: eos_token_id {wrong}, expected 0 to {size - 1}", STOP_CAUSE)
    used = ends or config
    if not used and not own:
        check.notes.append("no end token anywhere: answers end by length only")
    elif not used:
        check.fail(f"neither generation_config.json nor config.json has eos_token_id, the tokenizer's is {own[0]}", STOP_CAUSE)
    elif own and not set(used) & set(own) and not (set(used) & set(config) and _turn_end(tokenizer, used)):
        check.fail(f"eos_token_id {used} ({tokenizer.convert_ids_to_tokens(used[0])!r}) of "
                   f"{'generation_config.json' if ends else 'config.json'}, the tokenizer's end token is {own[0]} "
                   f"({tokenizer.eos_token!r})", STOP_CAUSE)


def _turn_end(tokenizer, ids: list[int]) -> bool:
    """Whether all of these are special tokens: families end turns with another one than texts."""
    return set(ids) <= set(tokenizer.all_special_ids)
