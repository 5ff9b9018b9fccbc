"""validate.py: a right folder passes, and every port bug of the public ports is found and named by its cause.

Bugs are injected twice: into copies of an exported folder (a wrong file), and into the runtime (a wrong port).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pace import KERNELS
from wrong_folders import config, config_of, drafter, drafter_file, each_expert, edit, faults, judged, mask_of, target

from modeling.names import qkv_rows
from runtime_ref import validate
from runtime_ref.checkpoints.folder import read_config

ROOT = Path(validate.__file__).resolve().parents[1]


def test_a_right_folder_passes_every_check(exported, tmp_path, capsys):
    code, verdict = judged(exported, tmp_path, capsys)
    assert code == 0 and verdict["verdict"] == "passed" and verdict["causes"] == []
    assert {c["name"]: c["status"] for c in verdict["checks"]} == dict.fromkeys(
        ("files", "folder", "reference", "logits", "ops", "lossless", "sampling", "acceptance", "cost"), "passed") | {
        "text": "unchecked"}
    page = (tmp_path / "v.html").read_text()
    assert "passed" in page and "acceptance length" in page and "http" not in page


def numbers_for_scales(tensors):
    each_expert("_scale", lambda t: torch.exp2(t.float() - 127))(tensors)


def scales_with_another_name(tensors):
    for name in [n for n in tensors if n.endswith("weight_scale")]:
        tensors[name + "_inv"] = tensors.pop(name)


def unchunked(folder):
    geometry, _ = read_config(folder)

    def change(tensors):
        for layer in range(geometry.num_hidden_layers):
            name = f"model.layers.{layer}.self_attn.qkv_proj.weight"
            tensors[name] = torch.cat([tensors[name][s] for rows in qkv_rows(geometry, layer).values() for s in rows])

    edit(folder / "model.safetensors", change)


def gate_for_up(tensors):
    for name in [n for n in tensors if ".gate_proj.weight" in n and ".experts." in n]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


WRONG_FILES = {
    "scales as floats": (target(numbers_for_scales), "scale bytes"),
    "scales called weight_scale_inv": (target(scales_with_another_name), "scale bytes"),
    "scales off by one power": (target(each_expert("_scale", lambda t: t + 1)), "a scale byte b means"),
    "codes as int8": (target(each_expert("proj.weight", lambda t: t.view(torch.int8))), "uint8"),
    "nibbles swapped": (target(each_expert("proj.weight", lambda t: (t >> 4) | (t << 4))), "nibbles are swapped"),
    "gate and up exchanged": (target(gate_for_up), "gate and up"),
    "mask embedding missing": (lambda f: (f / "dflash" / "mask_embedding.pt").unlink(), "mask_embedding.pt"),
    "mask embedding zero": (mask_of(lambda s: s | {"embedding": s["embedding"] * 0}), "mask_embedding.pt"),
    "mask token of another id": (mask_of(lambda s: s | {"mask_token_id": 5}), "mask_embedding.pt"),
    "target sinks missing": (target(lambda t: [t.pop(n) for n in list(t) if "sink" in n]), "sinks are dropped"),
    "target sinks zero": (target(lambda t: [t[n].zero_() for n in t if "sink" in n]), "sinks are dropped"),
    "drafter sinks missing": (drafter_file(lambda t: [t.pop(n) for n in list(t) if "sink" in n]), "sinks of the drafter"),
    "drafter sinks switched off": (drafter(special={"attention_sink_bias": False}), "sinks of the drafter"),
    "drafter window in one alias": (drafter({"sliding_window": None}), "window of the drafter"),
    "drafter window in all aliases": (drafter({"sliding_window": 20}, {"swa_window_size": 20}), "window of the drafter"),
    "drafter causal in one alias": (drafter({"is_causal": True}), "causality"),
    "drafter causal in all aliases": (drafter({"is_causal": True}, {"causal": True}), "causality"),
    "target layers off by one": (drafter(special={"target_layer_ids": [1, 3, 4]}), "target layers are off by one"),
    "features of other layers": (drafter(special={"target_layer_ids": [0, 1, 3]}), "target layers are off by one"),
    "swiglu clamp": (config(swiglu_limit=7.0), "no clamp"),
    "drafter rotary base": (drafter(special={"backbone_rotary_base": 3e5}), "rotary base of the drafter"),
    "drafter rotary base in all aliases": (drafter({"rope_theta": 3e5, "rope_parameters": {
        "rope_type": "default", "rope_theta": 3e5, "partial_rotary_factor": 0.5}}, {"backbone_rotary_base": 3e5}),
        "rotary base of the drafter"),
    "drafter rotary width": (drafter({"partial_rotary_factor": 1.0, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 1.0}}), "rotary width of the drafter"),
    "drafter value scale": (drafter(special={"attention_value_scale": None}), "attention_value_scale of the drafter"),
    "target rotary base": (config(rope_theta=5e6), "rotary base of the full layers"),
    "rotary bases exchanged": (config_of(lambda raw: {"rope_theta": raw["swa_rope_theta"],
                                                      "swa_rope_theta": raw["rope_theta"]}), "exchanged"),
    "target rotary width": (config(partial_rotary_factor=1.0), "rotary width"),
    "target value scale": (config(attention_value_scale=None), "attention_value_scale"),
    "target window": (config_of(lambda raw: dict.fromkeys(
        ("sliding_window", "sliding_window_size", "attention_chunk_size"), raw["sliding_window"] + 1)), "window is off by one"),
    "separate head": (drafter_file(lambda t: t.update({"lm_head.weight": torch.zeros(264, 64)})), "head or embedding of"),
    "qkv not in chunks": (unchunked, "KV layout"),
    "routing weights not normalised": (config(norm_topk_prob=False), "norm_topk_prob"),
    "another quantization method": (config(quantization_config={"quant_method": "mxfp4"}), "store_dtype mxfp4"),
    "embedding for head": (target(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})), "head"),
}


@pytest.mark.parametrize("bug", faults(WRONG_FILES, {"drafter causal in all aliases"}))
def test_a_wrong_file_is_found_and_named(copied, tmp_path, capsys, bug):
    inject, cause = WRONG_FILES[bug]
    inject(copied)
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 1
    assert any(cause in c for c in verdict["causes"]), verdict["causes"]


def _port_drops_sinks(patch):
    from runtime_ref.backends.torch import ops as model

    right = model.attend_pages
    patch.setattr(model, "attend_pages", lambda q, k, v, hidden, sink, *more: right(q, k, v, hidden, None, *more))


def _port_clamps(patch):
    from runtime_ref.backends.torch import ops as model

    def clamped(gate_up, *more):
        half = gate_up.shape[-1] // 2
        return torch.nn.functional.silu(gate_up[..., :half].clamp(max=7.0)) * gate_up[..., half:].clamp(-7, 7)

    patch.setattr(model, "gated", clamped)


def _port_window(patch):
    from runtime_ref.backends.torch import ops as model

    right = model.attention_metadata

    def wrong(pool, kind, blocks, T):
        saved = pool.window
        pool.window = None if saved is None else saved + 1
        try:
            return right(pool, kind, blocks, T)
        finally:
            pool.window = saved

    patch.setattr(model, "attention_metadata", wrong)


def _port_value_scale(patch):
    from runtime_ref.backends.torch import ops as model

    right = model.project_qkv

    def wrong(x, a, *more):
        q, k, v = right(x, a, *more)
        return q, k, v if a.value_scale is None else v / a.value_scale

    patch.setattr(model, "project_qkv", wrong)


def _port_nibbles(patch):
    from runtime_ref.checkpoints.host_weights import Packed

    right = Packed.decode
    patch.setattr(Packed, "decode", lambda self: right(self).unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def _port_router(patch):
    from runtime_ref.backends.torch import ops as model

    right = model.route

    def wrong(x, w, config, *more):
        import dataclasses

        return right(x, dataclasses.replace(w, correction=torch.zeros_like(w.correction)), config, *more)

    patch.setattr(model, "route", wrong)


def _port_drafter_causal(patch):
    from runtime_ref.backends.torch.drafter import TorchDrafter

    right = TorchDrafter.__init__

    def wrong(self, *args):
        right(self, *args)
        self.causal = True

    patch.setattr(TorchDrafter, "__init__", wrong)


def _port_mask(patch):
    from runtime_ref.backends.torch.drafter import TorchDrafter

    right = TorchDrafter._take

    def wrong(self, model):
        right(self, model)
        self.mask = torch.zeros_like(self.mask)

    patch.setattr(TorchDrafter, "_take", wrong)


WRONG_PORTS = {
    "drops sinks": (_port_drops_sinks, "sinks"), "clamps SwiGLU": (_port_clamps, "no clamp"),
    "counts the window otherwise": (_port_window, "window is off by one"),
    "forgets the value scale": (_port_value_scale, "attention_value_scale"),
    "swaps nibbles": (_port_nibbles, "nibbles are swapped"), "forgets the router's bias": (_port_router, "e_score"),
    "drafts causally": (_port_drafter_causal, "causality"), "forgets the mask embedding": (_port_mask, "mask_embedding"),
}


@pytest.mark.skipif(KERNELS, reason="bugs of the torch ops, of which the kernels use none; theirs are WRONG_KERNELS")
@pytest.mark.parametrize("bug", WRONG_PORTS)
def test_a_wrong_port_is_found_and_named(exported, tmp_path, capsys, monkeypatch, bug):
    inject, cause = WRONG_PORTS[bug]
    inject(monkeypatch)
    code, verdict = judged(exported, tmp_path, capsys, "--backend", "torch")
    assert code == 1
    assert any(cause in c for c in verdict["causes"]), verdict["causes"]


def _kernels_drop_sinks(patch):
    from runtime_ref.backends.triton import backend as triton_backend

    right = triton_backend.attend
    patch.setattr(triton_backend, "attend", lambda q, k, v, sink, *more, **options: right(q, k, v, None, *more, **options))


def _kernels_window(patch):
    from runtime_ref.backends.triton.steps import KernelPool

    right = KernelPool.__init__
    patch.setattr(KernelPool, "__init__", lambda self, layers, pages, window, device: right(
        self, layers, pages, None if window is None else window // 2, device))


def _kernels_value_scale(patch):
    from runtime_ref.backends.triton.backend import TritonBackend

    right = TritonBackend.__init__

    def wrong(self, weights, **options):
        weights.config.attention_value_scale = None
        right(self, weights, **options)

    patch.setattr(TritonBackend, "__init__", wrong)


def _kernels_rotary(patch):
    from runtime_ref.backends.triton.steps import RotaryTable

    right = RotaryTable.__init__
    patch.setattr(RotaryTable, "__init__", lambda self, base, *more: right(self, 1e4, *more))


def _pages_of_other(change):
    """Experts' pages made of other bytes: change(gate_up, down), each (codes, scales)."""
    def inject(patch):
        from runtime_ref.checkpoints import device_weights as kernel_weights

        right = kernel_weights.repack_experts
        patch.setattr(kernel_weights, "repack_experts", lambda *both, **options: right(*change(*both), **options))

    return inject


