"""What can be known of a drafter's run from its target's files, before a weight is read: what would stop it late, and the bytes
that it writes."""

from __future__ import annotations

from pathlib import Path

import torch

from checkpoint.findings import one_line
from checkpoint.load import require_known_activation
from dflash_train import acceptance
from dflash_train.optimizer import is_matrix
from dflash_train.target import configure_drafter, mask_token_id, target_files, target_folder
from modeling.drafter import DFlashDraftModel
from recipes.schema import Recipe
from training.preflight import Foreseen, checkpoints_at_once


def foresee(recipe: Recipe, *, planned: bool = False) -> Foreseen:
    """What would stop the job after its target was loaded (mask token, the drafter's geometry, prompts that are measured at the
    end), and the bytes that it writes into its folder.

    planned: the target may be still to come.
    """
    from transformers import AutoConfig

    trained = Path(recipe.output) / recipe.name / "qat" / "model"
    if planned and (recipe.model.path is None or recipe.dflash.target == "qat" and not trained.is_dir()):
        return [], {}
    try:
        trust = recipe.model.trust_remote_code
        with one_line(target_folder(recipe), "no usable target", passed=(OSError,)):
            files = target_files(recipe)
            config = AutoConfig.from_pretrained(str(files.path), trust_remote_code=trust)
        if not trust:
            require_known_activation(config, files.path)
        mask = mask_token_id(recipe.drafter.mask_token, files.tokenizer, files.vocabulary, files.end_ids)
        drafter = meta_drafter(recipe, config.get_text_config(), files.target_layers, mask)
        acceptance.groups(recipe, files)
    except ValueError as error:
        return [str(error)], {}
    return [], writes(recipe, drafter)


def meta_drafter(recipe: Recipe, config, target_layers: list[int], mask_id: int) -> DFlashDraftModel:
    """The recipe's drafter without weights. config: the target's (its text part).

    Raises:
        ValueError: a geometry that cannot be.
    """
    try:
        settings = configure_drafter(recipe.drafter, recipe.dflash, config=config, target_layers=target_layers, mask_id=mask_id)
    except ValueError as error:
        raise ValueError(f"drafter: {error}") from None
    with torch.device("meta"):
        return DFlashDraftModel(settings)


def moment_bytes(recipe: Recipe, drafter: DFlashDraftModel) -> int:
    """Optimizer moments, float32: Muon keeps one for a matrix."""
    muon = matrix_parameters(drafter) if recipe.dflash.optimizer.name == "muon" else 0
    return 8 * sum(p.numel() for p in drafter.parameters()) - 4 * muon


def matrix_parameters(drafter: DFlashDraftModel) -> int:
    """Parameters in the matrices that Muon updates."""
    return sum(p.numel() for n, p in drafter.named_parameters() if is_matrix(n, p))


def writes(recipe: Recipe, drafter: DFlashDraftModel) -> dict[str, int]:
    """Bytes on the disk at once, at most, of a run's checkpoints (float32 weights and moments) and result (bf16)."""
    job, parameters = recipe.dflash, sum(p.numel() for p in drafter.parameters())
    count = checkpoints_at_once(job.steps, job.checkpoint_every, job.keep_last)
    checkpoint = 4 * parameters + moment_bytes(recipe, drafter)
    return {f"checkpoints ({count} at once)": count * checkpoint, "model/": 2 * parameters}
