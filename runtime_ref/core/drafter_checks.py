"""What a drafter must fit before it may run beside a target."""

from __future__ import annotations

from modeling.drafter import DFlashDraftModel


def check_drafter(model: DFlashDraftModel, target, refused: tuple[str, ...] = ("convolution_rank", "markov_rank")) -> None:
    """Refuses a drafter that does not belong to this target, or has an option that a backend does not know."""
    where = "dflash/config.json"
    for option in refused:
        value = model.config.dflash_config.get(option)
        if value:
            raise ValueError(f"{where}: {option}: {value}, expected 0 (this backend runs the published form only)")
    if model.config.hidden_size != target.hidden_size:
        raise ValueError(f"{where}: hidden_size: {model.config.hidden_size}, expected the target's {target.hidden_size}")
    last = target.num_hidden_layers - 1
    if max(model.target_layer_ids) > last:
        raise ValueError(f"{where}: target_layer_ids: layer {max(model.target_layer_ids)}, expected 0 to {last}")
