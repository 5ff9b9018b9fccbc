"""What a checkpoint folder must be, and everything in which one is not: the findings of `export/verify.py`.

Nothing here trusts the exporter: the folder is opened again from disk, the inventory is computed from its config.json,
tensors are read from their files (`export.tensor_checks`) as an engine would read them. Findings are collected, not raised, so
that one run names all of them. Where a file is too broken to go on, that is a finding and the checks that need it are left out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from checkpoint.inventory import configuration, expected_inventory, layout_of
from checkpoint.open import open_safetensors, open_source
from checkpoint.sources import SafetensorsSource, Source
from export.config_files import (
    AUTO_MAP,
    CHECKSUMS,
    checkpoint_files,
    ignored_layers,
    quantization_config,
    read_checksums,
    sha256,
)
from export.contradictions import (
    code_faults,
    companion_differences,
    config_contradictions,
    config_differences,
    front_matter,
    refuse_oversize,
    token_faults,
)
from export.drafter_files import EMBEDDING, MASK, REFERENCE, draft_round, drafter_faults, expected_tensors, read_reference
from export.layouts import Weights
from export.shards import INDEX
from export.tensor_checks import DAMAGE, TensorChecks, first_line, side_by_side, usable_cores
from modeling.drafter import read_mask
from mxfp4.format import BLOCK_SIZE
from storage.reading import read_json

# Tables, norms and matrices of a reference drafted again on another machine: float32 sums in another order.
REFERENCE_ERROR = 1e-3


class Checkpoint:
    """An exported folder under inspection; `findings` grows as checks run.

    Args:
        against: trained weights that it must equal. skip: files that may be there without being part of it.
    """

    def __init__(self, folder: Path, against: Path | None = None, *, skip: Callable[[Path], bool] = lambda path: False):
        self.folder, self.against, self.skip, self.threads = folder, against, skip, usable_cores()
        self.findings: list[str] = []
        self.hashed: set[str] = set()
        self.hashes: dict[str, Future] = {}
        self.tensors = 0
        self.bytes = 0
        self.source: Source | None = None
        self.layout, self.model_config = None, None
        self.config: dict = {}
        self.manifest: dict = {}

    def add(self, finding: str) -> None:
        self.findings.append(finding)

    def run(self) -> list[str]:
        """All findings; empty if the checkpoint is whole."""
        if not self.folder.is_dir():
            self.add(f"{self.folder}: no such folder")
            return self.findings
        self.pool = ThreadPoolExecutor(self.threads)
        try:
            self._run_checks()
        finally:
            self.pool.shutdown(cancel_futures=True)
        return self.findings

    def _run_checks(self) -> None:
        self._guard("config.json", self._read_config)
        self._guard(CHECKSUMS, self._check_files)
        self._guard("weights", self._open_weights)
        if self.source is not None and self.model_config is not None:
            self._guard("inventory", self._check_inventory)
            self._guard("index", self._check_index)
            self._guard("tensors", self._check_tensors)
        for name in sorted(self.hashed):
            self._hash(name)
        self._guard("companion files", self._check_companions)
        if (self.folder / "dflash").is_dir() or self.manifest.get("drafter"):
            self._guard("dflash", self._check_drafter)
        self._guard(CHECKSUMS, self._check_sums)

    def _guard(self, what: str, check) -> None:
        try:
            check()
        except DAMAGE as error:
            self.add(f"{what}: cannot be checked: {first_line(error)}")

    def _read_config(self) -> None:
        if (self.folder / "export.json").is_file():
            self.manifest = read_json(self.folder / "export.json")
        else:
            self.add("export.json: missing")
        self.config = read_json(self.folder / "config.json")
        self.layout = layout_of(self.config)
        if self.manifest and self.manifest.get("layout") != self.layout:
            self.add(f"config.json: describes layout {self.layout}, export.json says {self.manifest.get('layout')}")
        self.model_config = configuration(self.config)
        if self.layout == "native":
            self._check_native_config()

    def _check_native_config(self) -> None:
        quantization = self.config["quantization_config"]
        wanted = {"quant_method": "fp8", "store_dtype": "mxfp4", "mxfp4_block_size": BLOCK_SIZE,
                  "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
        for key, value in wanted.items():
            if quantization.get(key) != value:
                self.add(f"config.json: quantization_config.{key}={quantization.get(key)!r}, expected {value!r}")
        if self.config.get("auto_map") != AUTO_MAP:
            self.add(f"config.json: auto_map={self.config.get('auto_map')!r}, expected {AUTO_MAP!r}: no engine would find "
                     "configuration_mimo_v2.py")

    def _check_files(self) -> None:
        """Names now; the SHA-256 sums are made by other threads, those of weights while their tensors are read."""
        self.file_sums, self.tensor_sums = read_checksums(self.folder)
        if not self.file_sums:
            self.add(f"{CHECKSUMS}: missing or empty")
            return
        present = {p.as_posix() for p in checkpoint_files(self.folder) if not self.skip(p)}
        for name in sorted(self.file_sums.keys() - present):
            self.add(f"{name}: missing, but listed in {CHECKSUMS}")
        for name in sorted(present - self.file_sums.keys()):
            self.add(f"{name}: not listed in {CHECKSUMS}")
        self.hashed = present & self.file_sums.keys()

    def _hash(self, name: str) -> None:
        if name in self.hashed and name not in self.hashes:
            self.hashes[name] = self.pool.submit(sha256, self.folder / name)

    def _check_sums(self) -> None:
        for name in sorted(self.hashed):
            if self.hashes[name].result() != self.file_sums[name]:
                self.add(f"{name}: bytes changed since the export (SHA-256 differs)")

    def _open_weights(self) -> None:
        files = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if not files:
            raise ValueError("no *.safetensors file")
        self._guard(INDEX, lambda: self._check_shards(files))
        whole: list[str] = []
        homes: dict[str, str] = {}
        for name in files:
            try:
                for held in SafetensorsSource(self.folder, [name]).infos:
                    if homes.setdefault(held, name) != name:
                        self.add(f"{held}: in two files, {homes[held]} and {name}")
                whole.append(name)
            except DAMAGE as error:
                self.add(f"{name}: cannot be opened: {first_line(error)}")
        if whole:
            self.source = SafetensorsSource(self.folder, whole)

    def _check_shards(self, files: list[str]) -> None:
        if (self.folder / INDEX).is_file():
            for name in sorted(set(read_json(self.folder / INDEX).get("weight_map", {}).values()) - set(files)):
                self.add(f"shard {name} is missing")

    def _check_inventory(self) -> None:
        infos = self.source.infos
        self.tensors, self.bytes = len(infos), self.source.size()
        refuse_oversize(self.model_config, len(infos))
        expected = expected_inventory(self.layout, self.config, self.model_config)
        for name in sorted(expected.keys() - infos.keys()):
            self.add(f"{name}: tensor is missing")
        for name in sorted(infos.keys() - expected.keys()):
            if not name.startswith("model.mtp."):
                self.add(f"{name}: unexpected tensor")
        for name in sorted(expected.keys() & infos.keys()):
            (shape, dtypes), (held, dtype) = expected[name], infos[name]
            if tuple(held) != tuple(shape):
                note = " (the grid of a fused qkv restarts with each chunk)" if "qkv_proj.weight_scale_inv" in name else ""
                self.add(f"{name}: shape {list(held)}, expected {list(shape)}{note}")
            if dtype not in dtypes:
                self.add(f"{name}: dtype {dtype}, expected {' or '.join(sorted(dtypes))}")
        held = {n: d for n, (_, d) in infos.items()}
        if self.layout != "native":
            section = self.config["quantization_config"]
            for key, value in quantization_config(self.layout, self.config, held).items():
                if section.get(key) != value:
                    self.add(f"config.json: quantization_config.{key}={section.get(key)!r}, expected {value!r}")
        if self.layout == "native":
            wanted = set(ignored_layers(self.config, held))
            listed = set(self.config["quantization_config"].get("ignored_layers") or [])
            for name in sorted(wanted - listed):
                self.add(f"config.json: ignored_layers lacks {name}, whose weights are not FP8")
            for name in sorted(listed - wanted):
                self.add(f"config.json: ignored_layers lists {name}, which is FP8 or does not exist")

    def _check_index(self) -> None:
        index = read_json(self.folder / INDEX)
        weight_map, where = index.get("weight_map", {}), self.source.where
        for name in sorted(weight_map.keys() - where.keys()):
            self.add(f"{INDEX}: lists {name}, which is in no file")
        for name in sorted(where.keys() - weight_map.keys()):
            self.add(f"{INDEX}: does not list {name}")
        for name in sorted(where.keys() & weight_map.keys()):
            if weight_map[name] != where[name]:
                self.add(f"{INDEX}: {name} in {weight_map[name]}, but it is in {where[name]}")
        for name in sorted({p.name for p in self.folder.glob("*.safetensors")} - set(weight_map.values())):
            self.add(f"{name}: {INDEX} does not name it, and clients take model.safetensors before any index")
        size = index.get("metadata", {}).get("total_size")
        if size != self.source.size():
            self.add(f"{INDEX}: total_size {size}, the tensors have {self.source.size()} bytes")

    def _check_tensors(self) -> None:
        """Every tensor by itself, and its file's SHA-256 meanwhile."""
        sums = getattr(self, "tensor_sums", {})
        for name in sorted(n for n in sums.keys() - self.source.infos.keys() if not n.startswith("dflash/")):
            self.add(f"checksums.json: lists {name}, which is in no file")
        rule = self.manifest.get("scale_rule", "even") if self.manifest.get("rounded") else "even"
        checks = TensorChecks(self.source, self.layout, sums, rule)
        if self.against is not None:
            self._guard("contract C2", lambda: self._compare_with_training(checks))
        experts, incomparable = 0, []
        for report in side_by_side(self.pool, checks.report, self._units_and_files(checks), 4 * self.threads):
            for finding in report.findings:
                self.add(finding)
            experts += report.experts
            incomparable += [report.incomparable] if report.incomparable else []
        if incomparable:
            more = f" (and {len(incomparable) - 1} tensors more)" if len(incomparable) > 1 else ""
            self.add(f"contract C2: cannot be checked: {incomparable[0]}{more}")
        elif checks.weights is not None and not experts:
            self.add("contract C2: there are no experts to compare")

    def _units_and_files(self, checks: TensorChecks) -> Iterator[tuple[str, ...]]:
        """The units of `checks`; a file's hash is begun with its first tensor."""
        for names in checks.units():
            self._hash(self.source.where[names[0]])
            yield names

    def _compare_with_training(self, checks: TensorChecks) -> None:
        """Contract C2 and all other tensors, too, by `checks`; here what stands beside the weights."""
        trained, config = open_source(self.against), self.model_config
        if (self.against / "config.json").is_file():  # a client's own class may lack what joins q, k and v
            config = configuration(read_json(self.against / "config.json"))
        checks.weights = Weights(trained, trained, config, on_grid=not self.manifest.get("rounded"),
                                 scale_rule=self.manifest.get("scale_rule", "even"))
        checks.mask_row = self.mask_row() if (self.folder / "dflash").is_dir() else None
        for finding in (*companion_differences(self.folder, self.against),
                        *config_differences(self.config, self.against, self.layout)):
            self.add(finding)

    def mask_row(self) -> int | None:
        """The vocabulary row that holds the drafter's mask embedding instead of the trained one."""
        return read_json(self.folder / "dflash" / "config.json").get("dflash_config", {}).get("mask_token_id")

    def _check_companions(self) -> None:
        names = ["README.md", "resolved.yaml", INDEX]
        names += sorted({v.partition(".")[0] + ".py" for v in (self.config.get("auto_map") or {}).values()})
        for name in names:
            if not (self.folder / name).is_file():
                self.add(f"{name}: missing")
        for fault in code_faults(self.folder, self.config.get("auto_map") or {}):
            self.add(fault)
        self._guard("README.md", lambda: front_matter(self.folder / "README.md"))
        for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
            if (self.folder / name).is_file():
                read_json(self.folder / name)
        if self.model_config is not None:
            for finding in (*token_faults(self.folder, self.model_config), *config_contradictions(self.config, self.source)):
                self.add(finding)
        if self.manifest.get("drafter") is False and (self.folder / "dflash").is_dir():
            self.add("export.json: says there is no drafter, but dflash/ is there")

    def _check_drafter(self) -> None:
        folder = self.folder / "dflash"
        for name in ("config.json", MASK, "model.safetensors.index.json", "dflash.py", "block_mask.py", REFERENCE):
            if not (folder / name).is_file():
                self.add(f"dflash/{name}: missing")
        config = read_json(folder / "config.json")
        for fault in code_faults(folder, config.get("auto_map") or {}):
            self.add(f"dflash/{fault}")
        token, embedding = read_mask(folder / MASK)
        for fault in drafter_faults(config, self.model_config, token, embedding):
            self.add(f"dflash: {fault}")
        if embedding.dtype != torch.bfloat16:
            self.add(f"dflash/{MASK}: embedding of {embedding.dtype}, expected bfloat16")
        self._check_drafter_tensors(folder, config)
        self._check_mask_row(token, embedding)
        self._guard(f"dflash/{REFERENCE}", lambda: self._check_reference(folder, config))

    def _check_drafter_tensors(self, folder: Path, config: dict) -> None:
        """Engines ignore missing and unknown drafter tensors without a word: here they are named."""
        source, expected = open_safetensors(folder), expected_tensors(config)
        listed = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
        for name in sorted(source.infos.keys() - listed.keys()):
            self.add(f"dflash/model.safetensors.index.json: does not list {name}")
        for name in sorted(expected.keys() - source.infos.keys()):
            self.add(f"dflash: {name}: tensor is missing")
        for name in sorted(source.infos.keys() - expected.keys()):
            hint = " (published names have no model. prefix)" if name.startswith("model.") else ""
            self.add(f"dflash: {name}: unexpected tensor{hint}")
        sums = getattr(self, "tensor_sums", {})
        for name in sorted(expected.keys() & source.infos.keys()):
            if source.infos[name] != expected[name]:
                self.add(f"dflash: {name}: {source.infos[name][1]} {list(source.infos[name][0])}, expected "
                         f"{expected[name][1]} {list(expected[name][0])}")
            tensor = source.read(name)
            if f"{zlib.crc32(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())):08x}" != sums.get(
                    f"dflash/{name}"):
                self.add(f"dflash: {name}: bytes changed since the export (CRC-32 differs)")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                self.add(f"dflash: {name}: not finite")

    def _check_mask_row(self, token: int, embedding: torch.Tensor) -> None:
        if self.source is None or EMBEDDING not in self.source.infos:
            return
        row = self.source.read(EMBEDDING)[token]
        if not torch.equal(row, embedding.to(row.dtype)):
            self.add(f"{EMBEDDING}: row {token} (mask token) is not the vector of dflash/{MASK}")

    def _check_reference(self, folder: Path, config: dict) -> None:
        from modeling.drafter import load_drafter

        tensors, facts = read_reference(folder / REFERENCE)
        layers = config["dflash_config"]["target_layer_ids"]
        if facts["target_layer_ids"] != layers:
            self.add(f"dflash/{REFERENCE}: recorded with target_layer_ids {facts['target_layer_ids']}, "
                     f"config.json has {layers}")
            return
        drafter = load_drafter(folder, torch.float32)
        with torch.no_grad():
            hidden = draft_round(drafter, tensors["taps"], tensors["input_ids"], self.source.read(EMBEDDING).float())
            logits = hidden[:, 1:] @ self.source.read("lm_head.weight").float().T
        recorded = tensors["draft_logits"]
        error = float((logits - recorded).abs().max()) if logits.shape == recorded.shape else float("inf")
        if not error <= REFERENCE_ERROR * float(recorded.abs().max()):
            self.add(f"dflash/{REFERENCE}: the drafter gives other logits than recorded (largest difference {error:.3g})")
