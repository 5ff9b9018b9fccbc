"""Tiny random models of any family: one step of training, stock loading, equality."""

import torch
from toy_export import RECIPE
from transformers import AutoModelForCausalLM

from qat.expert_quantizer import ExpertQuantizer
from tools.family_configs import tiny


def random_model(model_type: str, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(model_type, **changes), dtype=torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.is_floating_point():
                p.normal_(std=0.08)
    return model.eval()


def write_recipe(root):
    path = root / "recipe.yaml"
    path.write_text(RECIPE.format(root=root), encoding="utf-8")
    return path


def train_a_step(model):
    """Attach, one step of plain gradient descent on the masters, round."""
    quantizer = ExpertQuantizer(model)
    ids = torch.arange(48).view(2, 24) % 90 + 3
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    quantizer.pull_gradients()
    with torch.no_grad():
        for _, master in quantizer:
            master -= 0.1 * master.grad
    quantizer.requantize()
    return quantizer


def stock(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model


def equal_weights(model, trained) -> None:
    expected = trained.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value.float(), expected[name].float()), name
