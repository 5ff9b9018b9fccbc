"""QAT on sharded models: masters are the FSDP parameters of the experts, codes travel instead of weights.

What differs from one process (`qat.trainer`), and nothing else:

    weights      every rank reads and holds its shards (`modeling.load` with a `DistributedConfig`); the teacher is a second
                 tree of shards: FSDP models cannot be copied
    experts      float32 shards, gathered as MXFP4 codes (`training.sharding.quantized_gather`); no rounded copy is kept
    gradients    reduced by FSDP in float32 onto the shards, once per micro-step
    norm         over all ranks; everything else of an update is local
    evaluation   the plainly rounded model is the student with the original experts as sources of its codes
    checkpoints  `training.sharding.checkpoint`
"""

from __future__ import annotations

import torch
from torch import nn

from qat.attach import ExpertQuantizer, ExpertTensor, require_finite
from mxfp4.fake_quant import saturated
from training.sharding.quantized_gather import QuantizedGather
from training.sharding.shards import LocalShard, gather_rows, local_shards, owned_rows


class ShardedQuantizer(ExpertQuantizer):
    """The quantizer of a model whose experts are FSDP units of their own, with float32 parameters.

    `masters` are this rank's rows, and so are the tensors that every method takes or gives; `tensors` describe the whole ones.
    """

    def _take_masters(self, model: nn.Module, compute_dtype: torch.dtype) -> None:
        for tensor in self.tensors:
            tensor.parameter.requires_grad_(True)
        self.shards = local_shards([(t.name, t.parameter) for t in self.tensors])
        self.masters = [shard.local for shard in self.shards]
        self.gathers = [self._gather(tensor, compute_dtype) for tensor in self.tensors]

    def _gather(self, tensor: ExpertTensor, compute_dtype: torch.dtype) -> QuantizedGather:
        raise NotImplementedError
