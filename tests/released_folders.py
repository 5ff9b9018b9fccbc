"""Small folders in the format of the published MiMo releases, written without this project's own code.

Everything here is typed from the published configurations and tensor lists: names, dtypes, which keys are there and which are
not, the fused query/key/value matrix in one chunk per key head, FP8 in blocks of 128 x 128 whose grid restarts with each chunk,
experts as bytes. Only sizes are smaller. What a project's exporter adds (checksums, export.json, a stored reference) is absent.

`RELEASES` names the releases: FP8 bases without a drafter, and with one; MXFP4 experts with a drafter.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LAYERS, PATTERN, MOE = 4, [0, 1, 1, 0], [0, 1, 1, 1]
HIDDEN, HEADS, QK, V, VOCAB, EXPERTS, CHOSEN, INNER, DENSE, WINDOW = 128, 4, 48, 32, 264, 6, 2, 64, 160, 16
RELEASES = {
    "V2-Flash": {"kind": "mimo_v2_flash", "keys": 2, "swa_keys": 4, "fused": False, "scale": 0.707, "theta": 5e6},
    "V2.5": {"kind": "mimo_v2", "keys": 2, "swa_keys": 4, "fused": True, "scale": 0.707, "theta": 1e7, "drafter": "V2.5"},
    "V2.5-Pro": {"kind": "mimo_v2", "keys": 2, "swa_keys": 2, "fused": True, "scale": 0.612, "theta": 1e7},
    "V2.5-Pro-FP4-DFlash": {"kind": "mimo_v2", "keys": 2, "swa_keys": 2, "fused": True, "scale": 0.612, "theta": 1e7,
                            "fp4": True, "drafter": "V2.5-Pro"},
}
MASK_TOKEN = 261


def root_config(release: str) -> dict:
    r = RELEASES[release]
    name = "MiMoV2Flash" if r["kind"] == "mimo_v2_flash" else "MiMoV2"
    module = "mimo_v2_flash" if r["kind"] == "mimo_v2_flash" else "mimo_v2"
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
                    "ignored_layers": [f"model.layers.{i}.self_attn.o_proj" for i in range(LAYERS)]
                    + ["model.decoder.self_attn.o_proj"]}
    if r.get("fp4"):
        quantization |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    elif release == "V2.5":
        quantization["store_dtype"] = "fp8"
    config = {
        "architectures": [f"{name}ForCausalLM"], "model_type": r["kind"],
        "auto_map": {"AutoConfig": f"configuration_{module}.{name}Config", "AutoModel": f"modeling_{module}.{name}Model",
                     "AutoModelForCausalLM": f"modeling_{module}.{name}ForCausalLM"},
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "hybrid_layer_pattern": PATTERN, "moe_layer_freq": MOE,
        "num_attention_heads": HEADS, "swa_num_attention_heads": HEADS, "num_key_value_heads": r["keys"],
        "swa_num_key_value_heads": r["swa_keys"], "head_dim": QK, "swa_head_dim": QK, "v_head_dim": V, "swa_v_head_dim": V,
        "attention_value_scale": r["scale"], "add_full_attention_sink_bias": False, "add_swa_attention_sink_bias": True,
        "sliding_window": WINDOW, "sliding_window_size": WINDOW, "attention_chunk_size": WINDOW,
        "partial_rotary_factor": 0.334, "rope_theta": r["theta"], "swa_rope_theta": 10000, "intermediate_size": DENSE,
        "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "n_shared_experts": None,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": None, "layernorm_epsilon": 1e-5, "vocab_size": VOCAB, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 0, "transformers_version": "4.40.1", "use_cache": True,
        "quantization_config": quantization}
    if r["fused"]:
        config["attention_projection_layout"] = "fused_qkv"
    return config


def drafter_config(which: str) -> dict:
    """As published: the rotary base stands in `dflash_config` alone, and nothing says `layer_types` or `is_causal`."""
    return {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "v_head_dim": 32, "partial_rotary_factor": 0.5, "block_size": 8,
        "dflash_config": {"target_layer_ids": [0, 2, LAYERS - 1], "mask_token_id": MASK_TOKEN, "num_anchors": 4096,
                          "block_size": 8, "loss_decay_gamma": 7.0, "use_swa": True, "swa_window_size": 24,
                          "backbone_rotary_base": 5000000, "attention_value_scale": 0.612, "attention_sink_bias": True},
        "num_target_layers": LAYERS, "vocab_size": VOCAB if which == "V2.5" else VOCAB - 8, "max_position_embeddings": 262144,
        "rope_theta": 10000, "sliding_window": 24, "rms_norm_eps": 1e-6 if which == "V2.5" else 1e-5,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0}


class Writer:
    """Tensors by name, drawn from one seed."""

    def __init__(self, seed: int):
        self.tensors: dict[str, torch.Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, *shape: int, std: float = 0.12) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * std

    def bf16(self, name: str, value: torch.Tensor) -> None:
        self.tensors[name] = value.to(torch.bfloat16)

    def norm(self, name: str, size: int) -> None:
        self.bf16(name, 1 + self.draw(size, std=0.2))

    def fp8(self, name: str, value: torch.Tensor, chunks: int = 1) -> None:
        """Blocks of 128 x 128, whose grid restarts with each chunk of rows."""
        codes, scales = [], []
        for chunk in value.chunk(chunks):
            rows = []
            for top in range(0, chunk.shape[0], 128):
                row = []
                for left in range(0, chunk.shape[1], 128):
                    block = chunk[top:top + 128, left:left + 128]
                    scale = float(block.abs().max()) / 448
                    chunk[top:top + 128, left:left + 128] = block / scale
                    row.append(scale)
                rows.append(row)
            codes.append(chunk.to(torch.float8_e4m3fn))
            scales.append(torch.tensor(rows))
        self.tensors[name] = torch.cat(codes)
        self.tensors[f"{name}_scale_inv"] = torch.cat(scales)

    def fp4(self, name: str, value: torch.Tensor) -> None:
        """Blocks of 32 along a row: the floor rule of the OCP specification, low nibble first."""
        blocks = value.reshape(value.shape[0], -1, 32)
        exponent = blocks.abs().amax(-1).clamp_min(2.0**-120).log2().floor() - 2
        scaled = blocks / torch.exp2(exponent)[..., None]
        codes = (scaled.abs()[..., None] - VALUES).abs().argmin(-1) + 8 * (scaled < 0)
        low, high = codes[..., ::2], codes[..., 1::2]
        self.tensors[name] = (low + 16 * high).to(torch.uint8).flatten(1).contiguous()
        self.tensors[f"{name}_scale"] = (exponent + 127).to(torch.uint8)


def root_tensors(release: str, seed: int = 0) -> dict[str, torch.Tensor]:
    r, w = RELEASES[release], Writer(seed)
    w.bf16("model.embed_tokens.weight", w.draw(VOCAB, HIDDEN))
    w.tensors["model.embed_tokens.weight"][MASK_TOKEN] = 0  # the mask token's row is untrained
    for i in range(LAYERS):
        _attention(w, f"model.layers.{i}", r, r["swa_keys"] if PATTERN[i] else r["keys"], sink=bool(PATTERN[i]))
        _mlp(w, f"model.layers.{i}.mlp", r, moe=bool(MOE[i]))
    w.norm("model.norm.weight", HIDDEN)
    w.bf16("lm_head.weight", w.draw(VOCAB, HIDDEN, std=0.4))
    if r["fused"]:
        _mtp(w, r)
    return w.tensors


def _attention(w: Writer, layer: str, r: dict, keys: int, *, sink: bool, norms: bool = True) -> None:
    if norms:
        w.norm(f"{layer}.input_layernorm.weight", HIDDEN)
        w.norm(f"{layer}.post_attention_layernorm.weight", HIDDEN)
    if r["fused"]:  # one chunk per key head: [its queries | its key | its value]
        w.fp8(f"{layer}.self_attn.qkv_proj.weight", w.draw(HEADS * QK + keys * (QK + V), HIDDEN), chunks=r["keys"])
    else:
        w.fp8(f"{layer}.self_attn.q_proj.weight", w.draw(HEADS * QK, HIDDEN))
        w.fp8(f"{layer}.self_attn.k_proj.weight", w.draw(keys * QK, HIDDEN), chunks=keys)
        w.fp8(f"{layer}.self_attn.v_proj.weight", w.draw(keys * V, HIDDEN), chunks=keys)
    w.bf16(f"{layer}.self_attn.o_proj.weight", w.draw(HIDDEN, HEADS * V))
    if sink:
        w.bf16(f"{layer}.self_attn.attention_sink_bias", w.draw(HEADS, std=1.0))


def _mlp(w: Writer, mlp: str, r: dict, *, moe: bool) -> None:
    shapes = {"gate": (INNER if moe else DENSE, HIDDEN), "up": (INNER if moe else DENSE, HIDDEN),
              "down": (HIDDEN, INNER if moe else DENSE)}
    if not moe:
        for kind, shape in shapes.items():
            w.fp8(f"{mlp}.{kind}_proj.weight", w.draw(*shape))
        return
    w.tensors[f"{mlp}.gate.weight"] = w.draw(EXPERTS, HIDDEN)  # float32, as published
    w.tensors[f"{mlp}.gate.e_score_correction_bias"] = w.draw(EXPERTS, std=0.1)
    for e in range(EXPERTS):
        for kind, shape in shapes.items():
            (w.fp4 if r.get("fp4") else w.fp8)(f"{mlp}.experts.{e}.{kind}_proj.weight", w.draw(*shape))


def _mtp(w: Writer, r: dict) -> None:
    layer = "model.mtp.layers.0"
    for name in ("enorm", "hnorm", "final_layernorm", "input_layernorm", "pre_mlp_layernorm"):
        w.norm(f"{layer}.{name}.weight", HIDDEN)
    w.bf16(f"{layer}.eh_proj.weight", w.draw(HIDDEN, 2 * HIDDEN))
    _attention(w, layer, r, r["swa_keys"], sink=True, norms=False)
    _mlp(w, f"{layer}.mlp", r, moe=False)


def drafter_tensors(which: str, seed: int = 1) -> dict[str, torch.Tensor]:
    c, w = drafter_config(which), Writer(seed)
    w.bf16("fc.weight", w.draw(HIDDEN, 3 * HIDDEN))
    w.norm("hidden_norm.weight", HIDDEN)
    w.norm("norm.weight", HIDDEN)
    for i in range(c["num_hidden_layers"]):
        layer = f"layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            w.norm(f"{layer}.{name}.weight", HIDDEN)
        for name, heads in (("q", c["num_attention_heads"]), ("k", c["num_key_value_heads"]), ("v", c["num_key_value_heads"])):
            w.bf16(f"{layer}.self_attn.{name}_proj.weight", w.draw(heads * c["head_dim"], HIDDEN))
        w.bf16(f"{layer}.self_attn.o_proj.weight", w.draw(HIDDEN, c["num_attention_heads"] * c["head_dim"]))
        w.norm(f"{layer}.self_attn.q_norm.weight", c["head_dim"])
        w.norm(f"{layer}.self_attn.k_norm.weight", c["head_dim"])
        w.bf16(f"{layer}.self_attn.attention_sink_bias", w.draw(c["num_attention_heads"], std=1.0))
        for name in ("gate", "up"):
            w.bf16(f"{layer}.mlp.{name}_proj.weight", w.draw(c["intermediate_size"], HIDDEN))
        w.bf16(f"{layer}.mlp.down_proj.weight", w.draw(HIDDEN, c["intermediate_size"]))
    return w.tensors


def write_release(folder: Path, release: str, *, index: bool = False, tokenizer: bool = True, seed: int = 0) -> Path:
    """Writes `release` into `folder`: two shards and an index if `index`, else one file; `dflash/` where it has a drafter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(root_config(release), indent=2))
    module = "mimo_v2_flash" if release == "V2-Flash" else "mimo_v2"
    for name in (f"configuration_{module}.py", f"modeling_{module}.py"):
        (folder / name).write_text("# the published code stands here\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "bos_token_id": 0, "top_p": 0.95}))
    tensors = {name: t.contiguous() for name, t in root_tensors(release, seed).items()}
    if index:
        _shards(folder, tensors)
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        from tiny_models import write_tokenizer

        write_tokenizer(folder)
    if which := RELEASES[release].get("drafter"):
        write_published_drafter(folder / "dflash", which)
    return folder


def _shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names, where = sorted(tensors), {}
    for i in range(2):
        file = f"model_pp0_ep0_shard{i}.safetensors"
        own = names[math.ceil(len(names) / 2) * i:math.ceil(len(names) / 2) * (i + 1)]
        save_file({n: tensors[n] for n in own}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(own, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))


def write_published_drafter(folder: Path, which: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = drafter_tensors(which)
    (folder / "config.json").write_text(json.dumps(drafter_config(which), indent=2))
    (folder / "dflash.py").write_text("# the published code stands here\n")
    save_file(tensors, folder / "dflash_draft_model.safetensors", metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(tensors), "dflash_draft_model.safetensors")}))
    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(9)) * 0.12
    torch.save({"mask_token_id": MASK_TOKEN, "embedding": vector.to(torch.bfloat16)}, folder / "mask_embedding.pt")
