"""The drafter's folder `dflash/`, and what ties it to the target.

    config.json                         every released key and the explicit ones (written in training)
    dflash_draft_model.safetensors      published names, without `model.` prefix; model.safetensors.index.json beside it
    mask_embedding.pt                   the vector of the masked positions; the same vector is in the target's vocabulary row
    dflash.py, block_mask.py            the drafter's code, for AutoModel with trust_remote_code
    dflash_reference.safetensors        one worked example: inputs, hidden states of the target, draft logits

The mask token's row of a target's embedding is untrained, and an engine that does not know mask_embedding.pt reads that
row; with the vector in both places the drafter works either way.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint.detect_format import open_source
from checkpoint.drafter_aliases import alias_faults
from checkpoint.drafter_folder import (
    EMBEDDING,
    HEAD,
    MASK,
    draft_round,
    expected_tensors,
    fit_faults,
    mask_faults,
    read_mask,
    special_of,
    speculators_config,
)
from checkpoint.findings import one_line
from checkpoint.sources import Source
from checkpoint.tensor_files import REFERENCE
from export.layouts import Unit
from export.shards import index_json, plan_shards, tensor_bytes, write_shard
from modeling.names import PublishedTensor
from storage.reading import read_json, refuse_pointer

STEM = "dflash_draft_model"
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
        ValueError: files that are missing or do not fit the target: size, vocabulary, target layers.
    """
    if not folder.is_dir():
        return None
    with one_line(folder, "no usable drafter"):
        return _opened(folder, target_config)


def _opened(folder: Path, target_config) -> TrainedDrafter:
    config = read_json(folder / "config.json")
    if not (folder / MASK).is_file():
        raise ValueError(f"{folder}: {MASK} is missing: without it nearly every draft is rejected")
    refuse_pointer(folder / MASK)
    mask = read_mask(folder)
    mask["embedding"] = mask["embedding"].to(torch.bfloat16)
    for fault in (*fit_faults(config, target_config), *mask_faults(special_of(config), mask, target_config.hidden_size),
                  *alias_faults(config)):
        raise ValueError(f"{folder}: {fault.text}")
    drafter = TrainedDrafter(folder, config, mask["mask_token_id"], mask["embedding"])
    _weights(drafter)  # before the target is written
    return drafter


def _weights(drafter: TrainedDrafter) -> tuple[Source, dict[str, tuple[tuple[int, ...], str]]]:
    """(The drafter's tensors, what they must be); ValueError for one that is missing or unknown."""
    source, expected = open_source(drafter.folder), expected_tensors(drafter.config)
    missing, extra = sorted(expected.keys() - source.infos.keys()), sorted(source.infos.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{drafter.folder}: drafter tensors missing {missing or 'none'}, unexpected {extra or 'none'}")
    return source, expected


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


def write_drafter(drafter: TrainedDrafter, out: Path, shard_bytes: int) -> dict[str, str]:
    """Writes `dflash/` without the reference; returns the CRC-32 of its tensors, by "dflash/<name>".

    Raises:
        ValueError: a tensor that is missing, unknown or of another shape.
    """
    sums = _write_weights(drafter, out, STEM, shard_bytes)
    text = json.dumps(drafter.config | {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}}, indent=2, sort_keys=True)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(drafter.folder / MASK, out / MASK)
    for name, shipped in CODE.items():
        shutil.copyfile(Path(__file__).resolve().parents[1] / "modeling" / name, out / shipped)
    return sums


def write_speculators(drafter: TrainedDrafter, out: Path, shard_bytes: int, target: str,
                      architecture: str | None) -> dict[str, str]:
    """Writes the same drafter in the format of `speculators`; returns CRC-32 sums.

    Args:
        target, architecture: name (as `speculators` looks it up) and class of the target.
    """
    config = speculators_config(drafter.config, target, architecture)
    sums = _write_weights(drafter, out, "model", shard_bytes)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sums


