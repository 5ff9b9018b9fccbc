"""validate.py on folders of other models than MiMo-V2: right ones pass, faults are found and named, others are refused.

File faults are judged twice: by the checksums of the export, and, without them, by the trained checkpoint (`--original`).
"""

import json
import re
import shutil

import pytest
import torch
from pace import KERNELS
from safetensors.torch import load_file, save_file
from toy_layouts import exported, glm4, gpt_oss, mixtral, qwen3
from wrong_folders import edit_json, judged, without_effect

from runtime_ref import validate

# The others with the kernels: triton/test_kernel_families.py.
FAMILIES = {"qwen3": (qwen3, "compressed-tensors")} | ({} if KERNELS else {
    "mixtral": (mixtral, "compressed-tensors"), "gpt-oss": (gpt_oss, "gpt-oss"),
    "glm4": (lambda: glm4(n_group=1), "compressed-tensors")})


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """family -> (folder, trained checkpoint)."""
    found = {}
    for family, (build, layout) in FAMILIES.items():
        root = tmp_path_factory.mktemp(family)
        folder, _ = exported(root, build(), layout)
        found[family] = folder, root / "runs/toy/qat/model"
    return found


def of_held(faults):
    """Those of the families that the backend runs; all but every third are `slow`."""
    held = [name for name, (family, *_) in faults.items() if family in FAMILIES]
    return [pytest.param(name, marks=pytest.mark.slow if i % 3 else ()) for i, name in enumerate(held)]


def shard(folder):
    return next(folder.glob("*.safetensors"))


def tensors(change):
    """A fault of the weights: change(tensors) in place."""
    def inject(folder):
        held = load_file(shard(folder))
        change(held)
        save_file({n: t.contiguous() for n, t in held.items()}, shard(folder), metadata={"format": "pt"})

    return inject


def each(ending, change):
    return tensors(lambda held: held.update({n: change(t) for n, t in held.items() if n.endswith(ending)}))


def drop(ending):
    """Dropped from the shard and from the index, as by an exporter that never wrote it."""
    def inject(folder):
        tensors(lambda held: [held.pop(n) for n in list(held) if n.endswith(ending)])(folder)
        edit_json(folder / "model.safetensors.index.json", lambda raw: [
            raw["weight_map"].pop(n) for n in list(raw["weight_map"]) if n.endswith(ending)])

    return inject


def config(**values):
    return lambda folder: edit_json(folder / "config.json", lambda raw: raw.update(values))


def rope(**values):
    """In both places where an export says it."""
    def change(raw):
        raw["rope_parameters"].update(values)
        raw.update({key: value for key, value in values.items() if key in raw})

    return lambda folder: edit_json(folder / "config.json", change)


def nibbles(t):
    return (t >> 4) | (t << 4)


def gate_for_up(held):
    for name in [n for n in held if ".gate_proj." in n and ".experts." in n]:
        other = name.replace("gate_proj", "up_proj")
        held[name], held[other] = held[other], held[name]


def one_expert_later(held):
    for name in [n for n in held if n.endswith(("_blocks", "_scales"))]:
        held[name] = held[name].roll(1, 0)


