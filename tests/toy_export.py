"""A tiny trained run: MiMo-V2 in bf16 with experts on the grid, its untrained base, a drafter, and their recipe."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint.families.registry import family_of
from checkpoint.trained import Weights
from export.job import Request, run
from modeling.configuration_mimo_v2 import MiMoV2Config
from modeling.drafter import DFlashDraftModel, drafter_config, save_drafter
from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM
from mxfp4 import fake_quantize
from recipes.load import load_recipe

RECIPE = """
name: toy
output: {root}/runs
model: {{path: {root}/base}}
data: {{train: [none], heldout: [none]}}
qat: {{steps: 1}}
"""


def toy_config(**changes) -> MiMoV2Config:
    """Odd sizes on purpose: a vocabulary of 90, five experts, one of them never routed to."""
    return MiMoV2Config(**{
        "vocab_size": 90, "hidden_size": 96, "num_hidden_layers": 4, "hybrid_layer_pattern": [0, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1], "num_attention_heads": 4, "num_key_value_heads": 2, "swa_num_key_value_heads": 4,
        "head_dim": 48, "v_head_dim": 16, "intermediate_size": 160, "moe_intermediate_size": 64, "n_routed_experts": 5,
        "num_experts_per_tok": 2, "sliding_window": 8, "add_swa_attention_sink_bias": True, "attention_value_scale": 0.612,
        "attention_projection_layout": "fused_qkv", "partial_rotary_factor": 0.5, "rope_theta": 1e5,
        "max_position_embeddings": 256, "eos_token_id": 3, **changes})


def toy_model(config: MiMoV2Config, seed: int = 0) -> MiMoV2ForCausalLM:
    """Random weights, with an empty (all-zero) expert, negative zeros, rows of very different size."""
    torch.manual_seed(seed)
    model = MiMoV2ForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(std=0.1)
            elif "sink" in name:
                p.normal_()
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(config.n_routed_experts) * 0.01)
                layer.mlp.experts.gate_up_proj[1] = 0
                layer.mlp.experts.down_proj[1] = -0.0
                layer.mlp.experts.down_proj[0] *= torch.logspace(-4, 1, config.hidden_size)[:, None]
    return model


def toy_weights(source, **changes) -> Weights:
    """What is exported of a source that holds `toy_model`."""
    config = toy_config(**changes)
    return Weights(source, source, config, family_of(config).published(config), on_grid=True, scale_rule="even")


def put_on_grid(model: torch.nn.Module, rule: str = "even") -> torch.nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".experts." in name and p.ndim == 3:
                p.copy_(fake_quantize(p, scale_rule=rule))
    return model


def toy_drafter(config: MiMoV2Config) -> DFlashDraftModel:
    torch.manual_seed(1)
    model = DFlashDraftModel(drafter_config(
        hidden_size=config.hidden_size, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, vocab_size=config.vocab_size, target_layer_ids=[0, 2],
        num_target_layers=config.num_hidden_layers, mask_token_id=config.vocab_size - 1, rotary_base=1e5, window=16,
        partial_rotary_factor=0.5, attention_value_scale=0.612))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    return model


def plain_drafter(hidden: int, layers: int, vocabulary: int = 90, **changes) -> DFlashDraftModel:
    """A drafter in z-lab's form: no sinks, no value scale, whole heads rotated."""
    torch.manual_seed(1)
    model = DFlashDraftModel(drafter_config(**{
        "hidden_size": hidden, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 24, "vocab_size": vocabulary, "target_layer_ids": [0, layers - 1],
        "num_target_layers": layers, "mask_token_id": vocabulary - 1, "rotary_base": 1e4, "window": 16,
        "attention_sink_bias": False, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    return model


def published_drafter(folder: Path, vocabulary: int = 90, **special):
    """A drafter as others publish it: z-lab's keys, no mask_embedding.pt, one file of its own name."""
    model = plain_drafter(96, 4, vocabulary, window=None)
    folder.mkdir()
    tensors = {n: p.detach().bfloat16() for n, p in model.named_parameters() if n != "mask_embedding"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": 8, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 24, "vocab_size": vocabulary, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
        "num_target_layers": 4, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * 2, "max_position_embeddings": 256, "use_sliding_window": False,
        "dflash_config": {"mask_token_id": vocabulary - 1, "target_layer_ids": [0, 3]} | special}))
    return folder, model


def make_run(root: Path, *, drafter: bool = True, config: MiMoV2Config | None = None) -> Path:
    """Writes base, trained model and drafter under `root`; returns the recipe's path."""
    config = config or toy_config()
    model = toy_model(config)
    model.save_pretrained(root / "base")
    put_on_grid(model).save_pretrained(root / "runs" / "toy" / "qat" / "model")
    if drafter:
        save_drafter(toy_drafter(config), root / "runs" / "toy" / "dflash" / "model")
    path = root / "toy.yaml"
    path.write_text(RECIPE.format(root=root), encoding="utf-8")
    return path


def save_run(root, model, family):
    model.save_pretrained(root / "base")
    put_on_grid(model).save_pretrained(root / "runs/toy/qat/model")
    path = root / f"{family}.yaml"
    path.write_text(RECIPE.format(root=root), encoding="utf-8")
    return path, model


def qwen3_run(root):
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(
        vocab_size=90, hidden_size=96, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, num_experts=5, num_experts_per_tok=2,
        decoder_sparse_step=1, tie_word_embeddings=False), dtype=torch.bfloat16).eval()
    return save_run(root, model, "qwen3")


def gpt_oss_run(root):
    from transformers import AutoModelForCausalLM, GptOssConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(
        vocab_size=90, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"]), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.normal_(std=0.1)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".experts." in name and p.ndim == 3:  # [experts, in, out]: blocks run along the second dimension
                p.copy_(fake_quantize(p, axis=1))
    model.save_pretrained(root / "runs/toy/qat/model")
    path = root / "gpt-oss.yaml"
    path.write_text(RECIPE.format(root=root), encoding="utf-8")
    return path, model


def export(recipe: Path, *overrides: str, **request) -> Path:
    """Exports in this process; returns the folder, which verified."""
    loaded = load_recipe(recipe, overrides)
    out = request.pop("out", recipe.parent / "out")
    assert run(loaded, Request(out=out, **request)) == 0
    return out