def _write_weights(drafter: TrainedDrafter, out: Path, stem: str, shard_bytes: int) -> dict[str, str]:
    """Weight files and index; CRC-32 by "<folder>/<tensor>"."""
    out.mkdir(parents=True, exist_ok=True)
    source, expected = _weights(drafter)
    units = [Unit((PublishedTensor(n, shape, dtype),), lambda n=n: [source.read(n).to(torch.bfloat16)])
             for n, (shape, dtype) in expected.items()]
    shards = plan_shards(units, shard_bytes, stem)
    if len(shards) == 1:
        shards = [dataclasses.replace(shards[0], name=f"{stem}.safetensors")]
    sums = {}
    for shard in shards:
        sums |= {f"{out.name}/{name}": crc for name, crc in write_shard(shard, out).items()}
        (out / f"{shard.name}.sums").unlink()
    (out / "model.safetensors.index.json").write_text(index_json(shards), encoding="utf-8")
    return sums


def target_bytes(folder: Path) -> int:
    """Bytes of a target when decoded to bf16, at most (packed codes hold four values in two bytes)."""
    infos = open_source(folder).infos
    return sum(tensor_bytes(PublishedTensor(n, s, d)) * (4 if d == "U8" else 2 if d.startswith("F8") else 1)
               for n, (s, d) in infos.items())


def _features(model, ids: torch.Tensor, layers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(Outputs of the target layers [1, S, n, H], the last hidden state after the norm [1, S, H]) of any causal model."""
    caught: dict[int, torch.Tensor] = {}

    def catch(layer: int):
        return lambda module, inputs, output: caught.update({layer: output[0] if isinstance(output, tuple) else output})

    hooks = [model.base_model.layers[layer].register_forward_hook(catch(layer)) for layer in layers]
    last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return torch.stack([caught[layer] for layer in layers], dim=2), last


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

    input_ids int64 [1, S + 1] (the last one is the anchor, at position S), `taps` float32 [1, S, n, H] (outputs of
    `target_layer_ids`), draft_hidden [1, T, H] (after the drafter's norm), draft_logits [1, T - 1, vocabulary]; with real
    features also target_logits float32 [1, T, vocabulary] of the last T text positions.

    Args:
        folder: the whole exported checkpoint, target included.
        real_features: run the target; otherwise the hidden states are seeded normal numbers (said in the file's metadata), for
            targets that do not fit this machine.
    """
    from checkpoint.load import load_model
    from modeling.drafter import load_drafter

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: the same bytes on every machine of a kind
    drafter = load_drafter(folder / "dflash", torch.float32)
    generator = torch.Generator().manual_seed(0)
    source = open_source(folder)
    table = source.read(EMBEDDING).float()
    head = source.read(HEAD).float() if HEAD in source.infos else table  # a tied head is the embedding
    layers, target = drafter.target_layer_ids, read_json(folder / "config.json")
    sliding = any(target.get("hybrid_layer_pattern") or ()) or "sliding_attention" in (target.get("layer_types") or ())
    windows = [target["sliding_window"]] if sliding and target.get("sliding_window") else []
    S = reference_length([*windows, drafter.window or 0], len(layers) * table.shape[1],
                         target.get("max_position_embeddings", 1 << 18) - drafter.block_size)
    ids = torch.randint(0, table.shape[0], (1, S + 1), generator=generator)
    more = {}
    if real_features:
        target_hidden, last = _features(load_model(folder, dtype=torch.float32), ids[:, :-1], layers)
        more["target_logits"] = (last[:, -drafter.block_size:] @ head.T).contiguous()
    else:
        target_hidden = torch.randn((1, S, len(layers), table.shape[1]), generator=generator)
    hidden = draft_round(drafter, target_hidden, ids, table)
    logits = hidden[:, 1:] @ head.T
    facts = {"target_layer_ids": layers, "anchor_position": S, "dtype": "float32",
             "features": "target" if real_features else "seeded normal numbers"}
    # One entry: the writer puts several in an order of its own, different each time.
    metadata = {"reference": json.dumps(facts, sort_keys=True)}
    save_file({"input_ids": ids, "taps": target_hidden.contiguous(), "draft_hidden": hidden.contiguous(),
               "draft_logits": logits.contiguous()} | more, folder / "dflash" / REFERENCE, metadata=metadata)
    shutil.copymode(folder / "dflash" / "config.json", folder / "dflash" / REFERENCE)  # safetensors' own: nobody else may read
    torch.set_num_threads(threads)
