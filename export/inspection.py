"""What a checkpoint folder must be, and everything in which one is not: the findings of `export/verify.py`.

Nothing here trusts the exporter: the folder is opened again from disk, the inventory is computed from its config.json,
tensors are read through safetensors as an engine would read them. Findings are collected, not raised, so that one run names
all of them. Where a file is too broken to go on, that is a finding and the checks that need it are left out.
"""

from __future__ import annotations

import pickle
import re
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError

from export.config_files import CHECKSUMS, checkpoint_files, ignored_layers, read_checksums, sha256
from export.drafter_files import EMBEDDING, MASK, REFERENCE, draft_round, drafter_faults, expected_tensors, read_reference
from export.grid import same_bits, unpack
from export.layouts import Weights, computed, encode
from export.shards import INDEX
from export.sources import SafetensorsSource, Source, open_source, read_expert, read_json
from modeling.names import fused_name, published_tensors
from mxfp4 import dequantize
from mxfp4.format import BLOCK_SIZE, E8M0_NAN

# What reading damaged files and configurations may raise, and no more: anything else is a defect of this file.
DAMAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError, RuntimeError, SafetensorError, EOFError,
          pickle.UnpicklingError, struct.error, UnicodeDecodeError)
# Tables, norms and matrices of a reference drafted again on another machine: float32 sums in another order.
REFERENCE_ERROR = 1e-3

Expected = dict[str, tuple[tuple[int, ...], set[str]]]


