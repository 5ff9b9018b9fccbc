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
missing, unexpected, shape, dtype, values, scales, blocks, training, companion, code, tokens, drafter, `dialect` (aliases of a
key that disagree), engine, mask, reference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

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
from checkpoint.detect_format import open_source
from checkpoint.families.registry import FAMILIES, family_of
from checkpoint.findings import DAMAGE, MANY, Finding, Verification
from checkpoint.inventory import configuration, expected_inventory, is_mimo, layout_of
from checkpoint.quantization import module_names, quantization_config
from checkpoint.tensor_checks import TensorChecks, side_by_side, usable_cores
from checkpoint.tensor_files import INDEX, SINGLE, TensorFiles
from checkpoint.trained import Weights
from checkpoint.verify_drafter import DrafterChecks
from mxfp4.format import BLOCK_SIZE
from storage.reading import first_line, read_json, strange_files
from storage.terminal import counted

__all__ = ["Finding", "Verification", "verify"]


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


class _Verifier(DrafterChecks):
    """A folder under inspection; `found` grows as checks run."""

    def __init__(self, folder: Path, against: Path | None, skip: Callable[[Path], bool], sums: bool = True):
        super().__init__(folder)
        self.against, self.skip, self.threads, self.sums = against, skip, usable_cores(), sums
        self.hashed: set[str] = set()
        self.hashes: dict[str, Future] = {}
        self.file_sums: dict[str, str] = {}
        self.tensor_sums: dict[str, str] = {}
        self.source: TensorFiles | None = None
        self.model_config = None
        self.config: dict = {}
        self.manifest: dict = {}

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
        self.guard("config", "config.json", self._read_config)
        self.guard("checksum", CHECKSUMS, self._check_files)
        if self.found.layout != "drafter":
            self.guard("file", "weights", self._open_weights)
        if self.source is not None and self.model_config is not None:
            self.guard("config", "inventory", self._check_inventory)
        if self.source is not None and self.found.layout is not None:
            self.guard("index", "index", self._check_index)
            self.guard("file", "tensors", self._check_tensors)
        for name in sorted(self.hashed):
            self._hash(name)
        self.guard("companion", "companion files", self._check_companions)
        if self.found.layout == "drafter":
            self.guard("drafter", "drafter", lambda: self.check_drafter(self.folder, ""))
        elif (self.folder / "dflash").is_dir() or self.manifest.get("drafter"):
            self.guard("drafter", "dflash", lambda: self.check_drafter(self.folder / "dflash", "dflash/"))
        self.guard("checksum", CHECKSUMS, self._check_sums)

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
        if not (self.folder / CHECKSUMS).read_bytes().endswith(b"\n"):
            self.promised("checksum", f"{CHECKSUMS}: cut: its last line has no end")
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
            self.guard("index", INDEX, lambda: listed.update(read_json(self.folder / INDEX).get("weight_map", {})))
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
            self.guard("training", "contract C2", lambda: self._compare_with_training(checks))
        experts, incomparable = 0, []
        for report in side_by_side(self.pool, checks.report, self._units_and_files(checks), 4 * self.threads):
            for kind, text in report.findings:
                (self.note if kind == "blocks" and rule is None else self.wrong)(kind, text)
            experts += report.experts
            incomparable += [report.incomparable] if report.incomparable else []
        if incomparable:
            more = f" (and {counted(len(incomparable) - 1, 'tensor')} more)" if len(incomparable) > 1 else ""
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
                                 on_grid=not self.manifest.get("rounded"), scale_rule=self.manifest.get("scale_rule", "even"),
                                 decoded=self.manifest.get("experts") == "decoded")
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
            self.guard("companion", "README.md", lambda: front_matter(self.folder / "README.md"))
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
