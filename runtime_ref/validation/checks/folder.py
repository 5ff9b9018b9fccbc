"""Check 1: is the folder what the format says? The findings of the one verifier (`checkpoint.verify`), each with the port bug
that it looks like, and what later checks need to know of the folder.

What is certainly wrong fails here. What is merely odd (sinks that are all zero) is a suspicion: it is wrong if outputs disagree
with a reference, and a note otherwise. What only this project's exporter promises is demanded of its folders alone, those that
carry its stored reference included; engines' different readings of others are notes with the engines' names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from checkpoint.families.geometry import NotHeld
from checkpoint.inventory import layout_of, scale_name
from checkpoint.tensor_files import REFERENCE, TensorFiles
from checkpoint.verify import Finding, Verification, verify
from modeling.drafter import read_mask
from modeling.names import fused_name
from runtime_ref.checkpoints.folder import drafter_folder, read_geometry
from runtime_ref.validation.checks import folder_causes as causes
from runtime_ref.validation.checks.tensors import Matrix, look_at_experts
from runtime_ref.validation.context import (
    INCOMPLETE_CAUSE,
    ValidationContext,
    Wrong,
    condensed,
    line_within,
    own_object,
    read_object,
)
from runtime_ref.validation.quantities import Number
from runtime_ref.validation.result import Check
from storage.reading import first_line
from storage.terminal import counted

MASK_FILE = "mask_embedding.pt"
# Kinds of findings that other checks make, with more to say; kinds that every folder with a stored reference owes.
ELSEWHERE = {"checksum", "reference"}
OWED = {"dialect", "mask", "dtype", "drafter"}
# Kinds of findings after which nothing can be loaded.
FATAL = {"missing", "unexpected", "shape", "index", "file", "values", "layout", "config"}
# Keys of other families that change what runs, and what a client that honours them would do wrong.
FOREIGN_KEYS = {
    "swiglu_limit": "SwiGLU is clamped as in gpt-oss: MiMo-V2's experts have no clamp",
    "swiglu_alpha": "SwiGLU of gpt-oss (alpha, clamp): MiMo-V2's experts use plain SiLU",
    "n_shared_experts": "shared experts: MiMo-V2 has none",
    "final_logit_softcapping": "logits are capped: MiMo-V2 has no cap",
}
LENGTH_CAUSE = ("the drafter is given positions beyond its trained length: engines that pass absolute positions lose most of "
                "its acceptance there")


def check_folder(check: Check, context: ValidationContext) -> None:
    """Adds what is wrong with the folder to `check`, and what later checks need to `context`.

    Raises:
        NotHeld: a folder of a model or layout that the engine does not run.
    """
    folder = context.folder
    context.loadable = False
    try:
        context.raw = read_object(folder / "config.json")
        _refuse_oversize(folder, context.raw)
        context.config = _geometry(folder, context.raw)
    except Wrong as error:
        check.fail(str(error), error.cause)
        return
    context.family = context.raw["model_type"]
    if not _packed(check, context):
        return
    context.loadable = context.drafter_loadable = True
    found = verify(folder, sums=False)
    _take(check, context, found)
    if context.family == "mimo_v2":
        for key, cause in FOREIGN_KEYS.items():
            if context.raw.get(key) not in (None, 0, 0.0):
                check.fail(f"config.json: {key}: {context.raw[key]}, expected no such key", cause)
    if context.loadable:
        files = TensorFiles(folder)
        look_at_experts(check, context, _matrices(files, layout_of(context.raw)))
        sinks = [n for n in files if n.endswith(("attention_sink_bias", "self_attn.sinks")) and "mtp." not in n]
        if sinks and not any(bool(files.read(n).any()) for n in sinks):
            context.suspicions.append(("all attention sinks of the target are zero", causes.SINKS))
    _drafter(check, context)
    check.findings = condensed(check.findings)
    check.notes = condensed(check.notes)
    check.measure(Number.TENSORS, found.tensors)
    check.measure(Number.DRAFTER, (folder / "dflash").is_dir())
    check.measure(Number.STORED_REFERENCE, context.reference is not None)


def _refuse_oversize(folder: Path, raw: dict) -> None:
    """Refuses sizes beyond what the files hold, before anything of that size is made.

    Raises:
        Wrong.
    """
    try:
        tensors = len(TensorFiles(folder).infos)
    except (ValueError, OSError, SafetensorError, KeyError, TypeError):
        tensors = 0  # what is wrong with the files is for the verifier to say
    experts = () if raw.get("model_type") == "gpt_oss" else ("n_routed_experts", "num_experts")
    for key in ("num_hidden_layers", *experts):
        value = raw.get(key)
        if isinstance(value, int) and value > max(tensors, 1000):
            raise Wrong(f"config.json: {key}: {value}, but the files hold {counted(tensors, 'tensor')}", causes.IMPOSSIBLE)


def _geometry(folder: Path, raw: dict):
    """The configuration of a folder that the engine runs.

    Raises:
        Wrong: a geometry that cannot be. NotHeld.
    """
    stored = raw.get("quantization_config")
    if stored is not None and not isinstance(stored, dict):
        raise Wrong(f"config.json: quantization_config: {type(stored).__name__}, expected an object", INCOMPLETE_CAUSE)
    try:
        return read_geometry(folder)[0]
    except NotHeld:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise Wrong(line_within(error, folder), causes.IMPOSSIBLE) from None


def _packed(check: Check, context: ValidationContext) -> bool:
    """Whether config.json says that the experts are MXFP4, and they are packed in the form that it says."""
    section = context.raw.get("quantization_config") or {}
    if context.family == "mimo_v2":
        for key, expected in (("quant_method", "fp8"), ("store_dtype", "mxfp4")):
            if section.get(key) != expected:
                check.fail(f"config.json: quantization_config.{key}: {section.get(key)!r}, expected {expected!r}",
                           causes.FORMAT.format(mark="quant_method fp8 with store_dtype mxfp4 marks them"))
        return check.status != "failed"
    try:
        names = list(TensorFiles(context.folder))
    except (ValueError, OSError, SafetensorError, KeyError, TypeError):
        return True  # what is wrong with the files is for the verifier to say
    ending = "_blocks" if context.family == "gpt_oss" else "_packed"
    if names and not any(name.endswith(ending) for name in names):
        check.fail(f"config.json describes experts called ...{ending}, and there are none", causes.OTHER_LAYOUT)
    return check.status != "failed"


def _take(check: Check, context: ValidationContext, found: Verification) -> None:
    """The verifier's findings, with causes, and what they mean for loading."""
    owed = [note for note in found.notes if context.ours and note.kind in OWED]
    for finding in (*found.wrong, *owed):
        if finding.kind in ELSEWHERE:
            continue
        cause = causes.cause_of(finding.kind, finding.text, context.family)
        check.fail(finding.text, cause)
        _weigh(context, finding, cause)
    check.notes += [note.text for note in found.notes if note not in owed]
    check.unchecked += [finding.text for finding in found.unchecked if finding.kind not in ELSEWHERE]