class Checkpoint:
    """An exported folder under inspection; `findings` grows as checks run."""

    def __init__(self, folder: Path, against: Path | None = None):
        self.folder, self.against = folder, against
        self.findings: list[str] = []
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
        with ThreadPoolExecutor(1) as self.hasher:
            self._run_checks()
        return self.findings

    def _run_checks(self) -> None:
        self._guard("config.json", self._read_config)
        self._guard(CHECKSUMS, self._check_files)
        self._guard("weights", self._open_weights)
        if self.source is not None and self.model_config is not None:
            self._guard("inventory", self._check_inventory)
            self._guard("index", self._check_index)
            self._guard("tensors", self._check_tensors)
            self._guard("contract C2", self._check_against)
        self._guard("companion files", self._check_companions)
        if (self.folder / "dflash").is_dir() or self.manifest.get("drafter"):
            self._guard("dflash", self._check_drafter)
        self._guard(CHECKSUMS, self._check_sums)

    def _guard(self, what: str, check) -> None:
        try:
            check()
        except DAMAGE as error:
            lines = str(error).splitlines() or [type(error).__name__]
            self.add(f"{what}: cannot be checked: {lines[0]}")

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
        if not isinstance(self.config.get("auto_map"), dict):
            self.add("config.json: auto_map is missing: no engine would find configuration_mimo_v2.py")

    def _check_files(self) -> None:
        """Names now; the SHA-256 sums are made by another thread while tensors are read (`_check_sums`)."""
        self.file_sums, self.tensor_sums = read_checksums(self.folder)
        if not self.file_sums:
            self.add(f"{CHECKSUMS}: missing or empty")
            return
        present = {p.as_posix() for p in checkpoint_files(self.folder)}
        for name in sorted(self.file_sums.keys() - present):
            self.add(f"{name}: missing, but listed in {CHECKSUMS}")
        for name in sorted(present - self.file_sums.keys()):
            self.add(f"{name}: not listed in {CHECKSUMS}")
        self.hashes = {name: self.hasher.submit(sha256, self.folder / name) for name in sorted(present & self.file_sums.keys())}

    def _check_sums(self) -> None:
        for name, digest in self.hashes.items():
            if digest.result() != self.file_sums[name]:
                self.add(f"{name}: bytes changed since the export (SHA-256 differs)")

    def _open_weights(self) -> None:
        files = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if not files:
            raise ValueError("no *.safetensors file")
        index = self.folder / INDEX
        if index.is_file():
            for name in sorted(set(read_json(index).get("weight_map", {}).values()) - set(files)):
                self.add(f"shard {name} is missing")
        whole = []
        for name in files:
            try:
                SafetensorsSource(self.folder, [name])
                whole.append(name)
            except DAMAGE as error:
                self.add(f"{name}: cannot be opened: {(str(error).splitlines() or [type(error).__name__])[0]}")
        if whole:
            self.source = SafetensorsSource(self.folder, whole)

    def _check_inventory(self) -> None:
        infos = self.source.infos
        self.tensors, self.bytes = len(infos), self.source.size()
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
        if self.layout == "native":
            held = {n: d for n, (_, d) in infos.items()}
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
        size = index.get("metadata", {}).get("total_size")
        if size != self.source.size():
            self.add(f"{INDEX}: total_size {size}, the tensors have {self.source.size()} bytes")

    def _check_tensors(self) -> None:
        """Reads every tensor once: checksum, block invariants, scales, finite values."""
        sums = getattr(self, "tensor_sums", {})
        rule = self.manifest.get("scale_rule", "even") if self.manifest.get("rounded") else "even"
        for name, tensor, scales, error in prefetched(self._tensors()):
            if error is not None:
                self.add(f"{name}: cannot be read: {error}")
                continue
            data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
            if name not in sums:
                self.add(f"{name}: no checksum in checksums.json")
            elif f"{zlib.crc32(data):08x}" != sums[name]:
                self.add(f"{name}: bytes changed since the export (CRC-32 differs)")
            for fault in tensor_faults(name, tensor):
                self.add(f"{name}: {fault}")
            if scales is not None:
                for fault in block_faults(tensor.view(torch.uint8), scales, rule):
                    self.add(f"{name}: {fault}")

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor | None, torch.Tensor | None, str | None]]:
        """(name, tensor, its scales if it holds codes, why it cannot be read)."""
        for name in sorted(self.source.infos):
            try:
                tensor, scale = self.source.read(name), scale_name(self.layout, name)
                packed = scale in self.source.infos and tensor.dtype in (torch.uint8, torch.int8)
                yield name, tensor, self.source.read(scale) if packed else None, None
            except DAMAGE as error:
                yield name, None, None, (str(error).splitlines() or [type(error).__name__])[0]

    def _check_against(self) -> None:
        """Contract C2: experts decoded from these files equal the trained ones bit for bit."""
        if self.against is None:
            return
        trained = open_source(self.against)
        weights = Weights(trained, trained, self.model_config, on_grid=not self.manifest.get("rounded"),
                          scale_rule=self.manifest.get("scale_rule", "even"))
        compared = 0
        pairs = ((name, codes, scales, trained_expert(weights, self.layout, name))
                 for name, codes, scales in exported_experts(self.layout, self.source))
        for name, codes, scales, wanted in prefetched(pairs):
            compared += 1
            decoded = unpack(codes, scales)
            if wanted.shape != decoded.shape:
                self.add(f"{name}: decodes to {list(decoded.shape)}, trained {list(wanted.shape)}")
            elif not same_bits(wanted, decoded):
                off = (wanted.view(torch.int16) != decoded.view(torch.int16)).nonzero()
                self.add(f"{name}: {off.shape[0]} of {wanted.numel()} weights differ from training (contract C2), the first at "
                         f"{off[0].tolist()}: {float(decoded[tuple(off[0])]):.6g}, trained {float(wanted[tuple(off[0])]):.6g}")
        if not compared:
            self.add("contract C2: there are no experts to compare")

    def _check_companions(self) -> None:
        names = ["README.md", "resolved.yaml", INDEX]
        names += sorted({v.partition(".")[0] + ".py" for v in (self.config.get("auto_map") or {}).values()})
        for name in names:
            if not (self.folder / name).is_file():
                self.add(f"{name}: missing")
        for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
            if (self.folder / name).is_file():
                read_json(self.folder / name)

    def _check_drafter(self) -> None:
        folder = self.folder / "dflash"
        for name in ("config.json", MASK, "model.safetensors.index.json", "dflash.py", "block_mask.py", REFERENCE):
            if not (folder / name).is_file():
                self.add(f"dflash/{name}: missing")
        config = read_json(folder / "config.json")
        mask = torch.load(folder / MASK, weights_only=True)
        for fault in drafter_faults(config, self.model_config, mask["mask_token_id"], mask["embedding"]):
            self.add(f"dflash: {fault}")
        if mask["embedding"].dtype != torch.bfloat16:
            self.add(f"dflash/{MASK}: embedding of {mask['embedding'].dtype}, expected bfloat16")
        self._check_drafter_tensors(folder, config)
        self._check_mask_row(mask)
        self._guard(f"dflash/{REFERENCE}", lambda: self._check_reference(folder, config))

    def _check_drafter_tensors(self, folder: Path, config: dict) -> None:
        """Engines ignore missing and unknown drafter tensors without a word: here they are named."""
        source, expected = open_source(folder), expected_tensors(config)
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

    def _check_mask_row(self, mask: dict) -> None:
        if self.source is None or EMBEDDING not in self.source.infos:
            return
        row = self.source.read(EMBEDDING)[mask["mask_token_id"]]
        if not torch.equal(row, mask["embedding"].to(row.dtype)):
            self.add(f"{EMBEDDING}: row {mask['mask_token_id']} (mask token) is not the vector of dflash/{MASK}")

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


