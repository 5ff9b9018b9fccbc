"""A small exported folder (native layout) with a random drafter, and engines on it.

The folder is written here and not by the exporter, on purpose: names and bytes follow the format, so a mistake that exporter
and runtime shared would show.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from pace import INTERPRETED, KERNELS, paced
from safetensors.torch import save_file

from checkpoint.quantization import quantization_config
from modeling.names import expert_parts
from mxfp4 import quantize
from runtime_ref.backends.base import Drafter
from runtime_ref.checkpoints.load import load_target


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Published tensors of a MiMoV2ForCausalLM: experts packed, the rest BF16, correction bias F32."""
    out = {}
    for name, value in model.state_dict().items():
        parts = expert_parts(name, value.shape)
        if parts is None:
            keep = name.endswith("e_score_correction_bias")
            out[name] = value.float() if keep else value.to(torch.bfloat16)
            continue
        for part in parts:
            codes, scales = quantize(value[part.expert, part.rows].to(torch.bfloat16))
            out[part.name], out[part.name + "_scale"] = codes, scales
    return {name: t.contiguous().clone() for name, t in out.items()}


def write_native(folder: Path, model, drafter=None, tokenizer: Path | None = None) -> Path:
    """config.json, model.safetensors, and dflash/ and tokenizer files if given."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    tensors = tensors_of(model)
    held = {name: {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}[t.dtype] for name, t in tensors.items()}
    config |= {"architectures": ["MiMoV2ForCausalLM"], "dtype": "bfloat16"}
    config["quantization_config"] = quantization_config("native", config, held)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if drafter is not None:
        from modeling.drafter import save_drafter

        save_drafter(drafter, folder / "dflash")
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
            if (tokenizer / name).is_file():
                (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def runtime_config(**changes):
    from modeling.configuration_mimo_v2 import MiMoV2Config

    return MiMoV2Config(**{
        "vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 4, "hybrid_layer_pattern": [0, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1], "num_attention_heads": 8, "num_key_value_heads": 2, "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 4, "head_dim": 16, "v_head_dim": 8, "swa_head_dim": 16, "swa_v_head_dim": 8,
        "sliding_window": 16, "intermediate_size": 128, "moe_intermediate_size": 256, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "partial_rotary_factor": 0.5, "add_swa_attention_sink_bias": True,
        "attention_value_scale": 0.7, "attention_projection_layout": "fused_qkv", "max_position_embeddings": 1024,
        "rope_theta": 10000, "swa_rope_theta": 1000, "eos_token_id": 0, **changes})


def random_target(config, seed=0):
    from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM

    torch.manual_seed(seed)
    model = MiMoV2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.35 if "lm_head" in name else 0.15)
            elif "sink" in name:
                parameter.normal_()
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
    return model.to(torch.bfloat16)


def random_drafter(config, seed=1, **changes):
    from modeling.drafter import DFlashDraftModel, drafter_config

    torch.manual_seed(seed)
    last = config.num_hidden_layers - 1
    model = DFlashDraftModel(drafter_config(**{
        "hidden_size": config.hidden_size, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": config.vocab_size, "target_layer_ids": [0, 2, last],
        "num_target_layers": config.num_hidden_layers, "mask_token_id": 262, "rotary_base": float(config.rope_theta),
        "window": 24, "partial_rotary_factor": 0.5, "attention_value_scale": 0.7, **changes})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
        model.mask_embedding.normal_(0, 0.15)
        for layer in model.layers:
            if layer.self_attn.attention_sink_bias is not None:
                layer.self_attn.attention_sink_bias.normal_()
    return model.eval()


# With FP4_TEST_KERNELS (`make test-kernels`, `make test-interpreter`) engines of this folder's tests run the embedded model on
# the Triton kernels, compiled for the CPU or interpreted, instead of a small random model on the default backend.
# Launches one by one: that the other ways are equal is tests/runtime_ref/backends/triton/test_launch.py.
BACKEND = {"backend": "triton", "launch": "ops"} if KERNELS else {}
SEED = Path(__file__).resolve().parents[2] / "recipes" / "seed" / "model"


def seed_folder(out: Path) -> Path:
    """The embedded model with its experts rounded, its drafter and its tokenizer, in the native layout."""
    from checkpoint.load import load_model
    from modeling.drafter import load_drafter

    return write_native(out, load_model(SEED, dtype=torch.bfloat16), load_drafter(SEED.parents[1] / "seed-drafter"), SEED)


@pytest.fixture(scope="session", autouse=INTERPRETED)
def kernels_without_a_gpu():
    """Triton's interpreter, at its best, or the compiler for the CPU."""
    pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")
    if KERNELS and not INTERPRETED:
        from runtime_ref.triton_cpu.backend import on_host

        with on_host():
            yield
        return
    assert os.environ.get("TRITON_INTERPRET") == "1", "kernel tests need TRITON_INTERPRET=1; tests/conftest.py sets it"
    from tests.runtime_ref.kernels.quick_interpreter import quick_interpreter

    with quick_interpreter():
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Exported folder of a random target and drafter, with a byte tokenizer."""
    from conftest import write_tokenizer

    if KERNELS:
        return seed_folder(tmp_path_factory.mktemp("seed"))
    config = runtime_config()
    out = tmp_path_factory.mktemp("native")
    write_native(out, random_target(config), random_drafter(config))
    write_tokenizer(out)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return out


@pytest.fixture(scope="module")
def weights(folder):
    """What the engine reads of `folder`."""
    return load_target(folder)


@pytest.fixture(scope="module")
def ids():
    """200 tokens."""
    return torch.randint(1, 260, (200,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="session")
def make_engine(folder):
    """Engine.from_folder on the small folder; keyword arguments as there, or of EngineOptions."""
    from runtime_ref.engine.engine import Engine, EngineOptions

    fields = set(EngineOptions.__dataclass_fields__)

    def make(**kwargs):
        options = EngineOptions(**{"max_context": 512, **{k: kwargs.pop(k) for k in list(kwargs) if k in fields}})
        return Engine.from_folder(folder, options=options, **BACKEND | kwargs)

    return make


@pytest.fixture(scope="session")
def prompts():
    """Twelve prompts of 1 to 150 random tokens (interpreted: seven of up to 66)."""
    generator = torch.Generator().manual_seed(7)
    lengths = paced((1, 2, 7, 8, 9, 20, 33, 63, 64, 65, 100, 150), (1, 8, 9, 17, 33, 64, 66))
    return [torch.randint(1, 260, (n,), generator=generator).tolist() for n in lengths]


class OracleProposer(Drafter):
    """Drafts that are often right: the known answer, wrong at a share of the positions (no network, no features)."""

    block, target_layers = 8, []

    def __init__(self, answers: dict[tuple, list[int]], vocabulary: int, wrong: float = 0.25, seed: int = 0):
        self.answers, self.vocabulary, self.wrong = answers, vocabulary, wrong
        self.generator = torch.Generator().manual_seed(seed)

    def know(self, engine):
        """Where the engine's sequences are looked up."""
        self.engine = engine

    def logits(self, requests):
        by_place = {(s.computed, s.tokens[-1], id(s.tables)): s for s in self.engine._sequences.values()}
        out = []
        for w in requests:
            sequence = by_place[w.position, w.anchor, id(w.tables)]
            said = len(sequence.tokens) - len(sequence.prompt)
            text = self.answers[tuple(sequence.prompt)]
            rows = torch.zeros(w.count, self.vocabulary)
            for i in range(w.count):
                token = text[said + i] if said + i < len(text) else 0
                if float(torch.rand((), generator=self.generator)) < self.wrong:
                    token = (token + 1) % self.vocabulary
                rows[i, token] = 5.0
            out.append(rows)
        return out