def _weigh(context: ValidationContext, finding: Finding, cause: str) -> None:
    floats = finding.kind == "dtype" and not any(word in finding.text for word in ("U8", "I8", "F8"))
    fatal = finding.kind in FATAL or finding.kind == "dtype" and not floats
    if finding.text.startswith("dflash"):
        context.drafter_loadable &= not (fatal or finding.kind == "mask" and "zero" not in finding.text
                                         or finding.kind == "drafter" and ("target" in finding.text
                                                                           or "cannot be checked" in finding.text))
        return
    context.loadable &= not fatal or finding.kind == "config" and "cannot be checked" not in finding.text
    if floats:
        context.explained = cause


def _matrices(files: TensorFiles, layout: str) -> Iterator[Matrix]:
    """The packed experts; of gpt-oss one expert of a fused tensor at a time."""
    for name in files:
        scale = None if name.startswith("model.mtp.") else scale_name(layout, name)
        if scale is None or scale not in files.infos:
            continue
        codes, scales = files.read(name), files.read(scale)
        if codes.ndim == 4:
            for e in range(codes.shape[0]):
                yield Matrix(f"{name}[{e}]", f"{scale}[{e}]", (name,), codes[e].flatten(1), scales[e])
        else:
            fused = fused_name(name.removesuffix("_packed"))
            group = (fused[0], fused[2]) if fused else (name.partition(".experts.")[0], name.rpartition(".experts.")[2][-20:])
            yield Matrix(name, scale, group, codes, scales)