def _swapped(pair):
    return (pair[0] >> 4) | (pair[0] << 4), pair[1]


def _up_first(pair):
    return tuple(torch.cat(t.chunk(2, 1)[::-1], 1) for t in pair)


def _kernels_router(patch):
    from runtime_ref.checkpoints.device_weights import _Reader

    right = _Reader._correction
    patch.setattr(_Reader, "_correction", lambda self, prefix: torch.zeros_like(right(self, prefix)))


def _kernels_drafter(change):
    def inject(patch):
        from runtime_ref.backends.triton.drafter import TritonDrafter

        right = TritonDrafter.__init__

        def wrong(self, *arguments):
            right(self, *arguments)
            change(self)

        patch.setattr(TritonDrafter, "__init__", wrong)

    return inject


WRONG_KERNELS = {
    "drop sinks": (_kernels_drop_sinks, "sinks"), "take half the window": (_kernels_window, "the window"),
    "forget the value scale": (_kernels_value_scale, "attention_value_scale"),
    "take another rotary base": (_kernels_rotary, "rotary base"),
    "swap nibbles": (_pages_of_other(lambda gate_up, down: (_swapped(gate_up), _swapped(down))), "nibbles are swapped"),
    "exchange gate and up": (_pages_of_other(lambda gate_up, down: (_up_first(gate_up), down)), "gate and up"),
    "forget the router's bias": (_kernels_router, "e_score"),
    "draft causally": (_kernels_drafter(lambda drafter: setattr(drafter, "causal", True)), "causality"),
    "forget the mask embedding": (_kernels_drafter(lambda drafter: drafter.mask.zero_()), "mask_embedding"),
}