def prefetched(items: Iterator) -> Iterator:
    """The items of an iterator, each made by another thread while the one before is worked on; only that thread reads."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def layout_of(config: dict) -> str:
    """The layout that a config.json declares.

    Raises:
        ValueError: a quantization_config that is none of the four.
    """
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method == "fp8":
        if config.get("model_type") == "mimo_v2":
            return "native"
        if quantization.get("expert_dtype") == "fp4":
            return "hf-fp8"
    elif method == "compressed-tensors" and quantization.get("format") == "mxfp4-pack-quantized":
        return "compressed-tensors"
    elif method == "mxfp4":
        return "gpt-oss"
    raise ValueError(f"config.json: model_type {config.get('model_type')!r} with quantization_config.quant_method "
                     f"{method!r} is none of the layouts native, hf-fp8, compressed-tensors, gpt-oss")


def configuration(config: dict):
    """The configuration object of a config.json (MiMoV2Config for model_type mimo_v2).

    Raises:
        ValueError: a geometry that cannot be.
    """
    from transformers import CONFIG_MAPPING

    from modeling.configuration_mimo_v2 import MiMoV2Config

    drop = ("quantization_config", "model_type", "dtype", "torch_dtype", "auto_map", "transformers_version")
    kind = MiMoV2Config if config.get("model_type") == "mimo_v2" else CONFIG_MAPPING[config.get("model_type")]
    return kind.from_dict({k: v for k, v in config.items() if k not in drop})


def expected_inventory(layout: str, config: dict, settings) -> Expected:
    """Name -> (shape, allowed dtypes) of every tensor, from the configuration alone (MTP layers left out)."""
    if layout == "native":
        ignored = set(config["quantization_config"].get("ignored_layers") or [])
        expected: Expected = {}
        for dense in ("fp8", "bf16"):
            for tensor in published_tensors(settings, dense=dense):
                module = re.sub(r"\.weight(_scale_inv)?$", "", tensor.name)
                matrix = re.search(r"(self_attn\.(qkv|[qkv])_proj|layers\.\d+\.mlp\.(gate|up|down)_proj)$", module)
                if not matrix or (dense == "bf16") == (module in ignored):
                    router = tensor.name.endswith("mlp.gate.weight")
                    expected[tensor.name] = (tensor.shape, {"F32", "BF16"} if router else {tensor.dtype})
        return expected
    return _inventory_by_transformers(layout, settings)


def _inventory_by_transformers(layout: str, settings) -> Expected:
    """From the client's own model on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    names = {"hf-fp8": ("", "_scale_inv", "I8"), "compressed-tensors": ("_packed", "_scale", "U8")}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    expected: Expected = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name in tied or "rotary" in name or "inv_freq" in name:
            continue
        fused = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)", name)
        if not fused:
            expected[name.replace("self_attn.sinks", "self_attn.attention_sink_bias" if layout != "gpt-oss"
                                  else "self_attn.sinks")] = (tuple(value.shape), {"BF16", "F32"})
            continue
        experts, a, b = value.shape
        if layout == "gpt-oss":
            grid = (experts, b, a // BLOCK_SIZE)
            expected[name + "_blocks"] = ((*grid, BLOCK_SIZE // 2), {"U8"})
            expected[name + "_scales"] = (grid, {"U8"})
            continue
        weight, scale, dtype = names[layout]
        parts, rows = (("down",), a) if fused[2] == "down_proj" else (("gate", "up"), a // 2)
        for e in range(experts):
            for part in parts:
                published = f"{fused[1]}.{e}.{part}_proj.weight"
                expected[published + weight] = ((rows, b // 2), {dtype})
                expected[published + scale] = ((rows, b // BLOCK_SIZE), {"U8"})
    return expected


def scale_name(layout: str, name: str) -> str | None:
    """The scales' name of a tensor of codes, or None for any other tensor."""
    if layout == "gpt-oss":
        return name.removesuffix("_blocks") + "_scales" if name.endswith("_blocks") else None
    if layout == "compressed-tensors":
        return name.removesuffix("_packed") + "_scale" if name.endswith(".weight_packed") else None
    if fused_name(name) is None:
        return None
    return name + ("_scale" if layout == "native" else "_scale_inv")


def exported_experts(layout: str, source: Source) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(published name, codes uint8 [out, in / 2], scales) of every expert matrix; "<fused>[e]" for gpt-oss."""
    for name in sorted(source.infos):
        scale = scale_name(layout, name)
        if scale is None or scale not in source.infos:
            continue
        codes, scales = source.read(name).view(torch.uint8), source.read(scale)
        if layout == "gpt-oss":
            for e in range(codes.shape[0]):
                yield f"{name.removesuffix('_blocks')}[{e}]", codes[e].flatten(-2), scales[e]
        else:
            yield name.removesuffix("_packed"), codes, scales


def trained_expert(weights: Weights, layout: str, name: str) -> torch.Tensor:
    """What the exported matrix must decode to, bf16 [out, in]: the trained weight, or the base's rounded by the rule."""
    from export.layouts import codes_of

    if layout == "gpt-oss":
        fused, _, rest = name.partition("[")
        w = computed(weights, weights.trained.read_rows(fused, int(rest[:-1]), slice(None)).mT.contiguous())
        codes = encode(name, w, on_grid=False, scale_rule=weights.scale_rule) if not weights.on_grid else None
    else:
        w = computed(weights, read_expert(weights.trained, name)) if weights.on_grid else None
        codes = codes_of(weights, name) if w is None or w.dtype == torch.uint8 else None
    return w.to(torch.bfloat16) if codes is None else dequantize(*codes, dtype=torch.bfloat16)


def block_faults(codes: torch.Tensor, scales: torch.Tensor, rule: str) -> Iterator[str]:
    """Violations of what every quantizer of this rule leaves in a block.

    The largest magnitude is 4 or 6 units (floor, even; also trained weights, whatever their rule) or at least 3 (rceil, mse);
    a block of zeros has the scale byte 0; blocks at the smallest scale may hold anything.
    """
    nibbles = codes if codes.ndim == 4 else codes.unflatten(-1, (-1, BLOCK_SIZE // 2))
    largest = torch.maximum(nibbles & 7, (nibbles >> 4) & 7).amax(-1)
    if largest.shape != scales.shape:
        yield f"{list(largest.shape)} blocks, {list(scales.shape)} scales"
        return
    least = 6 if rule in ("floor", "even") else 5
    low = (largest < least) & (largest > 0) & (scales > 0) & (scales != E8M0_NAN)
    if bool(low.any()):
        index = low.nonzero()[0].tolist()
        yield (f"{int(low.sum())} blocks whose largest magnitude is below {4 if least == 6 else 3} units, the first at "
               f"{index}: not what scale rule {rule} writes")
    idle = (largest == 0) & (scales != 0) & (scales != E8M0_NAN)
    if bool(idle.any()):
        yield f"{int(idle.sum())} blocks of zeros with a scale, the first at {idle.nonzero()[0].tolist()}"


def tensor_faults(name: str, tensor: torch.Tensor) -> Iterator[str]:
    """Values that no tensor of this kind may have."""
    if re.search(r"weight_scale$|_scales$|experts\..*weight_scale_inv$", name) and tensor.dtype == torch.uint8:
        bad = (tensor == E8M0_NAN).nonzero()
        if bad.numel():
            yield f"{bad.shape[0]} scales are 255 (NaN), the first at {bad[0].tolist()}"
        beyond = (tensor > 252) & (tensor != E8M0_NAN)
        if bool(beyond.any()):
            yield f"scale {int(tensor[beyond][0])} overflows bf16, expected at most 252"
        return
    if not tensor.is_floating_point():
        return
    values = tensor.float()
    bad = (~torch.isfinite(values)).nonzero()
    if bad.numel():
        yield f"{bad.shape[0]} values are not finite, the first at {bad[0].tolist()}"
    if name.endswith("weight_scale_inv") and not bool((values > 0).all()):
        yield "a scale that is not positive"
    if re.search(r"(layernorm|norm)\.weight$", name) and not bool(values.any()):
        yield "a norm whose weights are all zero"
