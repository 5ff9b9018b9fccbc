"""Experts of a model that chooses all of them for every token, as two matrix products instead of one per expert.

With every expert chosen, the experts of a layer are one feed-forward layer whose inner units are weighted by the router:

    z [N, E, 2I] = x [N, H] @ gate_up [E * 2I, H]^T       y [N, H] = (weight_NE * act(gate) * up) [N, E * I] @ down [E * I, H]

so nothing has to be sorted or gathered. The sums run over all experts at once in the product's float32 accumulators; a grouped
product rounds each expert's output to the dtype first.
"""

from __future__ import annotations

import torch
from torch import nn

NAME = "all_experts"
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def all_experts_forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                        top_k_weights: torch.Tensor) -> torch.Tensor:
    """Forward of a fused-experts module (transformers' experts interface): [N, H], [N, E] and [N, E] -> [N, H]."""
    E, two_I, H = self.gate_up_proj.shape
    z_NEJ = (hidden_states @ self.gate_up_proj.view(E * two_I, H).T).view(-1, E, two_I)
    weights_NE = torch.zeros(z_NEJ.shape[:2], dtype=z_NEJ.dtype, device=z_NEJ.device)
    weights_NE = weights_NE.scatter(1, top_k_index, top_k_weights.to(z_NEJ.dtype))
    inner_NEI = self._apply_gate(z_NEJ) * weights_NE[:, :, None]
    return inner_NEI.flatten(1) @ self.down_proj.transpose(1, 2).reshape(E * two_I // 2, H)


def use_all_experts(model: nn.Module) -> bool:
    """Lets `model` run its experts so if every token has all of them and their layout allows it; returns whether it does."""
    experts = [m for m in model.modules() if hasattr(m, "is_transposed") and hasattr(m, "gate_up_proj")]
    total = next((getattr(model.config, key) for key in _COUNTS if hasattr(model.config, key)), None)
    if not experts or total is None or getattr(model.config, "num_experts_per_tok", None) != total:
        return False
    if any(m.is_transposed or m.has_bias or not m.has_gate or getattr(m, "has_post_expert_norm", False) for m in experts):
        return False
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, all_experts_forward)
    model.set_experts_implementation(NAME)
    return True