# Faults that only numbers show: (family, fault, what its cause says).
SILENT = {
    "qwen3: nibbles": ("qwen3", each("weight_packed", nibbles), "nibbles are swapped"),
    "qwen3: scales off by one power": ("qwen3", each("weight_scale", lambda t: t + 1), "a scale byte b means"),
    "qwen3: gate and up": ("qwen3", tensors(gate_for_up), "gate and up"),
    "qwen3: router normalisation": ("qwen3", config(norm_topk_prob=False), "norm_topk_prob"),
    "qwen3: rotary base": ("qwen3", rope(rope_theta=1e6), "rotary base"),
    "qwen3: experts per token": ("qwen3", config(num_experts_per_tok=3), "number of experts per token"),
    "qwen3: epsilon": ("qwen3", config(rms_norm_eps=1e-4), "epsilon"),
    "mixtral: nibbles": ("mixtral", each("weight_packed", nibbles), "nibbles are swapped"),
    "mixtral: rotary base": ("mixtral", rope(rope_theta=1e4), "rotary base"),
    "glm4: rotary width": ("glm4", rope(partial_rotary_factor=1.0), "rotary width"),
    "glm4: factor of the experts' sum": ("glm4", config(routed_scaling_factor=1.0), "routed_scaling_factor"),
    "gpt-oss: nibbles": ("gpt-oss", each("_blocks", nibbles), "nibbles are swapped"),
    "gpt-oss: scales off by one power": ("gpt-oss", each("_scales", lambda t: t - 1), "a scale byte b means"),
    "gpt-oss: gate and up as halves": ("gpt-oss", lambda f: [each(f"gate_up_proj_{n}", lambda t: torch.cat(
        (t[:, ::2], t[:, 1::2]), 1))(f) for n in ("blocks", "scales", "bias")], "gate and up rows alternate"),
    "gpt-oss: rotary base": ("gpt-oss", rope(rope_theta=1e4), "rotary base"),
    "gpt-oss: window": ("gpt-oss", config(sliding_window=9), "window"),
    "gpt-oss: experts in another order": ("gpt-oss", tensors(one_expert_later), "another order"),
}
# Faults that the inventory shows.
LOUD = {
    "qwen3: scales as floats": ("qwen3", each("weight_scale", lambda t: torch.exp2(t.float() - 127)), "scale bytes are read"),
    "qwen3: a dropped tensor": ("qwen3", drop("experts.2.up_proj.weight_packed"), "a tensor is missing"),
    "mixtral: scales as floats": ("mixtral", each("weight_scale", lambda t: torch.exp2(t.float() - 127)),
                                  "scale bytes are read"),
    "mixtral: a dropped tensor": ("mixtral", drop("experts.2.w3.weight_packed"), "a tensor is missing"),
    "qwen3: dropped norms": ("qwen3", drop("k_norm.weight"), "norms of query and key heads are dropped"),
    "qwen3: blocks of 16": ("qwen3", lambda f: edit_json(f / "config.json", lambda raw: raw["quantization_config"][
        "config_groups"]["group_0"]["weights"].update(group_size=16)), "blocks of another size"),
    "qwen3: tensors of another layout": ("qwen3", tensors(lambda held: [held.update({n.replace("_packed", ""): held.pop(n)})
                                                                        for n in list(held) if "_packed" in n]), "index"),
    "glm4: dropped shared experts": ("glm4", drop("shared_experts.down_proj.weight"), "a tensor is missing"),
    "glm4: dropped biases": ("glm4", drop("q_proj.bias"), "biases of the attention's projections are dropped"),
    "gpt-oss: dropped sinks": ("gpt-oss", drop("self_attn.sinks"), "sinks are dropped"),
    "gpt-oss: dropped biases": ("gpt-oss", drop("down_proj_bias"), "biases of the experts are dropped"),
    "gpt-oss: scale byte 255": ("gpt-oss", each("layers.1.mlp.experts.down_proj_scales", lambda t: t.index_fill(
        0, torch.tensor([0]), 255)), "not finite when it was exported"),
    "gpt-oss: half precision": ("gpt-oss", each("o_proj.weight", lambda t: t.half()), "another dtype than published"),
    "gpt-oss: a copied expert": ("gpt-oss", each("gate_up_proj_blocks", lambda t: t.index_copy(
        0, torch.tensor([1]), t[:1])), "copies of each other"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_folder_passes_and_every_check_says_whether_it_ran(layouts, tmp_path, capsys, family):
    folder, original = layouts[family]
    code, verdict = judged(folder, tmp_path, capsys, "--original", str(original))
    checks = {c["name"]: c for c in verdict["checks"]}
    assert code == 0 and verdict["causes"] == []
    assert {n: c["status"] for n, c in checks.items()} == dict.fromkeys(
        ("files", "folder", "reference", "logits", "ops", "lossless", "sampling", "cost"), "passed") | {
        "text": "unchecked", "acceptance": "not applicable"}
    assert all(c["reason"] for c in checks.values() if c["status"] in ("unchecked", "not applicable"))
    assert checks["reference"]["numbers"]["worst feature error"] < 1e-5 and checks["logits"]["numbers"]["logits error"] < 1e-4
    assert re.search("Not applicable: the folder has no drafter", (tmp_path / "v.html").read_text())


@pytest.mark.parametrize("family, layers", [(family, {"qwen3": 4}.get(family, 3)) for family in FAMILIES])
def test_a_drafter_is_judged_in_every_layout(layouts, tmp_path, capsys, family, layers):
    from modeling.drafter import DFlashDraftModel, drafter_config, save_drafter

    copy = shutil.copytree(layouts[family][0], tmp_path / "copy")
    torch.manual_seed(3)
    drafter = DFlashDraftModel(drafter_config(
        hidden_size=96, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=120, target_layer_ids=[0, layers - 1], num_target_layers=layers, mask_token_id=119, rotary_base=1e4,
        window=24, partial_rotary_factor=1.0, attention_value_scale=None)).float()
    torch.nn.init.normal_(drafter.mask_embedding)
    save_drafter(drafter, copy / "dflash")
    for name in ("export.json", "checksums.sha256", "checksums.json"):  # somebody's drafter beside it: no export of ours
        (copy / name).unlink()
    code, verdict = judged(copy, tmp_path, capsys)
    checks = {c["name"]: c for c in verdict["checks"]}
    assert code == 0 and checks["acceptance"]["status"] == "passed", verdict["causes"]
    assert checks["logits"]["numbers"]["draft logits error"] < 1e-4
    assert [row[0] for row in checks["lossless"]["tables"]["greedy answers"][1:]] == ["batched", "with drafts",
                                                                                      "with drafts, batched"]


@pytest.mark.parametrize("by", ["checksums", "original"])
@pytest.mark.parametrize("fault", of_held(SILENT))
def test_a_silent_fault_is_found_and_named(layouts, tmp_path, capsys, fault, by):
    family, inject, cause = SILENT[fault]
    folder, original = layouts[family]
    copy = shutil.copytree(folder, tmp_path / "copy")
    inject(copy)
    more = []
    if by == "original":
        (copy / "checksums.sha256").unlink()
        more = ["--original", str(original)]
    code, verdict = judged(copy, tmp_path, capsys, *more)
    assert code == 1
    named = next(c for c in verdict["checks"] if c["name"] == ("files" if by == "checksums" else "reference"))["causes"]
    assert any(cause in c for c in named), verdict["causes"]


@pytest.mark.parametrize("fault", of_held(LOUD))
def test_a_fault_of_the_inventory_is_found_and_named(layouts, tmp_path, capsys, fault):
    family, inject, cause = LOUD[fault]
    copy = shutil.copytree(layouts[family][0], tmp_path / "copy")
    inject(copy)
    (copy / "checksums.sha256").unlink()
    code, verdict = judged(copy, tmp_path, capsys)
    assert code == 1 and any(cause in c for c in verdict["causes"]), verdict["causes"]


def _gated_without_clamp(patch):
    from runtime_ref.backends.torch import ops as model

    right = model.gated
    patch.setattr(model, "gated", lambda x, clamp=None: right(x, None if clamp is None else (1e9, clamp[1])))


def _route_as_all(patch):
    from runtime_ref.backends.torch import ops as model

    right = model.route

    def wrong(x, w, config, *more):
        index, _ = right(x, w, config, *more)
        scores = model.spread(x, w.router)[0] + (0 if w.bias is None else w.bias)
        return index, scores.softmax(-1).gather(1, index)

    patch.setattr(model, "route", wrong)


def _attend_without_sinks(patch):
    from runtime_ref.backends.torch import ops as model

    right = model.attend_pages
    patch.setattr(model, "attend_pages", lambda q, k, v, hidden, sink, *more: right(q, k, v, hidden, None, *more))


def _project_without_norms(patch):
    import dataclasses

    from runtime_ref.backends.torch import ops as model

    right = model.project_qkv
    patch.setattr(model, "project_qkv", lambda x, a, *more: right(x, dataclasses.replace(a, q_norm=None, k_norm=None), *more))


def _decode_swapped(patch):
    from runtime_ref.checkpoints.host_weights import Packed

    right = Packed.decode
    patch.setattr(Packed, "decode", lambda self: right(self).unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def _shared_left_out(patch):
    from runtime_ref.backends.torch.backend import TorchBackend

    patch.setattr(TorchBackend, "op_shared_experts", lambda self, step, layer, y, partial: partial)


def _rotary_unscaled(patch):
    from runtime_ref.backends.torch.rotary import Rotary

    right = Rotary.__init__
    patch.setattr(Rotary, "__init__", lambda self, *a, **k: (right(self, *a, **k), setattr(self, "scaling", 1.0))[0])


WRONG_PORTS = {
    "qwen3: routing weights": ("qwen3", _route_as_all, "norm_topk_prob"),
    "qwen3: norms of heads": ("qwen3", _project_without_norms, "norms of query and key heads"),
    "qwen3: nibbles": ("qwen3", _decode_swapped, "nibbles are swapped"),
    "glm4: shared experts": ("glm4", _shared_left_out, "shared experts are left out"),
    "gpt-oss: clamp": ("gpt-oss", _gated_without_clamp, "the clamp of gpt-oss"),
    "gpt-oss: routing weights": ("gpt-oss", _route_as_all, "softmax of the chosen"),
    "gpt-oss: sinks": ("gpt-oss", _attend_without_sinks, "sinks are dropped"),
    "gpt-oss: yarn's factor": ("gpt-oss", _rotary_unscaled, "yarn's factor"),
}


@pytest.mark.skipif(KERNELS, reason="bugs of the torch ops, of which the kernels use none")
@pytest.mark.parametrize("bug", WRONG_PORTS)
def test_a_wrong_port_is_found_and_named(layouts, tmp_path, capsys, monkeypatch, bug):
    family, inject, cause = WRONG_PORTS[bug]
    inject(monkeypatch)
    code, verdict = judged(layouts[family][0], tmp_path, capsys, "--backend", "torch")
    assert code == 1 and any(cause in c and "the runtime" in c for c in verdict["causes"]), verdict["causes"]


@pytest.mark.parametrize("change, said", [
    ({"model_type": "mimo_v2_flash", "quantization_config": {"quant_method": "compressed-tensors"}}, "--layout native"),
    ({"model_type": "llama"}, "expected one of mimo_v2 (native layout), qwen3_moe (compressed-tensors layout)"),
    ({"quantization_config": None}, "--layout compressed-tensors writes"),
    ({"attention_bias": True}, "attention_bias: True, expected False")])
def test_what_the_engine_cannot_hold_is_refused_in_one_line(layouts, tmp_path, capsys, change, said):
    copy = shutil.copytree(layouts["qwen3"][0], tmp_path / "copy")
    config(**change)(copy)
    code = validate.main([str(copy)])
    out = capsys.readouterr()
    assert code == 2 and said in out.err and out.err.count("\n") == 1 and "config.json" in out.err and not out.out


def test_a_trained_checkpoint_that_was_not_exported_is_refused_with_what_exports_it(tmp_path, capsys):
    from toy_export import toy_config, toy_model

    toy_model(toy_config()).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    code = validate.main([str(tmp_path / "model")])
    out = capsys.readouterr()
    assert code == 2 and "export/to_hf.py RECIPE writes" in out.err and out.err.count("\n") == 1


def test_an_edit_that_changes_no_value_is_told_from_one_that_does(layouts, tmp_path, capsys):
    copy = shutil.copytree(layouts["qwen3"][0], tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text())))
    code, verdict = judged(copy, tmp_path, capsys)
    files = next(c for c in verdict["checks"] if c["name"] == "files")
    assert code == 1 and "every value is the exported one" in files["findings"][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fault_can_be_tried_and_changes_what_it_says(layouts, family):
    from runtime_ref.checkpoints.folder import read_geometry
    from runtime_ref.validation.checks.reference import load_hf
    from runtime_ref.validation.diagnosis.fault_table import target_faults

    folder = layouts[family][0]
    model, geometry = load_hf(folder), read_geometry(folder)[0]
    # Activations of this model stay below 7; its routing weights are what one of the two faults would make of them. Beside
    # activations of ordinary size epsilons below 1e-4 are one.
    silent = {"no clamp", "swiglu clamp", "router chosen", "epsilon=1e-12", "epsilon=1e-08", "epsilon=1e-06", "epsilon=1e-05"}
    if family == "mixtral":  # the head is tied, and all experts are chosen
        silent |= {"tied", "router all"}
    own = geometry.rope_theta, geometry.routed_scaling_factor, int(geometry.head_dim * geometry.partial_rotary_factor)
    assert set(without_effect(model, target_faults(geometry), *own)) <= silent
