"""Raw DeepSpeed checkpoints: every master is found in its shards, and an export from them is what training computed with.

The folders here are written by this file in the layout that DeepSpeed 0.19 leaves behind (learnt from folders it wrote with
two ranks); where DeepSpeed is installed, `test_folders_written_by_deepspeed_itself` makes real ones.
"""

import contextlib
import enum
import math
import os
import re
import subprocess
import sys
import textwrap
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_export import export, make_run, put_on_grid, toy_config, toy_model

from checkpoint.detect_format import open_source
from checkpoint.sources import LastFile
from checkpoint.zero_shards import zero_folder

ALIGN = 2  # flattened groups end at a multiple of this many values a rank


@contextlib.contextmanager
def foreign_classes():
    """Classes that pickle under DeepSpeed's names, as its own do; gone again when the file is read."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for path, name in (("deepspeed.runtime.zero.config", "ZeroStageEnum"), ("deepspeed.utils.tensor_fragment",
                           "fragment_address"), ("deepspeed.runtime.fp16.loss_scaler", "LossScaler")):
            module = types.ModuleType(path)
            for parent in (path[:i] for i, c in enumerate(path) if c == "."):
                patch.setitem(sys.modules, parent, types.ModuleType(parent))
            patch.setitem(sys.modules, path, module)
            made[name] = (enum.IntEnum(name, {"gradients": 2, "optimizer_states": 1, "weights": 3}, module=path)
                          if name == "ZeroStageEnum" else type(name, (), {"__module__": path}))
            setattr(module, name, made[name])
        yield made


def write_zero(folder, stage, ranks, groups, **more):
    """A checkpoint of `groups` (list of {name: float32 master}) over `ranks`; `order`: names as laid out, with maps only."""
    with foreign_classes() as foreign:
        _write_zero(folder, stage, ranks, groups, foreign=foreign, **more)


def _write_zero(folder, stage, ranks, groups, *, foreign, module, frozen=(), buffers=(), shared=None, maps=True, bf16="bf16_",
               named_stage=True, order=None):
    folder.mkdir(parents=True)
    shapes = [OrderedDict((n, t.shape) for n, t in g.items()) for g in groups]
    cut = {n: _fragments(module[n].flatten(), ranks) for n in frozen} if stage == 3 else {}
    for r in range(ranks):
        facts = {"module": module if stage < 3 else {n: module[n] if n in buffers else torch.empty(0, dtype=module[n].dtype)
                                                     for n in module},
                 "buffer_names": list(buffers), "param_shapes": shapes, "shared_params": shared or {},
                 "frozen_param_shapes": OrderedDict((n, module[n].shape) for n in frozen) or None,
                 "frozen_param_fragments": {n: cut[n][r] for n in frozen} if stage == 3 else {n: module[n] for n in frozen}}
        if stage == 3 or r == 0:
            name = f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            torch.save(facts, folder / name)
        scaler = foreign["LossScaler"]()
        scaler.cur_scale = 1.0
        shard = {"loss_scaler": scaler, "partition_count": ranks if stage == 3 else [ranks] * len(groups)}
        if named_stage:
            shard["zero_stage"] = foreign["ZeroStageEnum"](stage)
        if stage == 3:
            shard["fp32_flat_groups"] = [torch.cat([_fragments(t.flatten(), ranks)[r] for t in g.values()]) for g in groups]
        else:
            parts, slices = zip(*(_group(g, ranks, r, foreign, order) for g in groups), strict=True)
            shard["single_partition_of_fp32_groups"] = list(parts)
            if maps:
                shard["param_slice_mappings"] = list(slices)
            shard["param_alignment_paddings"] = [[0] * len(g) for g in groups]
        moments = {"state": {0: {"exp_avg": torch.zeros(7)}}}
        shard["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] = moments
        torch.save({"optimizer_state_dict": shard}, folder / f"{bf16}zero_pp_rank_{r}_mp_rank_00_optim_states.pt")


def _fragments(flat, ranks):
    each = -(-flat.numel() // ranks)
    return [part.clone() for part in torch.nn.functional.pad(flat, (0, each * ranks - flat.numel())).split(each)]


def _group(group, ranks, r, foreign, order):
    """(this rank's run of a group, {name: its piece})."""
    names = [n for n in order or group if n in group]
    flat = torch.cat([group[n].flatten() for n in names])
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % (ALIGN * ranks)))
    each, at, pieces = flat.numel() // ranks, 0, OrderedDict()
    for n in names:
        first, last = max(at, r * each), min(at + group[n].numel(), (r + 1) * each)
        at += group[n].numel()
        if first < last:
            pieces[n] = foreign["fragment_address"]()
            pieces[n].__dict__.update(start=first - r * each, numel=last - first)
    return flat[r * each:(r + 1) * each].clone(), pieces


