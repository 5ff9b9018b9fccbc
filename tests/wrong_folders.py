"""Ways to make a copy of an exported folder wrong, and what `validate` says of it."""

import json
from pathlib import Path

import pytest
import torch
from pace import KERNELS
from safetensors.torch import load_file, save_file

from modeling.names import fused_name
from runtime_ref import validate

# What `validate` is told to serve with: the kernels where they are asked for (`pace`).
ON_BACKEND = ["--backend", "triton", "--launch", "ops"] if KERNELS else []


def faults(wrong: dict, some: set[str]) -> list:
    """Names of faults to parametrize with. All but some are marked `long`: each takes ten seconds on the kernels; of these all
    but every third are marked `slow`: each takes two to five seconds on the compiled ops."""
    assert some <= set(wrong)
    marks = {name: () if name in some else (pytest.mark.long,) if i % 3 == 0 else (pytest.mark.long, pytest.mark.slow)
             for i, name in enumerate(wrong)}
    return [pytest.param(name, marks=marks[name]) for name in wrong]


def write_reference(folder: Path) -> None:
    """dflash_reference.safetensors as the format has it: features and one drafted block, float32."""
    from checkpoint.load import load_model
    from modeling.drafter import load_drafter

    target, drafter = load_model(folder, dtype=torch.float32), load_drafter(folder / "dflash", torch.float32)
    text = max(41, target.config.sliding_window + 12)  # long enough to show the target's window
    ids = torch.randint(0, 260, (1, text), generator=torch.Generator().manual_seed(0))
    layers = list(drafter.target_layer_ids)
    with torch.no_grad():
        out = target(input_ids=ids[:, :-1], aux_layers=layers, use_cache=False, logits_to_keep=8)
        target_hidden = torch.stack(out.aux_hidden_states, dim=2)
        positions = torch.arange(text - 1)[None]
        context = drafter.context_keys_values(drafter.fuse(target_hidden.flatten(2)), positions)
        hidden = drafter.block_hidden(drafter.embed_block(ids[:, -1], target.model.embed_tokens),
                                      text - 1 + torch.arange(8)[None], context, positions)
        logits = target.lm_head(hidden[:, 1:])
    context = json.dumps({"target_layer_ids": layers, "features": "target"})
    save_file({"input_ids": ids, "taps": target_hidden.contiguous(), "draft_hidden": hidden.contiguous(),
               "draft_logits": logits.contiguous(), "target_logits": out.logits.contiguous()},
              folder / "dflash" / "dflash_reference.safetensors", metadata={"reference": context})


def edit(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})


def edit_json(file: Path, change) -> None:
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def judged(folder: Path, tmp_path: Path, capsys, *more) -> tuple[int, dict]:
    code = validate.main([str(folder), "--json", str(tmp_path / "v.json"), "--html", str(tmp_path / "v.html"), "--tokens", "8",
                          "--prompts-per-domain", "2", *ON_BACKEND, *more])
    capsys.readouterr()
    return code, json.loads((tmp_path / "v.json").read_text())


def target(change):
    return lambda folder: edit(folder / "model.safetensors", change)


def config(**values):
    return lambda folder: edit_json(folder / "config.json", lambda raw: raw.update(values))


def config_of(change):
    """A fault that depends on what is right: raw config -> values."""
    return lambda folder: edit_json(folder / "config.json", lambda raw: raw.update(change(raw)))


def drafter(top=None, special=None):
    def change(raw):
        raw.update(top or {})
        raw["dflash_config"].update(special or {})

    return lambda folder: edit_json(folder / "dflash" / "config.json", change)


def drafter_file(change):
    return lambda folder: edit(folder / "dflash" / "model.safetensors", change)


def each_expert(suffix, change):
    def apply(tensors):
        for name in list(tensors):
            if fused_name(name.removesuffix("_scale")) is not None and name.endswith(suffix):
                tensors[name] = change(tensors[name])

    return apply


def mask_of(change):
    def apply(folder):
        file = folder / "dflash" / "mask_embedding.pt"
        sidecar = torch.load(file, weights_only=True)
        torch.save(change(sidecar), file)

    return apply


def without_effect(model, faults, *bases) -> list[str]:
    """Names of the faults (of searched numbers: each start but the model's own) that leave a model's logits as they are."""
    import copy

    from runtime_ref.validation.diagnosis.faults import SAME, difference
    from runtime_ref.validation.diagnosis.model_view import view_of

    ids = torch.randint(1, 90, (1, 41), generator=torch.Generator().manual_seed(1))
    silent = []
    with torch.no_grad():
        right = model(input_ids=ids).logits
        for fault in faults:
            for one in [fault.at(v) for v in fault.starts if v not in bases] or [fault]:
                changed = copy.deepcopy(model)
                if one.change(view_of(changed)) is not False and difference(changed(input_ids=ids).logits, right) < SAME:
                    silent.append(one.name)
        assert difference(model(input_ids=ids).logits, right) == 0  # only copies were changed
    return silent
