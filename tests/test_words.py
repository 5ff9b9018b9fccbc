"""The project speaks the field's words: identifiers and words that were given up stay away; a file that is named is there."""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Retired identifier -> what it is called now; by the rooms where it must not come back.
RETIRED = {
    ("runtime_ref", "tests/runtime_ref", "benchmarks"): {
        "Span": "SequenceChunk", "Reach": "AttentionMetadata", "judge_on_device": "verify_on_device",
        "take_prefix": "match_prefix", "hopeless": "disabled", "heat": "temperatures",
        "forget_behind": "evict_outside_window", "PersistentStep": "Megakernel", "PersistentDraft": "MegakernelDrafter",
        "table_of": "encode_program", "walk_options": "launch_options", "NativeBackend": "CBackend",
        "NativeDrafter": "CDrafter", "NativeStep": "CStep", "IN_BYTES": "--drafter-precision int8", "Proposer": "Drafter",
        "load_runtime_drafter": "Backend.load_drafter", "native_tiles": "blackwell_mxfp4"},
    ("runtime_ref/core", "runtime_ref/backends", "runtime_ref/engine", "runtime_ref/kernels"): {
        "ALONE": "SINGLE_RANK", "Task": "Op", "target_tasks": "target_program", "check_tasks": "check_program",
        "Wanted": "DraftRequest", "Work": "ScheduledSequence", "Verdict": "VerifyResult", "tasks": "program",
        "coarse": "int8", "dots": "bf16_dot", "twin": "reference", "walk": "megakernel",
        "taps": "target_hidden or target_layers", "tapped_from": "hidden_from", "pending_taps": "pending_hidden"},
    ("runtime_ref/kernels", "runtime_ref/checkpoints", "runtime_ref/backends/triton", "runtime_ref/measure"): {
        "native": "hw_fp4", "NATIVE": "HW_FP4"},
}
FILES = [(path, words) for rooms, words in RETIRED.items() for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def identifiers(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    return {token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.NAME}


@pytest.mark.parametrize("rooms", RETIRED, ids=lambda rooms: rooms[0])
def test_retired_identifiers_stay_away(rooms):
    words = RETIRED[rooms]
    found = [f"{path.relative_to(ROOT)}: {word}, which is called {words[word]} now"
             for path, own in FILES if own is words for word in sorted(identifiers(path) & words.keys())]
    assert not found, "\n".join(found)


# Word of code, comments, docstrings, test names and pages -> what the field says.
WORDS = {
    r"walk(s|ed|ing)?": "megakernel", r"persistent step": "megakernel", r"task list": "program", r"manieth": "ordinal",
    r"taps?|tapped": "target_hidden, target layers, aux_hidden_states", r"twins?": "reference", r"company": "other rows",
    r"dialects?": "alias", r"suspects?|culprits?": "fault hypothesis", r"played": "mocked", r"rehears(e|es|al)": "dry run",
    r"first codes": "initial codes"}
# What stays: functions of the standard library, and keys of JSON and of tensor files that others may read.
KEPT = re.compile(r"\b(ast|os)\.walk\b|(?<![\w ])(walk|walked_as_op_by_op|taps(\.bf16)?|dialect)(?=[\"`])"
                  r"|(?<=[\"'`, ])walked(?=[\"'`,:])")
RETIRED_WORDS = re.compile(rf"(?<![a-z])({'|'.join(WORDS)})(?![a-z])", re.IGNORECASE)
ROOMS = ("benchmarks", "checkpoint", "dflash_train", "docs", "export", "modeling", "mxfp4", "qat", "recipes", "runtime_ref",
         "storage", "tests", "tools", "training")
TEXTS = [path for path in (*ROOT.glob("*.md"), *(p for room in ROOMS for p in sorted((ROOT / room).rglob("*"))))
         if path.suffix in (".py", ".md", ".c", ".h", ".yaml")]


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of each line."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        yield f"{path.relative_to(ROOT)}:{number}", line


def test_retired_words_stay_away():
    found = [f"{where}: {match[0]}" for path in TEXTS if path != Path(__file__) for where, line in lines(path)
             for match in RETIRED_WORDS.finditer(KEPT.sub("", line))]
    assert not found, "\n".join(found)


def test_a_file_that_a_page_or_a_docstring_names_is_there():
    """A path in backticks ends as a path of the repository does."""
    ours = {"/".join(path.relative_to(ROOT).parts[-n:]) for path in TEXTS for n in range(1, 6)}
    theirs = {"zero_to_fp32.py", "dflash/dflash.py", "_fsdp_param.py"}  # of DeepSpeed, of DFlash's authors, of torch
    named = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|c|h|md))`")
    lost = [f"{where}: {name}" for path in TEXTS for where, line in lines(path)
            for name in named.findall(line) if name not in ours | theirs]
    assert not lost, "\n".join(lost)
