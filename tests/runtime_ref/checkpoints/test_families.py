"""Folders of other models: logits of transformers' own model, tokens whatever the drafts and other rows, bytes of the file."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import MODEL_FP32
from toy_layouts import exported, glm4, gpt_oss, mixtral, qwen3

from runtime_ref.backends.c import structs
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.checkpoints.folder import read_geometry
from runtime_ref.checkpoints.load import load_target
from runtime_ref.core.batch import SequenceChunk
from runtime_ref.core.kv_cache import KvCache
from runtime_ref.core.program import target_program
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.core.tensor_parallel import Ranks
from runtime_ref.engine.engine import Engine, EngineOptions

PAGES = {"full": 12, "window": 12}


@pytest.fixture(scope="module", params=["qwen3", "glm4", "glm4-plain", "gpt-oss", "mixtral", "mixtral-window"])
def made(request, tmp_path_factory):
    config, layout = {"qwen3": (qwen3(), "compressed-tensors"), "gpt-oss": (gpt_oss(), "gpt-oss"),
                      "mixtral": (mixtral(), "compressed-tensors"), "glm4": (glm4(), "compressed-tensors"),
                      "glm4-plain": (glm4(n_group=1, attention_bias=False, use_qk_norm=False, n_shared_experts=1,
                                          norm_topk_prob=False, num_hidden_layers=2), "compressed-tensors"),
                      "mixtral-window": (mixtral(sliding_window=24, num_experts_per_tok=2, tie_word_embeddings=False),
                                         "compressed-tensors")}[request.param]
    return exported(tmp_path_factory.mktemp(request.param), config, layout)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 119, (90,), generator=torch.Generator().manual_seed(2)).tolist()


def computed(backend, ids, pieces):
    cache, program = KvCache(backend.pools), target_program(backend.config)
    tables, found, at = cache.tables(), [], 0
    for n in pieces:
        cache.extend(tables, list(tables), at + n)
        found.append(backend.run(program, backend.plan([SequenceChunk(tables, at, ids[at:at + n])]))["logits"][:n])
        at += n
    return torch.cat(found)


def test_logits_are_those_of_transformers_own_model(made, ids):
    folder, model = made
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    found = computed(TorchBackend(load_target(folder), dtype=torch.float32, pages=PAGES), ids, [90])
    torch.testing.assert_close(found, expected, **MODEL_FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_do_not_depend_on_how_the_text_is_cut(made, ids, dtype):
    backend = TorchBackend(load_target(made[0]), dtype=dtype, pages=PAGES)
    expected = computed(backend, ids, [90])
    for pieces in ([1] * 90, [8] * 11 + [2], [3, 61, 5, 21]):
        assert torch.equal(computed(backend, ids, pieces), expected)


def test_parts_of_the_ranks_make_the_whole(made, ids):
    """Two ranks' partial outputs, gathered by hand, are the one rank's."""
    whole, halves = load_target(made[0]), [load_target(made[0], Ranks(rank, 2)) for rank in range(2)]
    from runtime_ref.backends.torch import ops

    y = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    for i in range(len(whole.layers)):
        def partials(weights, i=i):
            own = weights.layers[i]
            heads = torch.ones(own.attention.query_heads, 16, own.attention.v_dim)
            merged = ops.merge_heads(heads, own.attention.o, own.attention.o_bias)
            if not hasattr(own.mlp, "experts"):
                return merged, ops.dense_mlp(y, own.mlp)
            shared = [] if own.mlp.shared is None else [ops.dense_mlp(y, own.mlp.shared)]
            return merged, ops.run_experts(y, *ops.route(y, own.mlp, weights.config), own.mlp.experts, 16), *shared
        for one, two in zip(partials(whole), zip(*(partials(h) for h in halves), strict=True), strict=True):
            assert torch.equal(one, torch.cat(two))
    assert sum(h.packed_bytes for h in halves) >= whole.packed_bytes


def test_a_drafter_changes_no_token_alone_or_in_a_batch(made, ids, tmp_path):
    from modeling.drafter import DFlashDraftModel, drafter_config, save_drafter

    folder, model = made
    torch.manual_seed(3)
    layers = model.config.num_hidden_layers
    drafter = DFlashDraftModel(drafter_config(
        hidden_size=96, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=120, target_layer_ids=[0, layers - 1], num_target_layers=layers, mask_token_id=119, rotary_base=1e4,
        window=24, partial_rotary_factor=1.0, attention_value_scale=None)).float()
    save_drafter(drafter, folder / "dflash")
    prompts, options = [ids[:40], ids[40:47], ids[50:51]], EngineOptions(max_context=256)
    plain = SamplingParams(max_tokens=20, ignore_eos=True, speculate=False)
    engine = Engine.from_folder(folder, options=options, backend="torch")
    alone = [engine.generate([p], plain)[0] for p in prompts]
    drafting = SamplingParams(max_tokens=20, ignore_eos=True)
    assert engine.generate(prompts, drafting) == alone
    assert [engine.generate([p], drafting)[0] for p in prompts] == alone
    assert engine.stats()["rounds"] > 0


def test_packed_experts_are_the_files_bytes(made):
    folder, _ = made
    files = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    weights = load_target(folder)
    held = weights.layers[1].mlp.experts.matrices[3]
    if weights.config.model_type != "gpt_oss":
        for kind, part in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            name = (f"model.layers.1.mlp.experts.3.{kind}_proj.weight" if weights.config.model_type != "mixtral" else
                    f"model.layers.1.block_sparse_moe.experts.3.{part}.weight")
            assert torch.equal(held[kind].codes, files[name + "_packed"])
            assert torch.equal(held[kind].scales, files[name + "_scale"])
        return
    for kind, name, rows in (("gate", "gate_up", slice(0, None, 2)), ("up", "gate_up", slice(1, None, 2)),
                             ("down", "down", slice(None))):
        name = f"model.layers.1.mlp.experts.{name}_proj"
        assert torch.equal(held[kind].codes, files[name + "_blocks"][3, rows].flatten(1))
        assert torch.equal(held[kind].scales, files[name + "_scales"][3, rows])


@pytest.mark.skipif(structs.compiled_ops()[0] is None, reason="no compiled ops")
def test_compiled_ops_run_qwen3_and_refuse_biases(tmp_path, ids):
    from runtime_ref.backends.c.backend import CBackend, refuses

    folder, model = exported(tmp_path, qwen3(moe_intermediate_size=256, norm_topk_prob=False), "compressed-tensors")
    weights = load_target(folder)
    backend = CBackend(weights, dtype=torch.float32, pages=PAGES)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    found = computed(backend, ids, [90])
    torch.testing.assert_close(found, expected, **MODEL_FP32)
    assert torch.equal(computed(backend, ids, [1] * 20 + [8, 60, 2]), found)
    folder, _ = exported(tmp_path / "oss", gpt_oss(), "gpt-oss")
    assert "biases" in refuses(load_target(folder))
    folder, _ = exported(tmp_path / "glm", glm4(attention_bias=False, moe_intermediate_size=256), "compressed-tensors")
    assert "shared experts" in refuses(load_target(folder))


class Together(Ranks):
    """Ranks that are threads of one process."""

    def join(self, shelf, barrier):
        object.__setattr__(self, "shelf", shelf)
        object.__setattr__(self, "barrier", barrier)
        return self

    def gather(self, own):
        self.shelf[self.rank] = own.clone()
        self.barrier.wait(60)
        found = torch.cat(self.shelf)
        self.barrier.wait(60)
        return found


def on_ranks(folder, ids, count, dtype, kind):
    """Logits of `ids` on so many ranks, which are threads."""
    shelf, barrier = [None] * count, threading.Barrier(count)

    def rank(number):
        weights = load_target(folder, Together(number, count).join(shelf, barrier))
        return computed(kind(weights, dtype=dtype, pages=PAGES), ids, [len(ids) - 3, 1, 2])

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(rank, range(count)))
    assert all(torch.equal(logits, found[0]) for logits in found)
    return found[0]


@pytest.mark.skipif(structs.compiled_ops()[0] is None, reason="no compiled ops")
@pytest.mark.parametrize("inner", [32, 96, 192, 224])
def test_compiled_ops_run_every_width_of_experts_that_mxfp4_permits_on_any_ranks(tmp_path, ids, inner):
    """Eighths of 4, 12, 24 and 28 columns: inside a block, across blocks, and ending inside of eight columns. The dense layer's
    eighths are of 5."""
    from runtime_ref.backends.c.backend import CBackend

    config = qwen3(moe_intermediate_size=inner, intermediate_size=40, num_hidden_layers=3, num_attention_heads=8,
                   num_key_value_heads=4, num_experts_per_tok=3)
    folder, model = exported(tmp_path, config, "compressed-tensors")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    whole = CBackend(load_target(folder), dtype=torch.float32, pages=PAGES)
    torch.testing.assert_close(computed(whole, ids, [90]), expected, **MODEL_FP32)
    for dtype in (torch.float32, torch.bfloat16):
        backend = CBackend(load_target(folder), dtype=dtype, pages=PAGES)
        found = computed(backend, ids, [90])
        assert torch.equal(computed(backend, ids, [1] * 20 + [8, 60, 2]), found)
        for count in (2, 8):
            assert torch.equal(on_ranks(folder, ids, count, dtype, CBackend), found), (dtype, count)


@pytest.mark.parametrize("key, value, said", [
    ("attention_bias", True, "attention_bias: True, expected False"),
    ("use_sliding_window", True, "use_sliding_window: True, expected False"),
    ("hidden_act", "gelu", "hidden_act: 'gelu', expected 'silu'"),
    ("quantization_config", {"format": "nvfp4-pack-quantized"}, "expected 'mxfp4-pack-quantized'"),
    ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "rope_type: 'dynamic', expected default"),
("model_type", "llama", "expected one of mimo_v2")])
def test_what_is_not_held_is_refused_by_name(tmp_path, key, value, said):
    raw = qwen3().to_dict() | {"quantization_config": {"format": "mxfp4-pack-quantized"}}
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}, default=str))
    with pytest.raises(ValueError, match="config.json: .*") as error:
        read_geometry(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path, made):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in made[0].glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {n: t for f in made[0].glob("*.safetensors") for n, t in load_file(f).items()}
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    name = next(n for n in tensors if n.endswith(("gate_up_proj_blocks", "up_proj.weight_packed", "w3.weight_packed")))
    for change, said in ((tensors[name][:, :-1].contiguous() if tensors[name].ndim == 2 else tensors[name][:-1], "expected"),
                         (None, f"tensor {name} is missing")):
        kept = {n: t for n, t in tensors.items() if n != name} | ({name: change} if change is not None else {})
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=said):
            load_target(folder)


def test_latent_attention_is_refused_by_name_with_what_judges_it_instead(tmp_path):
    from transformers import DeepseekV3Config

    raw = DeepseekV3Config(kv_lora_rank=48).to_dict() | {"quantization_config": {"format": "mxfp4-pack-quantized"}}
    (tmp_path / "config.json").write_text(json.dumps(raw, default=str))
    with pytest.raises(ValueError, match=r"config.json: model_type: 'deepseek_v3': .* multi-head latent attention "
                                         r"\(kv_lora_rank 48\); .* --endpoint URL$"):
        read_geometry(tmp_path)
