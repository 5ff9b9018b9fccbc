"""The smallest exported folder that has every feature, and engines that run it with the Triton kernels: interpreted, or with
FP4_TEST_KERNELS=1 compiled for the CPU."""

import pytest
import torch

from tests.runtime_ref.conftest import random_drafter, random_target, runtime_config, write_native

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 1, 1],
         "num_attention_heads": 2, "num_key_value_heads": 1, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2,
         "head_dim": 16, "v_head_dim": 8, "swa_head_dim": 16, "swa_v_head_dim": 8, "intermediate_size": 64,
         "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "vocab_size": 130}


@pytest.fixture(autouse=True, scope="session")
def no_gpu_needed(kernels_without_a_gpu):
    """The kernels run on this machine."""


def small_config(**changes):
    return runtime_config(**(SMALL | changes))


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    config = small_config()
    out = tmp_path_factory.mktemp("small")
    drafter = random_drafter(config, target_layer_ids=[0, 2], num_hidden_layers=1, intermediate_size=64, mask_token_id=129,
                             num_attention_heads=2, num_key_value_heads=1)
    return write_native(out, random_target(config), drafter.to(torch.bfloat16).float())


@pytest.fixture(scope="session")
def small_engine(small_folder):
    """Engine.from_folder on the small folder; backend and options of the engine by name."""
    from runtime_ref.engine.engine import Engine, EngineOptions

    fields = set(EngineOptions.__dataclass_fields__)

    def make(backend="triton", **kwargs):
        options = EngineOptions(**{"max_context": 256, "prefix_pages": 4, "max_running": 4,
                                   **{k: kwargs.pop(k) for k in list(kwargs) if k in fields}})
        ways = {"launch": "ops"} if backend.startswith("triton") else {}  # test_launch.py asks for the others
        return Engine.from_folder(small_folder, options=options, backend=backend, **ways | kwargs)

    return make


@pytest.fixture(scope="session")
def small_prompts():
    """Three prompts of 1 to 62 tokens: shorter and longer than the window, and one whose answer crosses a page."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, 128, (n,), generator=generator).tolist() for n in (1, 20, 62)]
