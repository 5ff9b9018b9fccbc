"""The drafter's folder `dflash/`, and what ties it to the target.

    config.json                         every released key and the explicit ones (written in training)
    dflash_draft_model.safetensors      published names, without `model.` prefix; model.safetensors.index.json beside it
    mask_embedding.pt                   the vector of the masked positions; the same vector is in the target's vocabulary row
    dflash.py, block_mask.py            the drafter's code, for AutoModel with trust_remote_code
    dflash_reference.safetensors        one worked example: inputs, tapped hidden states, draft logits

The mask token's row of a target's embedding is untrained, and an engine that does not know mask_embedding.pt reads that
row; with the vector in both places the drafter works either way.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoint.open import open_source
from checkpoint.sources import Source
from export.layouts import Unit
from export.shards import index_json, plan_shards, tensor_bytes, write_shard
from modeling.drafter import read_mask
from modeling.names import PublishedTensor
from storage.reading import read_json, refuse_pointer

EMBEDDING = "model.embed_tokens.weight"
STEM = "dflash_draft_model"
REFERENCE = "dflash_reference.safetensors"
MASK = "mask_embedding.pt"
CODE = {"drafter.py": "dflash.py", "block_mask.py": "block_mask.py"}
# Text positions before the anchor in the reference, at least. A text that ends inside the windows cannot tell a wrong window
# from the right one, so it goes this far beyond them where its features stay small beside the weights.
REFERENCE_TOKENS = 40
BEYOND_WINDOW = 24
REFERENCE_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class TrainedDrafter:
    """A drafter as training left it: folder, configuration, mask token and its bf16 embedding [hidden]."""

    folder: Path
    config: dict
    mask_token_id: int
    embedding: torch.Tensor

    @property
    def target_layer_ids(self) -> list[int]:
        return self.config["dflash_config"]["target_layer_ids"]


def open_drafter(folder: Path, target_config) -> TrainedDrafter | None:
    """The trained drafter in `folder`, or None if there is no such folder.

    Raises:
        ValueError: files that are missing or do not fit the target: size, vocabulary, tapped layers.
    """
    if not folder.is_dir():
        return None
    config = read_json(folder / "config.json")
    if not (folder / MASK).is_file():
        raise ValueError(f"{folder}: {MASK} is missing: without it nearly every draft is rejected")
    refuse_pointer(folder / MASK)
    token, embedding = read_mask(folder / MASK)
    drafter = TrainedDrafter(folder, config, token, embedding.to(torch.bfloat16))
    faults = drafter_faults(config, target_config, drafter.mask_token_id, drafter.embedding)
    if faults:
        raise ValueError(f"{folder}: {faults[0]}")
    _weights(drafter)  # before the target is written
    return drafter


def _weights(drafter: TrainedDrafter) -> tuple[Source, dict[str, tuple[tuple[int, ...], str]]]:
    """(The drafter's tensors, what they must be); ValueError for one that is missing or unknown."""
    source, expected = open_source(drafter.folder), expected_tensors(drafter.config)
    missing, extra = sorted(expected.keys() - source.infos.keys()), sorted(source.infos.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{drafter.folder}: drafter tensors missing {missing or 'none'}, unexpected {extra or 'none'}")
    return source, expected


def drafter_faults(config: dict, target, mask_token_id: int, embedding: torch.Tensor) -> list[str]:
    """What keeps this drafter from working with the target; empty if nothing does."""
    special, faults = config.get("dflash_config") or {}, []
    layers = target.num_hidden_layers
    ids = special.get("target_layer_ids")
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and 0 <= i < layers for i in ids):
        faults.append(f"dflash_config.target_layer_ids={ids}: expected layers from 0 to {layers - 1}")
    elif len(set(ids)) != len(ids):
        faults.append(f"dflash_config.target_layer_ids={ids}: a layer occurs twice")
    for where, value in (("dflash_config", special.get("num_target_layers", layers)),
                         ("config.json", config.get("num_target_layers"))):
        if value != layers:
            faults.append(f"{where}: num_target_layers={value}, the target has {layers}")
    if config.get("hidden_size") != target.hidden_size:
        faults.append(f"hidden_size={config.get('hidden_size')}, the target's is {target.hidden_size}")
    if config.get("vocab_size") != target.vocab_size:
        faults.append(f"vocab_size={config.get('vocab_size')}, the target's is {target.vocab_size}")
    token = special.get("mask_token_id")
    if not isinstance(token, int) or not 0 <= token < target.vocab_size:
        faults.append(f"dflash_config.mask_token_id={token}: expected 0 to {target.vocab_size - 1}")
    elif token != mask_token_id:
        faults.append(f"dflash_config.mask_token_id={token}, {MASK} has {mask_token_id}")
    if tuple(embedding.shape) != (target.hidden_size,):
        faults.append(f"{MASK}: embedding of shape {list(embedding.shape)}, expected [{target.hidden_size}]")
    elif not bool(torch.isfinite(embedding).all()):
        faults.append(f"{MASK}: the embedding is not finite")
    return faults + dialect_faults(config)


def dialect_faults(config: dict) -> list[str]:
    """Keys that engines read differently and that must therefore all be there and agree: window and causality."""
    special, faults = config.get("dflash_config") or {}, []
    causal, window = bool(special.get("causal", False)), special.get("swa_window_size") if special.get("use_swa") else None
    kind = "full_attention" if window is None else "sliding_attention"
    expected = {"is_causal": causal, "sliding_window": window, "use_sliding_window": window is not None,
                "layer_types": [kind] * (config.get("num_hidden_layers") or 0), "block_size": special.get("block_size")}
    for key, value in expected.items():
        if key not in config:
            faults.append(f"{key} is missing, expected {value!r}: engines differ in what they assume")
        elif config[key] != value:
            faults.append(f"{key}={config[key]!r} contradicts dflash_config, expected {value!r}")
    if "rope_parameters" not in config:
        faults.append("rope_parameters is missing")
    else:
        faults += rotary_faults(config, special)
    if config.get("architectures") != ["DFlashDraftModel"]:
        faults.append(f"architectures={config.get('architectures')!r}, expected ['DFlashDraftModel']")
    if window is not None and config.get("max_window_layers") != 0:
        faults.append(f"max_window_layers={config.get('max_window_layers')!r}, expected 0: engines see the whole context in "
                      "the layers below it")
    if "causal" not in special:
        faults.append(f"dflash_config.causal is missing, expected {causal}")
    return faults


def rotary_faults(config: dict, special: dict) -> list[str]:
    """The rotation is said three times, and engines differ in which they believe."""
    rope, faults = config["rope_parameters"], []
    base, share = rope.get("rope_theta"), rope.get("partial_rotary_factor", 1.0)
    for key, value, wanted in (("rope_theta", config.get("rope_theta", base), base),
                               ("dflash_config.backbone_rotary_base", special.get("backbone_rotary_base", base), base),
                               ("partial_rotary_factor", config.get("partial_rotary_factor", share), share)):
        if value != wanted:
            faults.append(f"{key}={value!r} contradicts rope_parameters, which has {wanted!r}")
    return faults


def with_mask_row(units: list[Unit], drafter: TrainedDrafter) -> list[Unit]:
    """The target's units with the mask embedding written into its vocabulary row."""

    def replace(unit: Unit) -> Unit:
        if unit.tensors[0].name != EMBEDDING:
            return unit

        def make() -> list[torch.Tensor]:
            table = unit.make()[0].clone()
            table[drafter.mask_token_id] = drafter.embedding.to(table.dtype)
            return [table]

        return dataclasses.replace(unit, make=make)

    return [replace(unit) for unit in units]


def expected_tensors(config: dict) -> dict[str, tuple[tuple[int, ...], str]]:
    """Every tensor of the drafter's file, from its configuration: name -> (shape, dtype)."""
    from transformers import Qwen3Config

    from modeling.drafter import DFlashDraftModel

    with torch.device("meta"):
        model = DFlashDraftModel(Qwen3Config.from_dict(dict(config)))
    return {n: (tuple(p.shape), "BF16") for n, p in model.named_parameters() if n != "mask_embedding"}


def write_drafter(drafter: TrainedDrafter, out: Path, shard_bytes: int) -> dict[str, str]:
    """Writes `dflash/` without the reference; returns the CRC-32 of its tensors, by "dflash/<name>".

    Raises:
        ValueError: a tensor that is missing, unknown or of another shape.
    """
    out.mkdir(parents=True, exist_ok=True)
    source, expected = _weights(drafter)
    units = [Unit((PublishedTensor(n, shape, dtype),), lambda n=n: [source.read(n).to(torch.bfloat16)])
             for n, (shape, dtype) in expected.items()]
    shards = plan_shards(units, shard_bytes, STEM)
    if len(shards) == 1:
        shards = [dataclasses.replace(shards[0], name=f"{STEM}.safetensors")]
    sums = {}
    for shard in shards:
        sums |= {f"dflash/{name}": crc for name, crc in write_shard(shard, out).items()}
        (out / f"{shard.name}.sums").unlink()
    (out / "model.safetensors.index.json").write_text(index_json(shards), encoding="utf-8")
    text = json.dumps(drafter.config | {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}}, indent=2, sort_keys=True)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(drafter.folder / MASK, out / MASK)
    for name, shipped in CODE.items():
        shutil.copyfile(Path(__file__).resolve().parents[1] / "modeling" / name, out / shipped)
    return sums


