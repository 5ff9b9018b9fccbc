"""Tiny random Qwen3-MoE, GLM-4-MoE, Mixtral and gpt-oss models, exported into the layouts of their families."""

import torch
from toy_export import RECIPE, export, put_on_grid
from transformers import AutoModelForCausalLM


def qwen3(**changes):
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**{
        "vocab_size": 120, "hidden_size": 96, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "num_experts": 5, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1, "mlp_only_layers": [2], "norm_topk_prob": True, "tie_word_embeddings": False,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, **changes})


def gpt_oss(**changes):
    from transformers import GptOssConfig

    return GptOssConfig(**{
        "vocab_size": 120, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "max_position_embeddings": 512,
        "tie_word_embeddings": False, **changes})


def mixtral(**changes):
    """Tied embeddings, and every expert chosen as in a dense model cut into experts."""
    from transformers import MixtralConfig

    return MixtralConfig(**{
        "vocab_size": 120, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 4, "sliding_window": None,
        "tie_word_embeddings": True, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, **changes})


def glm4(**changes):
    """Groups of which one is chosen, two shared experts, half of each head rotated, every bias and norm that the class has."""
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(**{
        "vocab_size": 120, "hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "n_shared_experts": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
        "partial_rotary_factor": 0.5, "attention_bias": True, "use_qk_norm": True, "tie_word_embeddings": False,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, **changes})


def exported(root, config, layout):
    """Folder in a layout, and transformers' model of it in float32."""
    from mxfp4 import fake_quantize

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0, 0.1) if "norm" in name else p.normal_(std=0.15 if p.ndim > 1 else 0.5)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.normal_(std=0.1)
    model.save_pretrained(root / "base")
    if layout == "gpt-oss":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".experts." in name and p.ndim == 3:
                    p.copy_(fake_quantize(p, axis=1))
    else:
        model = put_on_grid(model)
    model.save_pretrained(root / "runs/toy/qat/model")
    recipe = root / "toy.yaml"
    recipe.write_text(RECIPE.format(root=root), encoding="utf-8")
    folder = export(recipe, f"export.layout={layout}")
    torch.nn.Module.float(model)
    return folder, model