@pytest.mark.skipif(not KERNELS, reason="bugs of the kernels: make test-kernels")
@pytest.mark.parametrize("bug", faults(WRONG_KERNELS, {"forget the mask embedding"}))
def test_wrong_kernels_are_found_and_named(exported, tmp_path, capsys, monkeypatch, bug):
    """Of what was served, in bf16: no other backend of this run is wrong."""
    inject, cause = WRONG_KERNELS[bug]
    inject(monkeypatch)
    code, verdict = judged(exported, tmp_path, capsys)
    assert code == 1
    ops = next(c for c in verdict["checks"] if c["name"] == "ops")
    assert ops["status"] == "failed" and not any("torch" in c for c in ops["causes"])
    assert any(cause in c and "the runtime" in c for c in ops["causes"]), verdict["causes"]


@pytest.mark.skipif(KERNELS, reason="a bug of the torch ops; rows of the kernels: tests/runtime_ref/kernels")
def test_ops_that_depend_on_other_rows_are_found(exported, tmp_path, capsys, monkeypatch):
    from runtime_ref.backends.torch import ops as model

    right = model.norm
    monkeypatch.setattr(model, "norm", lambda x, w, e: right(x, w, e) * (1 + 1e-4 * (x.shape[0] > 8)))
    code, verdict = judged(exported, tmp_path, capsys, "--dtype", "float32", "--backend", "torch")
    assert code == 1 and any("row-invariant" in c or "op" in c for c in verdict["causes"])


