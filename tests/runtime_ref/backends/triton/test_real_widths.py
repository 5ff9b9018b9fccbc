"""Steps at the widths of one of eight ranks of the released models: FP8 projections, heads of 192 and 128, up to 6,144 columns,
the default tiles. Few layers and experts, random weights; compiled for the CPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from modeling.published_geometries import released_config
from runtime_ref.backends.triton.megakernel import Megakernel
from runtime_ref.measure.gpu_suite.steps import Prepared, rank_config
from tests.runtime_ref.kernels.at_once import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="minutes where kernels are interpreted: make test-kernels")


@pytest.mark.parametrize("name", ["MiMo-V2.5-Pro", pytest.param("MiMo-V2-Flash", marks=pytest.mark.long)])
def test_rows_alone_launches_and_megakernels_make_the_same_bits(name):
    config = rank_config(released_config(name), 8)
    config.num_hidden_layers, config.hybrid_layer_pattern, config.moe_layer_freq = 3, [0, 1, 0], [0, 1, 1]
    config.n_routed_experts, config.vocab_size = 16, 1024
    ready = Prepared(config, "cpu", 200, 1)
    for pool in ready.backend.pools.values():
        pool.all_keys.normal_()
        pool.all_values.normal_()
    step = ready.step(8)
    launched = ready.backend.run(ready.program, step)["logits"]
    assert launched.isfinite().all() and launched.std() > 0.1
    rows = [ready.backend.run(ready.program, ready.step(1, i))["logits"] for i in (0, 7)]
    assert torch.equal(torch.cat(rows), launched[[0, 7]])
    megakernel = Megakernel(ready.backend, ready.program, 3)
    assert torch.equal(megakernel.run(step)["logits"], launched) and not megakernel.failed()
