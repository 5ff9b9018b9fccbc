"""The code speaks the field's words: identifiers that were given up stay away."""

import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Retired identifier -> what it is called now; by the rooms where it must not come back.
RETIRED = {
    ("runtime_ref", "tests/runtime_ref", "benchmarks"): {
        "Span": "SequenceChunk", "Reach": "AttentionMetadata", "judge_on_device": "verify_on_device",
        "take_prefix": "match_prefix",
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
