"""The checks of a drafter's folder, beside its target or alone (`checkpoint.drafter_folder` knows what is asked)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import torch

from checkpoint import drafter_folder
from checkpoint.contradictions import code_faults
from checkpoint.drafter_aliases import alias_faults
from checkpoint.drafter_folder import EMBEDDING, HEAD, MASK
from checkpoint.findings import MANY, Reporter
from checkpoint.tensor_files import INDEX, REFERENCE, TensorFiles
from storage.reading import read_json
from storage.terminal import counted

# Tables, norms and matrices of a reference drafted again on another machine: float32 sums in another order.
REFERENCE_ERROR = 1e-3


class DrafterChecks(Reporter):
    """Checks of a drafter; `source` and `model_config` are the target's, or None; `manifest` is export.json."""

    source: TensorFiles | None
    manifest: dict
    sums: bool
    tensor_sums: dict[str, str]

    def check_drafter(self, folder: Path, where: str) -> None:
        """A drafter's folder; `where`: how its files are called from the folder that is verified."""
        label = where.rstrip("/") or "drafter"
        wanted = ("config.json", MASK, "model.safetensors.index.json", "dflash.py", "block_mask.py", REFERENCE)
        for name in wanted if self.ours else ("config.json",):
            if not (folder / name).is_file():
                self.wrong("drafter", f"{where}{name}: missing")
        config = read_json(folder / "config.json")
        for fault in code_faults(folder, config.get("auto_map") or {}):
            self.promised("code", f"{where}{fault}")
        special = drafter_folder.special_of(config)
        self._add_faults("dialect", label, alias_faults(config))
        if self.model_config is not None:
            self._add_faults("drafter", label, drafter_folder.fit_faults(config, self.model_config.get_text_config()))
            if (note := drafter_folder.grouping_note(config, self.model_config.get_text_config())) is not None:
                self.note("engine", f"{label}: {note}")
        else:
            self.unchecked("drafter", "whether the drafter fits its target", "there is no target in this folder")
        if (folder / MASK).is_file():
            mask = drafter_folder.read_mask(folder)
            self._add_faults("mask", label, drafter_folder.mask_faults(special, mask, config["hidden_size"]))
            self._check_mask_row(mask)
        elif not self.ours:
            self.note("mask", f"{where}{MASK}: not there: vLLM and SGLang take row {special['mask_token_id']} of the target's "
                      "vocabulary for the masked positions")
        self._check_drafter_tensors(folder, where, config)
        if (folder / REFERENCE).is_file():
            self.guard("reference", f"{where}{REFERENCE}", lambda: self._check_reference(folder, where, special))
        elif not self.ours:
            self.unchecked("reference", "what the drafter computes", f"there is no {REFERENCE} with outputs of its training")

    def _add_faults(self, kind: str, label: str, faults: Iterable[drafter_folder.Fault]) -> None:
        for fault in faults:
            (self.wrong if fault.grave else self.promised)(kind, f"{label}: {fault.text}")

    def _check_drafter_tensors(self, folder: Path, where: str, config: dict) -> None:
        """Engines ignore missing and unknown drafter tensors without a word: here they are named."""
        label = where.rstrip("/") or "drafter"
        files = sorted(p.name for p in folder.glob("*.safetensors") if p.name != REFERENCE and p.is_file())
        if not files:
            raise ValueError("no *.safetensors file with the drafter's weights")
        source = TensorFiles(folder, files)
        expected = drafter_folder.expected_tensors(config, len(source.infos))
        if len(source.infos) > len(expected) + MANY:
            raise ValueError(f"{counted(len(source.infos), 'tensor')}, expected {len(expected)}")
        if (folder / INDEX).is_file() or self.ours:
            listed = read_json(folder / INDEX).get("weight_map", {})
            for name in sorted(source.infos.keys() - listed.keys()):
                self.wrong("index", f"{where}{INDEX}: does not list {name}")
            for name, file in sorted(listed.items()):
                if source.where.get(name) != file:
                    self.wrong("index", f"{label}: {INDEX} says that {name} is in {file}, and it is not")
        for name in sorted(expected.keys() - source.infos.keys()):
            self.wrong("missing", f"{label}: {name}: tensor is missing")
        for name in sorted(source.infos.keys() - expected.keys()):
            hint = " (published names have no model. prefix)" if name.startswith("model.") else ""
            self.wrong("unexpected", f"{label}: {name}: unexpected tensor{hint}")
        for name in sorted(expected.keys() & source.infos.keys()):
            (shape, dtype), (own_shape, own_dtype) = expected[name], source.infos[name]
            if own_shape != shape:
                self.wrong("shape", f"{label}: {name}: {own_dtype} {list(own_shape)}, expected {dtype} {list(shape)}")
            elif own_dtype != dtype:
                self.promised("dtype", f"{label}: {name}: {own_dtype} {list(own_shape)}, expected {dtype} {list(shape)}")
            tensor = source.read(name)
            data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            owed = self.ours and self.sums or self.tensor_sums
            if owed and f"{zlib.crc32(data):08x}" != self.tensor_sums.get(f"dflash/{name}"):
                self.wrong("checksum", f"{label}: {name}: bytes changed since the export (CRC-32 differs)")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                self.wrong("values", f"{label}: {name}: not finite")

    def _check_mask_row(self, mask: dict) -> None:
        if self.source is None or EMBEDDING not in self.source.infos:
            return
        if self.manifest.get("mask_row") is False:
            self.note("mask", f"{EMBEDDING}: the head is tied to it, so the mask embedding is in dflash/{MASK} alone: vLLM and "
                      "SGLang read that file")
            return
        row = self.source.read(EMBEDDING)[mask["mask_token_id"]]
        if not torch.equal(row, mask["embedding"].to(row.dtype)):
            more = "" if self.ours else ": vLLM and SGLang read the file; an engine that does not drafts with another vector"
            self.promised("mask", f"{EMBEDDING}: row {mask['mask_token_id']} (mask token) is not the vector of "
                          f"dflash/{MASK}{more}")

    def _check_reference(self, folder: Path, where: str, special: dict) -> None:
        from modeling.drafter import load_drafter

        tensors, facts = drafter_folder.read_reference(folder / REFERENCE)
        layers = special["target_layer_ids"]
        if facts["target_layer_ids"] != layers:
            self.wrong("reference", f"{where}{REFERENCE}: recorded with target_layer_ids {facts['target_layer_ids']}, "
                       f"config.json has {layers}")
            return
        if self.source is None:
            self.unchecked("reference", "what the drafter computes", "the target's embedding and head are not in this folder")
            return
        drafter = load_drafter(folder, torch.float32)
        table = self.source.read(EMBEDDING).float()
        head = self.source.read(HEAD).float() if HEAD in self.source.infos else table
        with torch.no_grad():
            logits = drafter_folder.draft_round(drafter, tensors["taps"], tensors["input_ids"], table)[:, 1:] @ head.T
        recorded = tensors["draft_logits"]
        error = float((logits - recorded).abs().max()) if logits.shape == recorded.shape else float("inf")
        if not error <= REFERENCE_ERROR * float(recorded.abs().max()):
            self.wrong("reference", f"{where}{REFERENCE}: the drafter gives other logits than recorded (largest difference "
                       f"{error:.3g})")