def sample(seed=0):
    """(two groups of masters of odd sizes, the module's tensors in bf16)."""
    g = torch.Generator().manual_seed(seed)
    groups = [{"experts": torch.randn(3, 5, 7, generator=g), "table": torch.randn(13, 7, generator=g)},
              {"scale": torch.randn(1, generator=g), "norm": torch.randn(7, generator=g)}]
    module = {n: t.bfloat16() for group in groups for n, t in group.items()}
    return groups, module | {"frozen": torch.randn(7, 3, generator=g).bfloat16(), "bias": torch.arange(3.0)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("stage, maps", [(1, True), (2, True), (2, False), (3, False)])
def test_every_tensor_and_row_is_found_whatever_the_ranks(stage, maps, ranks, tmp_path):
    groups, module = sample()
    write_zero(tmp_path / "z", stage, ranks, groups, module=module, frozen=["frozen"], buffers=["bias"],
               shared={"head": "table"}, maps=maps)
    source = open_source(tmp_path / "z")
    masters = groups[0] | groups[1]
    assert set(source.infos) == {*masters, "frozen", "bias", "head"} and source.masters == torch.bfloat16
    for name, value in (masters | {"head": masters["table"], "frozen": module["frozen"], "bias": module["bias"]}).items():
        assert torch.equal(source.read(name), value) and source.infos[name][0] == tuple(value.shape), name
    for expert in range(3):
        assert torch.equal(source.read_rows("experts", expert, slice(1, 4)), masters["experts"][expert, 1:4])


def test_another_order_of_the_parameters_is_followed_by_the_maps(tmp_path):
    groups, module = sample()
    write_zero(tmp_path / "z", 2, 2, groups, module=module, order=["table", "experts", "norm", "scale"])
    assert torch.equal(open_source(tmp_path / "z").read("experts"), groups[0]["experts"])


def test_a_shard_that_does_not_name_its_stage_is_stage_1(tmp_path):
    groups, module = sample()
    write_zero(tmp_path / "z", 1, 2, groups, module=module, named_stage=False)
    assert torch.equal(open_source(tmp_path / "z").read("table"), groups[0]["table"])


def test_only_the_bytes_asked_for_are_read(tmp_path, monkeypatch):
    groups, module = sample()
    write_zero(tmp_path / "z", 3, 2, groups, module=module)
    source, read, fill = open_source(tmp_path / "z"), [], LastFile.fill
    monkeypatch.setattr(LastFile, "fill", lambda self, path, start, view, name: (
        read.append(view.nbytes), fill(self, path, start, view, name)))
    source.read_rows("experts", 2, slice(0, 2))
    assert sum(read) == 2 * 7 * 4


def write_run(root: Path, stage: int) -> tuple[Path, dict]:
    """A run whose newest checkpoint is what Accelerate's save_state writes under DeepSpeed; (recipe, masters)."""
    recipe = make_run(root, drafter=False)
    for path in (root / "runs/toy/qat/model").iterdir():
        path.unlink()
    (root / "runs/toy/qat/model").rmdir()
    module = OrderedDict(toy_model(toy_config()).state_dict())
    generator = torch.Generator().manual_seed(1)
    masters = {n: t.float() * (1 + 1e-3 * torch.randn(t.shape, generator=generator)) for n, t in module.items()
               if ".experts." in n}
    for name, value in masters.items():
        module[name] = value.bfloat16()
    step = root / "runs/toy/qat/checkpoints/step-00000004"
    write_zero(step / "pytorch_model", stage, 2, [masters], module=module,
               frozen=[n for n in module if n not in masters])
    (step / "latest").write_text("pytorch_model")
    (step / "complete.json").write_text('{"step": 4, "processes": 2}')
    return recipe, masters


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_under_deepspeed_exports_what_its_forward_pass_computed_with(stage, tmp_path):
    recipe, masters = write_run(tmp_path / "zero", stage)
    plain = make_run(tmp_path / "plain", drafter=False)
    model = toy_model(toy_config())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in masters:
                p.copy_(masters[name])  # rounded to bf16, as the engine does before the forward pass
    put_on_grid(model).save_pretrained(tmp_path / "plain/runs/toy/qat/model")
    ours, theirs = export(recipe), export(plain)  # each verified, contract C2 included
    files = sorted(p.name for p in ours.glob("*.safetensors"))
    assert files and files == sorted(p.name for p in theirs.glob("*.safetensors"))
    for name in files:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def damaged(edit, *, stage=2, ranks=2):
    """What is said of a folder after `edit`."""

    def attempt(folder) -> str:
        groups, module = sample()
        write_zero(folder, stage, ranks, groups, module=module, frozen=["frozen"])
        edit(folder)
        with pytest.raises(ValueError) as caught:
            source = open_source(folder)
            for name in source.infos:
                source.read(name)
        return str(caught.value)

    return attempt


def resave(name, edit):
    def change(folder):
        with foreign_classes():
            state = torch.load(folder / name, weights_only=False)
            edit(state)
            torch.save(state, folder / name)

    return change


RANK1 = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


class Trap:
    """Unpickled freely, this would write a file."""

    def __reduce__(self):
        return os.system, ("touch trapped",)


@pytest.mark.parametrize("attempt, message", [
    (damaged(lambda f: (f / RANK1).unlink()), "written by 2 ranks, 1 "),
    (damaged(lambda f: (f / RANK1).unlink(), ranks=3), "the shard of rank 1 is missing, 2 of 3"),
    (damaged(lambda f: (f / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink(), stage=3), "rank 0 is missing"),
    (damaged(lambda f: (f / "mp_rank_00_model_states.pt").unlink()), r"no \*_model_states.pt"),
    (damaged(lambda f: (f / RANK1).write_bytes((f / RANK1).read_bytes()[:900])), f"{RANK1}: not a whole torch file"),
    (damaged(lambda f: (f / RANK1).write_bytes(b"")), f"{RANK1}: not a whole torch file"),
    (damaged(lambda f: (f / "mp_rank_01_model_states.pt").write_bytes(b"")), r"divided among ranks \(mp_rank 01\)"),
    (damaged(lambda f: (f / "layer_0_expert_1_mp_rank_00_model_states.pt").write_bytes(b"")), "experts or pipeline stages"),
    (damaged(resave(RANK1, lambda s: s["optimizer_state_dict"]["single_partition_of_fp32_groups"].pop())), "2 groups of par"),
    (damaged(resave(RANK1, lambda s: s["optimizer_state_dict"]["param_slice_mappings"][0].pop("table"))),
     "values of tensor table, expected 91"),
    (damaged(resave(RANK1, lambda s: s["optimizer_state_dict"].pop("single_partition_of_fp32_groups"))), "is missing: not the"),
    (damaged(resave(RANK1, lambda s: s["optimizer_state_dict"]["fp32_flat_groups"].__setitem__(0, torch.zeros(3))), stage=3),
     "the shards end|not a layout known here"),
    (damaged(resave(RANK1, lambda s: s.__setitem__("more", Trap()))), "could run code"),
])
def test_a_damaged_or_foreign_folder_is_one_clear_line(attempt, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = attempt(tmp_path / "z")
    assert re.search(message, text) and "\n" not in text
    assert not (tmp_path / "trapped").exists()


def test_of_several_steps_the_latest_is_taken_or_one_must_be_named(tmp_path):
    for step in (5, 10):
        groups, module = sample(step)
        write_zero(tmp_path / f"global_step{step}", 2, 2, groups, module=module)
    with pytest.raises(ValueError, match="global_step10, global_step5, expected one of these folders or a file `latest`"):
        open_source(tmp_path)
    (tmp_path / "latest").write_text("global_step5")
    assert zero_folder(tmp_path).name == "global_step5"
    assert torch.equal(open_source(tmp_path).read("table"), sample(5)[0][0]["table"])
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(ValueError, match="names 'global_step7'"):
        open_source(tmp_path)


TRAINING = textwrap.dedent("""
    import sys, torch
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from deepspeed.utils import safe_get_full_fp32_param
    from safetensors.torch import save_file

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = torch.nn.Linear(7, 7).requires_grad_(False)
            self.experts = torch.nn.Parameter(torch.randn(3, 5, 7))
            self.norm = torch.nn.LayerNorm(7)
            self.register_buffer("bias", torch.arange(3.0))

        def forward(self, x):
            return torch.einsum("bth,eoh->bto", self.norm(self.frozen(x)), self.experts)

    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
                              deepspeed_plugin=DeepSpeedPlugin(zero_stage=int(sys.argv[1]), gradient_accumulation_steps=1))
    model = Model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data = torch.utils.data.DataLoader(torch.randn(8, 6, 7), batch_size=1)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    for x in data:
        accelerator.backward(model(x.bfloat16()).float().square().mean())
        optimizer.step(), optimizer.zero_grad()
    full = {n: safe_get_full_fp32_param(p).clone() for n, p in model.module.named_parameters() if p.requires_grad}
    accelerator.save_state(sys.argv[2])
    if accelerator.is_main_process:
        save_file(full, sys.argv[2] + "/expected.tensors")
""")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_folders_written_by_deepspeed_itself(stage, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (an extra, and needs a C++ compiler)")
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    out = tmp_path / "state"
    env = os.environ | {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
                           str(stage), str(out)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    source, expected = open_source(out), load_file(out / "expected.tensors")
    assert source.masters == torch.bfloat16 and len(expected) == 3
    for name, value in expected.items():
        assert torch.equal(source.read(name), value), name
    assert torch.equal(source.read_rows("experts", 1, slice(2, 5)), expected["experts"][1, 2:5])
    assert math.prod(source.infos["frozen.weight"][0]) == 49 and source.infos["frozen.weight"][1] == "BF16"