def _drafter(check: Check, context: ValidationContext) -> None:
    """What the verifier does not look at: whether there must be a drafter, its mask's row, positions, the stored reference."""
    folder = context.folder
    dflash = drafter_folder(folder)
    if dflash is None:
        context.drafter_loadable = False
        if (folder / "dflash").is_dir():
            check.fail("dflash/config.json is missing", "the drafter's folder is incomplete")
        elif own_object(folder / "export.json").get("drafter") is True:
            check.fail("dflash/ is missing, export.json says that there is a drafter", "the drafter's folder is incomplete")
        else:
            check.notes.append("no drafter (dflash/): decoding is plain")
        return
    context.drafter_config = own_object(dflash / "config.json")
    special = context.drafter_config.get("dflash_config")
    if not isinstance(special, dict) or not (dflash / MASK_FILE).is_file():
        if isinstance(special, dict):
            check.fail(f"dflash/{MASK_FILE} is missing", causes.MASK)
        context.drafter_loadable = False
        return
    trained, reached = context.drafter_config.get("max_position_embeddings"), context.config.max_position_embeddings
    if isinstance(trained, int) and trained < reached:
        check.notes.append(f"dflash/config.json: max_position_embeddings {trained}, the target has {reached}: {LENGTH_CAUSE}")
    if context.loadable and context.drafter_loadable:
        _mask_elsewhere(check, folder, dflash)
    if (dflash / REFERENCE).is_file():
        _read_reference(check, context, dflash / REFERENCE, special)


def _mask_elsewhere(check: Check, folder: Path, dflash: Path) -> None:
    """Is the mask embedding in another row of the vocabulary than the mask token's?"""
    token, vector = read_mask(dflash / MASK_FILE)
    table = TensorFiles(folder).read("model.embed_tokens.weight")
    same = torch.nonzero((table == vector.to(table.dtype)).all(1)).flatten().tolist() if bool(vector.any()) else []
    if same and token not in same:
        check.fail(f"mask_token_id {token}, but vocabulary row {same[0]} is the embedding of {MASK_FILE}", causes.MASK_ID)


def _read_reference(check: Check, context: ValidationContext, path: Path, special: dict) -> None:
    try:
        with safe_open(str(path), framework="pt") as file:
            context.reference = {key: file.get_tensor(key) for key in file.keys()}
            context.reference_info = json.loads((file.metadata() or {}).get("reference", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        check.fail(f"dflash/{path.name}: {first_line(error)}", "the stored reference is damaged")
        context.reference = None
        return
    expected = {"input_ids": 2, "taps": 4, "draft_hidden": 3, "draft_logits": 3}
    bad = [n for n, dims in expected.items() if n not in context.reference or context.reference[n].ndim != dims]
    if bad or not isinstance(context.reference_info, dict):
        check.fail(f"dflash/{path.name}: {bad[0] if bad else 'its metadata'}: missing or of another form",
                   "the stored reference is damaged")
        context.reference, context.reference_info = None, {}
        return
    rows = context.reference["draft_hidden"].shape[1]
    block = special.get("block_size", context.drafter_config.get("block_size"))
    if rows != block:
        check.fail(f"dflash_config.block_size {block}, the stored reference drafts {rows} positions", causes.BLOCK_SIZE)
    stored, own = context.reference_info.get("target_layer_ids"), special.get("target_layer_ids")
    if stored is not None and stored != own:
        check.fail(f"dflash_config.target_layer_ids {own}, the stored reference has {stored}",
                   causes.TARGET_LAYERS if sorted(stored) != sorted(own or []) else
                   "target layers are in another order (target_layer_ids): the features are concatenated in this order")