@pytest.mark.long
def test_acceptance_below_what_training_measured_fails(exported, tmp_path, capsys):
    trained = tmp_path / "summary.json"
    trained.write_text(json.dumps({"acceptance": {"random tokens": {"task_t0": 4.0}}}))
    code, verdict = judged(exported, tmp_path, capsys, "--trained", str(trained))
    assert code == 1 and any("than in training" in c or "for another target" in c for c in verdict["causes"])


@pytest.mark.long
def test_prompts_of_a_file_are_grouped_by_domain(exported, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"domain": d, "prompt": f"{d} text {i}"}) for d in ("code", "math") for i in range(3)))
    code, verdict = judged(exported, tmp_path, capsys, "--prompts", str(file))
    table = next(c for c in verdict["checks"] if c["name"] == "acceptance")["tables"]
    assert code == 0 and [row[0] for row in next(iter(table.values()))[1:]] == ["code", "math"]


@pytest.mark.parametrize("wrong, named", [(["nowhere"], "no such folder"), (["{}", "--prompts", "nowhere"], "no such file"),
                                          (["{}", "--trained", "nowhere"], "no such file"),
                                          (["{}", "--tokens", "0"], "--tokens")])
def test_mistakes_in_arguments_are_one_line_and_code_2(exported, wrong, named, capsys):
    arguments = [a.format(exported) for a in wrong]
    try:
        code = validate.main(arguments)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and named in said and "Traceback" not in said


def test_help_needs_no_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "runtime_ref" / "validate.py"), "--help"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "CHECKPOINT_DIR" in done.stdout and " torch" not in done.stderr
