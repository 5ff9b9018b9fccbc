"""Whether a model's logits are its output head's and nothing more.

Training and measuring take hidden states and call the head themselves, chunk by chunk, so that the logits of a whole batch
never exist. Families that scale their logits before or after the head (Granite, Cohere, MiniCPM) or cap them (Gemma 2) would
get other losses and other text that way, silently. Such a model is refused when it is loaded.

Rejected: reading the configuration alone. A field says neither where it is applied nor whether; the names in the message are
guesses, the verdict is a measurement.
"""

from __future__ import annotations

import re

import torch
from torch import nn

PROBE_TOKENS = 4
PROBE_LOGIT = 100.0  # largest one of the probe: far above any cap in use (30 and 50), within float16
ROUNDINGS = 4  # in units of the dtype's epsilon, relative to the largest logit: a head that works in another precision
_CAUSES = re.compile(r"^(?!attn).*(logits?_(scal|soft|cap|mult)|softcap|lm_head_mult|output_mult|dim_model_base|mup)")


def require_decoder(model: nn.Module) -> None:
    """Raises ValueError for a class whose own decoder cannot be asked for (Llama 4: it stands under another name than the class
    promises), also on the meta device."""
    if model.base_model is model:
        raise ValueError(f"model type {model.config.model_type}: {type(model).__name__} gives no decoder without its head, "
                         "whose hidden states losses and answers here are made of, so it cannot be trained")


@torch.no_grad()
def require_plain_head(model: nn.Module) -> None:
    """Runs a few tokens through the model, in evaluation mode, and compares its logits with those of its head alone.

    Both see the same last hidden state, caught on its way from the base model, so that nothing but the head can differ, and
    enlarged there: the small logits of other tokens or of an untrained model would not feel a cap. No random numbers are drawn.

    Raises:
        ValueError: they differ by more than rounding; names the model type and the settings that look like the cause.
    """
    require_decoder(model)
    head, seen = model.get_output_embeddings(), []

    def enlarge(module, inputs, output) -> None:
        largest = head(output.last_hidden_state).abs().amax().float().clamp_min(1e-6)
        output.last_hidden_state = output.last_hidden_state * (PROBE_LOGIT / largest).to(output.last_hidden_state.dtype)
        seen.append(output.last_hidden_state)

    handle = model.base_model.register_forward_hook(enlarge)
    try:
        ids = torch.arange(PROBE_TOKENS, device=head.weight.device)[None]
        logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        handle.remove()
    if seen:  # else the model goes past its base model
        expected = head(seen[0]).float()
        allowed = ROUNDINGS * torch.finfo(head.weight.dtype).eps * float(expected.abs().amax())
        if not torch.isfinite(expected).all():
            return  # another defect, which the first loss will name
        if logits.shape == expected.shape and float((logits - expected).abs().amax()) <= allowed:
            return
    settings = model.config.get_text_config().to_dict()
    found = ", ".join(f"{k}={v}" for k, v in sorted(settings.items()) if v is not None and _CAUSES.search(k))
    raise ValueError(f"model type {model.config.model_type}: its logits are not those of its output head alone"
                     f"{f' ({found})' if found else ''}; losses and answers here are the head's, so it cannot be trained")
