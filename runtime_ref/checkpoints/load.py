"""A folder to the target's weights on one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from checkpoint.tensor_files import TensorFiles
from runtime_ref.checkpoints.folder import verify_checksums
from runtime_ref.checkpoints.host_weights import DECODED_BYTES, DecodedCache, TargetWeights
from runtime_ref.core.tensor_parallel import SINGLE_RANK, Ranks


def load_target(folder: str | Path, ranks: Ranks = SINGLE_RANK, *, decoded_bytes: int = DECODED_BYTES, checksum: bool = False,
                progress: Callable[[int, int], None] | None = None) -> TargetWeights:
    """One rank's weights of the target.

    Args:
        decoded_bytes: limit of decoded experts in memory.
        checksum: compare the shards with the folder's checksums.sha256 first.
        progress: called with (layers done, layers).

    Raises:
        ValueError: a damaged or incomplete folder; more ranks than the geometry can be cut into.
    """
    from runtime_ref.checkpoints.readers import open_folder  # it builds on this module

    if checksum:
        verify_checksums(folder)
    config, Kind = open_folder(folder)
    reader = Kind(TensorFiles(Path(folder)), config, ranks)
    cache = DecodedCache(decoded_bytes)
    layers = []
    for index in range(config.num_hidden_layers):
        layers.append(reader.layer(index, cache))
        if progress is not None:
            progress(index + 1, config.num_hidden_layers)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    shape = (config.vocab_size, config.hidden_size)
    return TargetWeights(config, ranks, reader.matrix("model.embed_tokens.weight", shape), layers,
                         reader.vector("model.norm.weight", config.hidden_size),
                         reader.columns_of(reader.matrix(head, shape)), cache)