def target_bytes(folder: Path) -> int:
    """Bytes of a target when decoded to bf16, at most (packed codes hold four values in two bytes)."""
    infos = open_source(folder).infos
    return sum(tensor_bytes(PublishedTensor(n, s, d)) * (4 if d == "U8" else 2 if d.startswith("F8") else 1)
               for n, (s, d) in infos.items())


def reference_length(windows: list[int], features: int, longest: int) -> int:
    """Text positions of the reference: beyond the widest window that REFERENCE_BYTES of features allow.

    Args:
        windows: sizes of the target's and the drafter's window. features: numbers stored per position, float32.
        longest: max_position_embeddings, less a block.
    """
    affordable = [w + BEYOND_WINDOW for w in windows if (w + BEYOND_WINDOW) * features * 4 <= REFERENCE_BYTES]
    return max(1, min(longest, max([REFERENCE_TOKENS, *affordable])))


@torch.no_grad()
def write_reference(folder: Path, *, real_features: bool) -> None:
    """Writes dflash_reference.safetensors: one round of drafting, computed in float32 from the exported files.

    input_ids int64 [1, S + 1] (the last one is the anchor, at position S), taps float32 [1, S, n, H] (outputs of
    `target_layer_ids`), draft_hidden [1, T, H] (after the drafter's norm), draft_logits [1, T - 1, vocabulary]; with real
    features also target_logits float32 [1, T, vocabulary] of the last T text positions.

    Args:
        folder: the whole exported checkpoint, target included.
        real_features: run the target; otherwise the taps are seeded normal numbers (said in the file's metadata), for
            targets that do not fit this machine.
    """
    from modeling.drafter import load_drafter
    from modeling.load import load_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: the same bytes on every machine of a kind
    drafter = load_drafter(folder / "dflash", torch.float32)
    generator = torch.Generator().manual_seed(0)
    source = open_source(folder)
    table, head = source.read(EMBEDDING).float(), source.read("lm_head.weight").float()
    layers, target = drafter.target_layer_ids, read_json(folder / "config.json")
    windows = [target["sliding_window"]] if any(target.get("hybrid_layer_pattern") or ()) else []
    S = reference_length([*windows, drafter.window or 0], len(layers) * table.shape[1],
                         target.get("max_position_embeddings", 1 << 18) - drafter.block_size)
    ids = torch.randint(0, table.shape[0], (1, S + 1), generator=generator)
    more = {}
    if real_features:
        out = load_model(folder, dtype=torch.float32).model(ids[:, :-1], tap_layers=layers, use_cache=False)
        taps = torch.stack(out.taps, dim=2)
        more["target_logits"] = (out.last_hidden_state[:, -drafter.block_size:] @ head.T).contiguous()
    else:
        taps = torch.randn((1, S, len(layers), table.shape[1]), generator=generator)
    hidden = draft_round(drafter, taps, ids, table)
    logits = hidden[:, 1:] @ head.T
    facts = {"target_layer_ids": layers, "anchor_position": S, "dtype": "float32",
             "features": "target" if real_features else "seeded normal numbers"}
    # One entry: the writer puts several in an order of its own, different each time.
    metadata = {"reference": json.dumps(facts, sort_keys=True)}
    save_file({"input_ids": ids, "taps": taps.contiguous(), "draft_hidden": hidden.contiguous(),
               "draft_logits": logits.contiguous()} | more, folder / "dflash" / REFERENCE, metadata=metadata)
    shutil.copymode(folder / "dflash" / "config.json", folder / "dflash" / REFERENCE)  # safetensors' own: nobody else may read
    torch.set_num_threads(threads)


def draft_round(drafter, taps: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Hidden states [1, T, H] of one block at the last of `ids` [1, S + 1], given taps [1, S, n, H]."""
    S = taps.shape[1]
    positions = torch.arange(S)[None]
    context = drafter.context_keys_values(drafter.fuse(taps.flatten(2)), positions)
    embeds = drafter.embed_block(ids[:, -1], torch.nn.Embedding.from_pretrained(table))
    return drafter.block_hidden(embeds, S + torch.arange(drafter.block_size)[None], context, positions)


def read_reference(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts) of a reference file."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    return load_file(path), json.loads(metadata.get("reference", "{}"))
