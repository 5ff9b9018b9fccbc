"""The one verifier of checkpoint folders, whoever wrote them: `verify(folder)`.

    from checkpoint.verify import verify
    found = verify(folder)                  # or verify(folder, against=trained_folder)
    found.verdict                           # "right" or "wrong"
    found.wrong, found.unchecked, found.notes    # lists of Finding(kind, text, engines)

Three verdicts about everything that is looked at:

    wrong        named, with what was expected. No engine can be right with it, or it is not what an export promised
    right        nothing to say
    unchecked    "could not be checked here, because ...": no checksums, no stored reference, no target beside a drafter
    (notes)      what engines read differently, with their names; it is not wrong as long as outputs do not prove it

What only exports of this project promise (checksums, export.json, a card, code, the drafter's stored reference, every key in
every spelling) is demanded of them alone: a folder is `ours` if it has export.json, or checksums that list one. Of folders by
others, released ones above all, the same things are notes or unchecked.

Nothing here trusts a writer: the folder is opened from disk, the inventory is computed from its config.json, tensors are read
from their files (`checkpoint.tensor_checks`) as an engine would read them. Findings are collected, not raised, so that one run
names all of them. Where a file is too broken to go on, that is a finding, and the checks that need it are left out.

`kind` of a finding is a short stable word by which a caller may look up a cause: checksum, file, config, layout, index,
missing, unexpected, shape, dtype, values, scales, blocks, training, companion, code, tokens, drafter, dialect, mask, reference.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoint import drafter_folder
from checkpoint.checksums import CHECKSUMS, TENSOR_SUMS, checkpoint_files, read_checksums, sha256
from checkpoint.contradictions import (
    AUTO_MAP,
    code_faults,
    companion_differences,
    config_contradictions,
    config_differences,
    front_matter,
    refuse_oversize,
    token_faults,
)
from checkpoint.drafter_folder import EMBEDDING, HEAD, MASK
from checkpoint.families.registry import FAMILIES, family_of
from checkpoint.inventory import configuration, expected_inventory, is_mimo, layout_of
from checkpoint.open import open_source
from checkpoint.quantization import module_names, quantization_config
from checkpoint.tensor_checks import DAMAGE, TensorChecks, side_by_side, usable_cores
from checkpoint.tensor_files import INDEX, REFERENCE, SINGLE, TensorFiles
from checkpoint.trained import Weights
from mxfp4.format import BLOCK_SIZE
from storage.reading import first_line, read_json, strange_files

# Tables, norms and matrices of a reference drafted again on another machine: float32 sums in another order.
REFERENCE_ERROR = 1e-3
MANY = 10_000  # tensors too many that are still named one by one
LONGEST = 2000  # letters of a finding: names of a hostile folder may have millions
ENGINES = ("vLLM", "SGLang", "transformers")


@dataclass(frozen=True)
class Finding:
    """One line about a folder. `engines`: those that its text names."""

    kind: str
    text: str

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(name for name in ENGINES if name in self.text)

    def __str__(self) -> str:
        return self.text


@dataclass
class Verification:
    """What was found in a folder.

    Attributes:
        ours: written by this project's exporter.
        layout: native, fp8, hf-fp8, compressed-tensors, gpt-oss, bf16, drafter, or None if config.json says nothing known.
    """

    folder: Path
    wrong: list[Finding] = field(default_factory=list)
    unchecked: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    ours: bool = False
    layout: str | None = None
    tensors: int = 0
    bytes: int = 0

    @property
    def verdict(self) -> str:
        return "wrong" if self.wrong else "right"

    @property
    def findings(self) -> list[str]:
        """The lines of what is wrong."""
        return [finding.text for finding in self.wrong]


def verify(folder: str | Path, against: Path | None = None, *, skip: Callable[[Path], bool] = lambda path: False,
           sums: bool = True) -> Verification:
    """Looks at everything in a folder; never raises for a bad one.

    Args:
        against: trained weights that it must equal. skip: files that may be there without being part of it.
        sums: compare checksums (reads every file once more); False for callers that do it themselves.
    """
    verifier = _Verifier(Path(folder), against, skip, sums)
    verifier.run()
    return verifier.found


class _Verifier:
    """A folder under inspection; `found` grows as checks run."""

    def __init__(self, folder: Path, against: Path | None, skip: Callable[[Path], bool], sums: bool = True):
        self.folder, self.against, self.skip, self.threads = folder, against, skip, usable_cores()
        self.sums = sums
        self.found = Verification(folder)
        self.hashed: set[str] = set()
        self.hashes: dict[str, Future] = {}
        self.file_sums: dict[str, str] = {}
        self.tensor_sums: dict[str, str] = {}
        self.source: TensorFiles | None = None
        self.model_config = None
        self.config: dict = {}
        self.manifest: dict = {}

    @property
    def ours(self) -> bool:
        return self.found.ours

    def wrong(self, kind: str, text: str) -> None:
        self.found.wrong.append(Finding(kind, text[:LONGEST]))

    def note(self, kind: str, text: str) -> None:
        self.found.notes.append(Finding(kind, text[:LONGEST]))

    def unchecked(self, kind: str, what: str, reason: str) -> None:
        self.found.unchecked.append(Finding(kind, f"{what}: could not be checked here, because {reason}"))

    def promised(self, kind: str, text: str) -> None:
        """Wrong in an export of ours; a note about anybody else's folder."""
        (self.wrong if self.ours else self.note)(kind, text)

    def run(self) -> None:
        if not self.folder.is_dir():
            self.wrong("file", f"{self.folder}: no such folder")
            return
        self.pool = ThreadPoolExecutor(self.threads)
        try:
            self._run_checks()
        finally:
            self.pool.shutdown(cancel_futures=True)

    def _run_checks(self) -> None:
        for path in strange_files(self.folder):  # nothing below opens them: a pipe would be waited on for ever
            self.wrong("file", f"{path.relative_to(self.folder)}: neither a file nor a folder")
        self._guard("config", "config.json", self._read_config)
        self._guard("checksum", CHECKSUMS, self._check_files)
        if self.found.layout != "drafter":
            self._guard("file", "weights", self._open_weights)
        if self.source is not None and self.model_config is not None:
            self._guard("config", "inventory", self._check_inventory)
        if self.source is not None and self.found.layout is not None:
            self._guard("index", "index", self._check_index)
            self._guard("file", "tensors", self._check_tensors)
        for name in sorted(self.hashed):
            self._hash(name)
        self._guard("companion", "companion files", self._check_companions)
        if self.found.layout == "drafter":
            self._guard("drafter", "drafter", lambda: self._check_drafter(self.folder, ""))
        elif (self.folder / "dflash").is_dir() or self.manifest.get("drafter"):
            self._guard("drafter", "dflash", lambda: self._check_drafter(self.folder / "dflash", "dflash/"))
        self._guard("checksum", CHECKSUMS, self._check_sums)

    def _guard(self, kind: str, what: str, check) -> None:
        try:
            check()
        except DAMAGE as error:
            self.wrong(kind, f"{what}: cannot be checked: {first_line(error)[:500]}")

    def _read_config(self) -> None:
        own = self.folder / "export.json"
        sums = self.folder / CHECKSUMS
        self.found.ours = own.is_file() or sums.is_file() and "  export.json\n" in sums.read_text(errors="replace")
        if own.is_file():
            self.manifest = read_json(own)
        elif self.ours:
            self.wrong("file", "export.json: missing")
        self.config = read_json(self.folder / "config.json")
        if drafter_folder.is_drafter(self.config):
            self.found.layout = "drafter"
            return
        layout = layout_of(self.config)
        self.found.layout = self.manifest.get("layout", layout)
        if self.found.layout != layout:
            self.wrong("layout", f"config.json: describes layout {layout}, export.json says {self.found.layout}")
        try:
            self.model_config = configuration(self.config)
        except ValueError as error:
            if "does not know" not in str(error):
                raise
            self.unchecked("config", "names and shapes of the tensors", first_line(error))
        if self.found.layout == "native":
            self._check_native_config()

    def _check_native_config(self) -> None:
        quantization = self.config.get("quantization_config") or {}
        for key, value in {"quant_method": "fp8", "store_dtype": "mxfp4"}.items():
            if quantization.get(key) != value:
                self.wrong("config", f"config.json: quantization_config.{key}={quantization.get(key)!r}, expected {value!r}")
        if quantization.get("mxfp4_block_size", BLOCK_SIZE) != BLOCK_SIZE:
            self.wrong("config", f"config.json: quantization_config.mxfp4_block_size={quantization['mxfp4_block_size']!r}, "
                       f"expected {BLOCK_SIZE}")
        for key, value in {"mxfp4_block_size": BLOCK_SIZE, "weight_block_size": [128, 128], "fmt": "e4m3",
                           "activation_scheme": "dynamic"}.items():
            if quantization.get(key) != value and not (key == "mxfp4_block_size" and key in quantization):
                self.promised("config", f"config.json: quantization_config.{key}={quantization.get(key)!r}, expected {value!r}")
        if self.config.get("auto_map") != AUTO_MAP:
            self.promised("config", f"config.json: auto_map={self.config.get('auto_map')!r}, expected {AUTO_MAP!r}: "
                          "transformers and vLLM would not find configuration_mimo_v2.py")

    def _check_files(self) -> None:
        """Names now; the SHA-256 sums are made by other threads, those of weights while their tensors are read."""
        if not self.sums:
            return
        self.file_sums, self.tensor_sums = read_checksums(self.folder)
        if not self.file_sums:
            if self.ours:
                self.wrong("checksum", f"{CHECKSUMS}: missing or empty")
            else:
                self.unchecked("checksum", "whether a file changed since it was written", f"there is no {CHECKSUMS}")
            return
        present = {p.as_posix() for p in checkpoint_files(self.folder) if not self.skip(p)}
        for name in sorted(self.file_sums.keys() - present):
            self.wrong("file", f"{name}: missing, but listed in {CHECKSUMS}")
        for name in sorted(present - self.file_sums.keys()):
            self.promised("file", f"{name}: not listed in {CHECKSUMS}")
        self.hashed = present & self.file_sums.keys()

    def _hash(self, name: str) -> None:
        if name in self.hashed and name not in self.hashes:
            self.hashes[name] = self.pool.submit(sha256, self.folder / name)

    def _check_sums(self) -> None:
        for name in sorted(self.hashed):
            if self.hashes[name].result() != self.file_sums[name]:
                self.wrong("checksum", f"{name}: bytes changed since the export (SHA-256 differs)")

    def _open_weights(self) -> None:
        files = sorted(p.name for p in self.folder.glob("*.safetensors") if p.is_file())
        if not files:
            raise ValueError("no *.safetensors file")
        listed: dict[str, str] = {}
        if (self.folder / INDEX).is_file():
            self._guard("index", INDEX, lambda: listed.update(read_json(self.folder / INDEX).get("weight_map", {})))
            for name in sorted(set(listed.values()) - set(files)):
                self.wrong("file", f"shard {name} is missing")
        whole: list[str] = []
        homes: dict[str, str] = {}
        for name in files:
            try:
                for held in TensorFiles(self.folder, [name]):
                    if homes.setdefault(held, name) != name:
                        self.wrong("index", f"{held}: in two files, {homes[held]} and {name}")
                whole.append(name)
            except DAMAGE as error:
                self.wrong("file", f"{name}: cannot be opened: {first_line(error)}")
        if whole:  # the files that the index names first, as readers have it
            self.source = TensorFiles(self.folder, sorted(whole, key=lambda name: (name not in listed.values(), name)))

    def _check_inventory(self) -> None:
        infos, layout = self.source.infos, self.found.layout
        self.found.tensors, self.found.bytes = len(infos), self.source.size()
        refuse_oversize(self.model_config.get_text_config(), len(infos))
        held = {n: d for n, (_, d) in infos.items()}
        expected = expected_inventory(layout, self.config, self.model_config, held)
        if self.ours and not is_mimo(self.config):  # float32 by choice is said
            wide = set(self.manifest.get("float32", ()))
            expected = {n: (shape, {"BF16"} if dtypes == {"BF16", "F32"} and n not in wide else dtypes)
                        for n, (shape, dtypes) in expected.items()}
        for name in sorted(expected.keys() - infos.keys()):
            self.wrong("missing", f"{name}: tensor is missing")
        extra = sorted(name for name in infos.keys() - expected.keys() if not re.match(r"model\.mtp\.|mtp\.", name))
        if len(extra) > len(expected) + MANY:
            self.wrong("unexpected", f"{len(extra):,} unexpected tensors, the first {extra[0]}: not looked at one by one")
            self.source = None
            return
        for name in extra:
            self.wrong("unexpected", f"{name}: unexpected tensor")
        for name in sorted(expected.keys() & infos.keys()):
            self._check_form(name, *expected[name], *infos[name])
        if layout in ("native", "fp8"):
            if hasattr(self.model_config, "hybrid_layer_pattern"):
                self._check_ignored(held)
        elif layout not in ("bf16", "fp8"):
            section = self.config["quantization_config"]
            for key, value in quantization_config(layout, self.config, held).items():
                if section.get(key) != value:
                    self.promised("config", f"config.json: quantization_config.{key}={section.get(key)!r}, expected {value!r}")

    def _check_form(self, name: str, shape, dtypes: set[str], own_shape, own_dtype: str) -> None:
        if tuple(own_shape) != tuple(shape):
            note = " (the grid of a fused qkv restarts with each chunk)" if "qkv_proj.weight_scale_inv" in name else ""
            self.wrong("shape", f"{name}: shape {list(own_shape)}, expected {list(shape)}{note}")
        if own_dtype not in dtypes:
            floats = {own_dtype, *dtypes} <= {"F32", "BF16", "F16"}
            (self.promised if floats else self.wrong)("dtype", f"{name}: dtype {own_dtype}, expected "
                                                      f"{' or '.join(sorted(dtypes))}")

    def _check_ignored(self, held: dict[str, str]) -> None:
        """Modules that engines build as FP8 must be FP8, all others must be named."""
        listed = set((self.config.get("quantization_config") or {}).get("ignored_layers") or [])
        groups = module_names(self.config, held)
        for names, is_fp8 in groups:
            if names[0].startswith("model.decoder.") and not self.ours and not any("mtp." in name for name in held):
                continue  # of layers that are not there
            there = [n for n in names if n in listed]
            if is_fp8:
                for name in there:
                    self.wrong("config", f"config.json: ignored_layers lists {name}, which is FP8 or does not exist")
            elif not there:
                self.wrong("config", f"config.json: ignored_layers lacks {names[0]}, whose weights are not FP8")
            else:
                for name in sorted(set(names) - set(there)):
                    self.promised("config", f"config.json: ignored_layers lacks {name}, whose weights are not FP8: vLLM and "
                                  "SGLang ask for joined and for single modules")
        known = {name for names, _ in groups for name in names}
        for name in sorted(listed - known):
            self.promised("config", f"config.json: ignored_layers lists {name}, which is FP8 or does not exist")

    def _check_index(self) -> None:
        if not (self.folder / INDEX).is_file() and not self.ours and set(self.source.where.values()) == {SINGLE}:
            return  # a single file needs none
        index = read_json(self.folder / INDEX)
        weight_map, where = index.get("weight_map", {}), self.source.where
        for name in sorted(weight_map.keys() - where.keys()):
            self.wrong("index", f"{INDEX}: lists {name}, which is in no file")
        for name in sorted(where.keys() - weight_map.keys()):
            self.wrong("index", f"{INDEX}: does not list {name}")
        for name in sorted(where.keys() & weight_map.keys()):
            if weight_map[name] != where[name]:
                self.wrong("index", f"{INDEX}: {name} in {weight_map[name]}, but it is in {where[name]}")
        for name in sorted({p.name for p in self.folder.glob("*.safetensors")} - set(weight_map.values())):
            self.wrong("index", f"{name}: {INDEX} does not name it, and clients take {SINGLE} before any index")
        size = (index.get("metadata") or {}).get("total_size")
        if size != self.source.size():
            self.promised("index", f"{INDEX}: total_size {size}, the tensors have {self.source.size()} bytes")

    def _check_tensors(self) -> None:
        """Every tensor by itself, and its file's SHA-256 meanwhile."""
        sums = self.tensor_sums
        for name in sorted(n for n in sums.keys() - self.source.infos.keys() if not n.startswith("dflash")):
            self.wrong("checksum", f"{TENSOR_SUMS}: lists {name}, which is in no file")
        rule = self.manifest.get("scale_rule", "even") if self.manifest.get("rounded") else "even"
        if not self.ours or self.manifest.get("experts") == "copied":
            rule = None  # nobody here knows by which they were rounded
        checks = TensorChecks(self.source, self.found.layout, sums, rule, promised=self.ours and self.sums,
                              zero_norms=self.config.get("model_type") not in FAMILIES)
        if self.against is not None:
            self._guard("training", "contract C2", lambda: self._compare_with_training(checks))
        experts, incomparable = 0, []
        for report in side_by_side(self.pool, checks.report, self._units_and_files(checks), 4 * self.threads):
            for kind, text in report.findings:
                (self.note if kind == "blocks" and rule is None else self.wrong)(kind, text)
            experts += report.experts
            incomparable += [report.incomparable] if report.incomparable else []
        if incomparable:
            more = f" (and {len(incomparable) - 1} tensors more)" if len(incomparable) > 1 else ""
            self.wrong("training", f"contract C2: cannot be checked: {incomparable[0]}{more}")
        elif checks.weights is not None and not experts and self.found.layout not in ("bf16", "fp8"):
            self.wrong("training", "contract C2: there are no experts to compare")

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
        checks.weights = Weights(trained, trained, config, family_of(config).published(config),
                                 on_grid=not self.manifest.get("rounded"), scale_rule=self.manifest.get("scale_rule", "even"))
        placed = (self.folder / "dflash").is_dir() and self.manifest.get("mask_row", True)
        checks.mask_row = self.mask_row() if placed else None
        for finding in (*companion_differences(self.folder, self.against),
                        *config_differences(self.config, self.against, self.found.layout)):
            self.wrong("training", finding)

    def mask_row(self) -> int | None:
        """The vocabulary row that holds the drafter's mask embedding instead of the trained one."""
        return read_json(self.folder / "dflash" / "config.json").get("dflash_config", {}).get("mask_token_id")

    def _check_companions(self) -> None:
        named = sorted({str(v).split("--")[-1].partition(".")[0] + ".py" for v in (self.config.get("auto_map") or {}).values()})
        for name in ["README.md", "resolved.yaml", INDEX] if self.ours else []:
            if not (self.folder / name).is_file():
                self.wrong("companion", f"{name}: missing")
        for name in named:
            if not (self.folder / name).is_file():
                self.promised("code", f"{name}: missing, auto_map names it: transformers cannot load this folder by such code")
        for fault in code_faults(self.folder, self.config.get("auto_map") or {}):
            self.promised("code", fault)
        if self.ours:
            self._guard("companion", "README.md", lambda: front_matter(self.folder / "README.md"))
        for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
            if (self.folder / name).is_file():
                read_json(self.folder / name)
        if self.model_config is not None:
            for finding in token_faults(self.folder, self.model_config.get_text_config()):
                self.wrong("tokens", finding)
            for finding in config_contradictions(self.config, self.source):
                self.wrong("config", finding)
        if self.manifest.get("drafter") is False and (self.folder / "dflash").is_dir():
            self.wrong("drafter", "export.json: says there is no drafter, but dflash/ is there")

    def _check_drafter(self, folder: Path, where: str) -> None:
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
        self._add_faults("dialect", label, drafter_folder.dialect_faults(config))
        if self.model_config is not None:
            self._add_faults("drafter", label, drafter_folder.fit_faults(config, self.model_config.get_text_config()))
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
            self._guard("reference", f"{where}{REFERENCE}", lambda: self._check_reference(folder, where, special))
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
            raise ValueError(f"{len(source.infos):,} tensors, expected {len(expected)}")
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
