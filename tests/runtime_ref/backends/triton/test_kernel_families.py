"""Other models than MiMo-V2 on the kernels: Qwen3-MoE and Mixtral run as on the torch backend, others are refused."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from tolerance import TRITON_LOGITS
from toy_layouts import exported, glm4, gpt_oss, mixtral, qwen3

from checkpoint.families.geometry import NotHeld
from modeling.drafter import DFlashDraftModel, drafter_config, save_drafter
from mxfp4 import dequantize
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.backends.triton.backend import load_triton_backend
from runtime_ref.backends.triton.megakernel import Megakernel
from runtime_ref.checkpoints.device_weights import load_kernel_weights
from runtime_ref.checkpoints.folder import read_geometry
from runtime_ref.checkpoints.load import load_target
from runtime_ref.core.program import target_program
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.core.tensor_parallel import Ranks
from runtime_ref.engine.engine import Engine, EngineOptions
from runtime_ref.kernels.launches import paired
from runtime_ref.kernels.repack import unpack_pages
from runtime_ref.validation.checks.runtime_ops import run_watched
from tests.runtime_ref.backends.triton.op_by_op import check_each_op, relative

PAGES = {"full": 12, "window": 12}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
SHAPES = {"odd widths": qwen3(), "weights of all experts, yarn": qwen3(norm_topk_prob=False, moe_intermediate_size=128,
                                                                       head_dim=32, rope_parameters=YARN),
          # Two layers: without norms of heads attention is sharp, and what is rounded grows from layer to layer.
          "mixtral with a window": mixtral(sliding_window=24, num_experts_per_tok=2, num_attention_heads=4, head_dim=24,
                                           num_hidden_layers=2)}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    return exported(tmp_path_factory.mktemp("qwen3"), SHAPES[request.param], "compressed-tensors")[0]


@pytest.fixture(scope="module")
def backends(folder):
    return (load_triton_backend(folder, pages=PAGES, positions=256),
            TorchBackend(load_target(folder), dtype=torch.bfloat16, pages=PAGES))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 119, (21,), generator=torch.Generator().manual_seed(2)).tolist()


def test_every_op_equals_the_torch_backends_on_the_inputs_it_had(backends, ids):
    found = check_each_op(*backends, target_program(backends[0].config, [1]), ids)
    assert {"project_full", "project_window"} & set(found)


def test_logits_are_those_of_the_torch_backend_where_routing_agrees(backends, ids):
    chosen = ({}, {})
    logits = [run_watched(backend, ids, watch=lambda op, found, own=own: own.update({op.layer: found["index"][:len(ids)]})
                          if op.name == "route" else None)[0]["logits"] for backend, own in zip(backends, chosen, strict=True)]
    same = torch.stack([(chosen[0][i].long().sort(-1)[0] == chosen[1][i].sort(-1)[0]).all(-1) for i in chosen[0]]).all(0)
    assert same.float().mean() > 0.5
    assert relative(logits[0][same], logits[1][:len(ids)][same]) < TRITON_LOGITS


def test_kernel_weights_mean_the_weights_of_the_torch_backend(folder):
    mine, theirs = load_kernel_weights(folder), load_target(folder)
    H, inner = theirs.config.hidden_size, theirs.config.moe_intermediate_size
    for layer, expected in zip(mine.layers, theirs.layers, strict=True):
        a = expected.attention
        rows = torch.cat((a.qk.transpose(1, 2).flatten(0, 1), a.v.transpose(1, 2).flatten(0, 1)))
        assert torch.equal(layer.qkv.decoded(), paired(rows, layer.heads))
        if a.q_norm is not None:
            norms = torch.cat((a.q_norm.repeat(a.query_heads), a.k_norm.repeat(a.key_heads)))
            assert torch.equal(layer.head_norm, paired(norms, layer.heads))
        if layer.pages is not None:
            codes, scales = unpack_pages(layer.pages.down, layer.pages.down_tile, H, inner)
            for e, own in enumerate(expected.mlp.experts.matrices):
                assert torch.equal(dequantize(codes[e], scales[e], dtype=torch.float32), own["down"].decode())


def test_two_ranks_hold_the_heads_of_one(folder):
    whole, halves = load_kernel_weights(folder), [load_kernel_weights(folder, Ranks(rank, 2)) for rank in range(2)]
    for layer, *own in zip(whole.layers, *(half.layers for half in halves), strict=True):
        assert sum(half.heads.queries for half in own) == layer.heads.queries
        if layer.head_norm is None:
            continue
        queries = layer.heads.queries * layer.heads.d
        halves_of = [half.head_norm.split((queries // 2, layer.heads.keys * layer.heads.d // 2)) for half in own]
        found = torch.cat([part for parts in zip(*halves_of, strict=True) for part in parts])
        assert torch.equal(found, layer.head_norm)


def test_a_drafter_and_a_batch_change_no_token(folder, ids):
    layers = read_geometry(folder)[0].num_hidden_layers
    torch.manual_seed(3)
    drafter = DFlashDraftModel(drafter_config(
        hidden_size=96, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=120, target_layer_ids=[0, layers - 1], num_target_layers=layers,
        mask_token_id=119, rotary_base=1e4, window=24,
        partial_rotary_factor=1.0, attention_value_scale=None)).float()
    save_drafter(drafter, folder / "dflash")
    engine = Engine.from_folder(folder, backend="triton", options=EngineOptions(max_context=128, prefix_cache=False))
    prompts = [ids, ids[:1]]
    alone = [engine.generate([p], SamplingParams(max_tokens=4, ignore_eos=True, speculate=False))[0] for p in prompts]
    assert engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True)) == alone
    assert engine.stats()["rounds"] > 0


def test_the_megakernel_refuses_what_it_has_not(backends):
    with pytest.raises(ValueError, match="neither norms of heads nor a softmax router"):
        Megakernel(backends[0], target_program(backends[0].config))


@pytest.mark.parametrize("config, layout", [(gpt_oss(), "gpt-oss"), (glm4(), "compressed-tensors")])
def test_what_the_kernels_have_not_is_refused_in_one_line(tmp_path, config, layout):
    folder, _ = exported(tmp_path, config, layout)
    with pytest.raises(NotHeld, match=f"config.json: model_type: '{config.model_type}', expected mimo_v2 or qwen3_moe or "
                                      "mixtral: the kernels have no biases.* run this checkpoint with --backend torch$"):
        load_kernel_weights(folder)