@pytest.fixture
def with_oracle(make_engine):
    """(engine whose drafts are known answers, often right)."""
    from runtime_ref.engine.engine import Engine

    def make(prompts, answers, wrong=0.25, **kwargs):
        plain = make_engine(drafter=False, **kwargs)
        vocabulary = plain.backend.config.vocab_size
        oracle = OracleProposer({tuple(p): a for p, a in zip(prompts, answers, strict=True)}, vocabulary, wrong)
        engine = Engine(plain.backend, oracle, plain.options, end_ids=plain.end_ids)
        oracle.know(engine)
        return engine

    return make


def varied_norms(tensors: dict[str, torch.Tensor]) -> None:
    """Norm weights that are not one: with ones, norms could be exchanged or left out without a difference."""
    generator = torch.Generator().manual_seed(4)
    for name in sorted(n for n in tensors if "norm" in n):
        tensors[name] = tensors[name] + 0.3 * torch.randn(tensors[name].shape, generator=generator).to(tensors[name].dtype)


@pytest.fixture(scope="session")
def exported(folder, tmp_path_factory) -> Path:
    """The small folder (on the kernels: the embedded model), with the mask embedding in its vocabulary row and the stored
    reference."""
    from wrong_folders import edit, write_reference

    out = shutil.copytree(folder, tmp_path_factory.mktemp("exported") / "checkpoint")
    sidecar = torch.load(out / "dflash" / "mask_embedding.pt", weights_only=True)
    row = sidecar["mask_token_id"]
    edit(out / "model.safetensors", lambda t: t["model.embed_tokens.weight"][row].copy_(sidecar["embedding"]))
    if not KERNELS:  # trained norms are not ones
        edit(out / "model.safetensors", varied_norms)
    write_reference(out)
    return out


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")
