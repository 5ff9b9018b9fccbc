"""The GPU suite from its first line to its JSON on a machine without a GPU: a dry run, because a GPU's minutes are few.

torch.cuda is mocked by the CPU: tensors meant for "cuda" are made there, graphs call what they would have recorded, events say
a millisecond. Kernels are compiled for the CPU, cooperative launches are threads. What comes out are no measurements.
"""

import contextlib
import json
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from wrong_folders import judged

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from modeling.published_geometries import released_config
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.engine import Engine, EngineOptions
from runtime_ref.kernels.repack import repack_experts
from runtime_ref.measure.gpu_suite import checks as gpu_checks
from runtime_ref.measure.gpu_suite import engine as gpu_engine
from runtime_ref.measure.gpu_suite import plan as gpu_plan
from runtime_ref.measure.gpu_suite import steps as gpu_steps
from runtime_ref.measure.gpu_suite import suite as gpu_suite
from runtime_ref.triton_cpu.backend import HostLauncher
from tests.runtime_ref.kernels.at_once import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here: make test-kernels")


class OnTheCpu(TorchFunctionMode):
    """Tensors for "cuda" lie on the CPU and bear a mark, which what is computed of them inherits. `mixed` are the calls that a
    card would refuse: marked and unmarked tensors together, outside copies and indices; single numbers of the host may meet the
    card's tensors, but in STRICT. `reads`: calls that wait for the card to have computed something."""

    FREE = {"copy_", "__getitem__", "__setitem__", "index_copy_", "__get__", "__set__", "cpu", "to", "cuda"}
    STRICT = {"searchsorted", "bucketize"}
    READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "unique"}

    def __init__(self):
        super().__init__()
        self.mixed: list[str] = []
        self.reads: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.device:
            return function(*args, **kwargs)
        tensors = [t for t in flattened((args, tuple(kwargs.values()))) if isinstance(t, torch.Tensor)]
        name = getattr(function, "__name__", str(function))
        marked = [on_card(t) for t in tensors if t.dim() or name in self.STRICT]
        places = [str(a) for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device))]
        here = any(place.startswith("cuda") for place in places)
        gone = name == "cpu" or "cpu" in places
        if len(set(marked)) > 1 and name not in self.FREE or name == "numpy" and any(marked):
            caller = next(frame for frame in traceback.extract_stack()[::-1] if "/tests/" not in frame.filename
                          and "/runtime_ref/" in frame.filename)
            self.mixed.append(f"{name} in {Path(caller.filename).name}:{caller.lineno}")
        of_card = any(getattr(t, "of_card", False) for t in tensors)
        if of_card and (name in self.READS or gone):
            self.reads.append(name)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if name == "cuda":
            found, here = args[0], True
        else:
            found = function(*["cpu" if isinstance(a, (str, torch.device)) and str(a).startswith("cuda") else a for a in args],
                             **kwargs)
        if here or gone:
            found = found.detach().clone() if isinstance(found, torch.Tensor) else found
        for t in flattened((found,)):
            if isinstance(t, torch.Tensor) and t.dim() and (here or any(marked) and not gone):
                t.on_card = True
            if isinstance(t, torch.Tensor) and (here or of_card and not gone):
                t.of_card = True
        return found


def on_card(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "on_card", False)


def flattened(values):
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from flattened(value)
        else:
            yield value


class Graph:
    """Calls are made while they are recorded; the suite's `graph` gives them to whoever replays."""

    def replay(self):
        """Nothing is left to do."""


class Event:
    def __init__(self, **options):
        """Options of torch's."""

    def record(self):
        """No stream."""

    synchronize = record

    def elapsed_time(self, other) -> float:
        return 1.0


class ReferencePeer(gpu_suite.peers.Peer):
    """A peer that computes what is wanted."""

    name, package, routed, timed = "reference", "no_such_package", "", "everything"

    def prepare(self, gate_up, down, device):
        self.layer = repack_experts(gate_up, down).to(device)

    def route(self, index):
        return index

    def compute(self, x, weight, routes):
        return gpu_checks.reference(x, routes, weight, self.layer).to(torch.bfloat16)


@pytest.fixture
def mocked(monkeypatch, request):
    """A card, as far as the suite looks: a Hopper one, or of the compute capability that is asked for."""
    capability = getattr(request, "param", (9, 0))
    card = SimpleNamespace(multi_processor_count=1)
    generator = torch.Generator
    host_copies, capturing = [], []

    def no_copy(tensor, *args, **options):
        host_copies.append(tuple(tensor.shape))
        return cpu(tensor, *args, **options)

    @contextlib.contextmanager
    def recording(graph):
        before = len(host_copies)
        capturing.append(graph)
        yield
        capturing.pop()
        assert len(host_copies) == before, f"copied to the host while a graph was recorded: {host_copies[before:]}"

    cpu = torch.Tensor.cpu
    no_copy.__name__ = "cpu"  # torch looks its methods up by name
    monkeypatch.setattr(torch.Tensor, "cpu", no_copy)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    for name, value in {"is_available": lambda: True, "get_device_capability": lambda *_: capability,
                        "synchronize": lambda: None, "is_current_stream_capturing": lambda: bool(capturing),
                        "get_device_name": lambda *_: "NVIDIA H200 (mocked)", "get_device_properties": lambda *_: card,
                        "empty_cache": lambda: None, "CUDAGraph": Graph, "graph": recording, "Event": Event}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    launched_names = []

    @contextlib.contextmanager
    def profile(**options):
        """Launches of the calls inside, of 5 us each, and a copy: what the card's profiler would see of them."""
        begun = len(launched_names)
        card = torch.autograd.DeviceType.CUDA
        yield SimpleNamespace(events=lambda: [
            SimpleNamespace(name=name, time_range=SimpleNamespace(start=9.0 * i, end=9.0 * i + 5), device_type=card)
            for i, name in enumerate([*launched_names[begun:], "Memcpy HtoD"])])

    monkeypatch.setattr(torch.profiler, "profile", profile)
    launch, strangers = HostLauncher.__call__, set()

    def launched(self, *arguments):
        launched_names.append(self.name)
        strangers.update(f"{self.name}({name})" for name, t in zip(self.names, arguments[9:], strict=True)
                         if isinstance(t, torch.Tensor) and not on_card(t))
        return launch(self, *arguments)

    monkeypatch.setattr(HostLauncher, "__call__", launched)
    place = property(lambda t: torch.device("cuda" if on_card(t) else "cpu"))
    monkeypatch.setattr(torch.Tensor, "device", place, raising=False)
    with OnTheCpu() as mode:
        yield mode
    assert not strangers, f"kernels were given tensors of the host: {strangers}"
    assert not mode.mixed, f"tensors of the host and of the card in one call: {sorted(set(mode.mixed))}"


@pytest.mark.long
@pytest.mark.parametrize("mocked", [pytest.param((9, 0), id="Hopper"), pytest.param((10, 0), id="Blackwell")], indirect=True)
def test_the_whole_suite_runs_to_its_json(mocked, folder, tmp_path, monkeypatch):
    small = released_config("MiMo-V2.5-Pro") | gpu_steps.TOY | {
        "hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 8, "swa_num_attention_heads": 16,
        "swa_num_key_value_heads": 8, "moe_intermediate_size": 8 * 64, "intermediate_size": 8 * 256, "n_routed_experts": 8}
    for module in (gpu_suite, gpu_steps):
        if hasattr(module, "released_config"):
            monkeypatch.setattr(module, "released_config", lambda name: dict(small))
    real = gpu_checks.random_weights
    monkeypatch.setattr(gpu_checks, "random_weights", lambda experts, hidden, inner: real(experts, min(hidden, 512), inner))
    for module, name, value in ((gpu_suite, "BANDWIDTH_BYTES", 1 << 20), (gpu_suite, "CALLS", 2), (gpu_suite, "SWEEP", (1, 16)),
                                (gpu_suite, "REPLAYS", 2), (gpu_steps, "QUANTIZED", 1 << 16), (gpu_steps, "BARRIERS", 3)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(gpu_plan, "SECONDS", 100_000)  # nothing is measured here, however slow this machine is
    variants, check = gpu_checks.launches, gpu_checks.check_experts
    monkeypatch.setattr(gpu_checks, "launches", lambda *args: [v for v in variants(*args)[:1] + variants(*args)[-2:]
                                                               if v.warps == 4])
    monkeypatch.setattr(gpu_checks, "check_experts", lambda *args: check(*args[:3], args[3][:1]))
    engine, steps = gpu_engine.measure_engine, gpu_steps.measure_steps
    monkeypatch.setattr(gpu_engine, "measure_engine", lambda *args: engine(*args, tokens=8))
    monkeypatch.setattr(gpu_steps, "measure_steps", lambda *args, **options: steps(*args, position=200, **options))
    monkeypatch.setattr(gpu_suite.peers, "available", lambda: [("reference", ReferencePeer()),
                                                             ("absent", "not importable: no such module")])
    monkeypatch.setattr(gpu_suite, "measure_training", lambda *_: {"ratio": {"ours": 1.2}})
    page = tmp_path / "gpu.md"
    assert gpu_suite.run(tmp_path / "gpu.json", folder, page) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["skipped"] == [] and report["refused"] == [] and all(check["passed"] for check in report["checks"])
    assert not any(row["failed"] for row in report["experts"] + report["sweep"]) and len(report["sweep"]) == 2
    step = report["step"]
    assert step["compared"]["wrong"] is None and step["compared"]["repeated"] and not step["compared"]["failed"]
    assert 1 < step["compared"]["distinct_experts"] <= 8 and step["walk"]["barriers"] > 3
    assert len(step["tuning"]) == len(gpu_steps.SWITCHES) and all(row["equal"] for row in step["tuning"])
    assert set(step["barriers"]) == {"counter", "release flag"} and all(step["barriers"].values())
    assert [(row["tokens"], row["dispatch"]) for row in report["dispatch"]] == [
        (tokens, way) for tokens in (1, 16) for way in ("tickets", "static", "a slot a choice")]
    assert [step[name]["launches"] for name in ("walk", "draft", "verify")] == [1, 1, 1] and step["launches_op_by_op"] > 10
    assert report["engine"]["greedy_equal"] == {"op by op": True, "walked": True} and report["engine"]["failed"] == []
    assert report["engine"]["walked_as_op_by_op"] == [8, 8] and len(report["engine"]["tokens_per_second"]) == 4
    assert report["complete"]
    assert {"bandwidth", "fake_quantize", "torch_bf16", "peers"} <= report.keys()
    draft = report["step"]["draft"]
    assert draft["difference"] < 1e-2 and draft["refused"] is None and draft["reductions"] == 10
    assert report["step"]["projected"]["reductions"] == 150
    assert report["step"]["step_and_draft_seconds"] > draft["seconds"] > 0
    words = page.read_text()
    assert "| release_flag True, ahead 0, packed True |" in words and "static " in words
    assert "# The kernels on NVIDIA H200 (mocked)" in words and "DIFFER" not in words and "given up" not in words
    goals = [line for line in words.splitlines() if line.startswith("| G")]
    assert len(goals) == 13 and sum("not measured" in line for line in goals) == 1  # no peer at 8 tokens in this sweep
    assert report["peers"]["reference"]["refused"] is None and [row["ratio"] for row in report["against"]] == [1.0, 1.0]
    assert "- absent: not importable: no such module" in words and "| reference, us" in words
    picture = page.with_name("gpu-timeline.svg").read_text()
    assert picture.count("<title>") > 20 and "product_kernel" in picture and "step_kernel" in picture


@pytest.mark.long
def test_an_engine_keeps_to_the_card(mocked, folder):
    """Adaptive, drawn on the card, verified on the host, with log-probabilities: together, and in megakernels."""
    engine = Engine.from_folder(folder, backend="triton", launch="ops", options=EngineOptions(max_context=256, max_running=5))
    assert engine.backend.device == "cuda"
    params = [SamplingParams(max_tokens=6, ignore_eos=True, **own) for own in (
        {"adaptive": True}, {"temperature": 0.8, "seed": 1}, {"temperature": 0.8, "seed": 2, "top_p": 0.9}, {"logprobs": 2},
        {"temperature": 0.8, "seed": 3, "rule": "rejection"})]
    prompts = [[5, 6, 7, 8 + i] for i in range(5)]
    found = engine.generate(prompts, params)
    gpu_steps.use_megakernel(engine, 2)
    assert engine.generate(prompts, params) == found and all(len(answer) == 6 for answer in found)


KINDS = ({}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}, {"repetition_penalty": 1.2},
         {"temperature": 0.8, "rule": "rejection"},
         {"temperature": 0.8, "rule": "rejection", "top_p": 0.9, "presence_penalty": 0.5, "logit_bias": ((4, 1.0),),
          "min_tokens": 9})


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_the_host_reads_once_in_a_round_of_any_kind(mocked, folder, together):
    """Drafts, step, verdict and whether a wait was given up; launched op by op and as megakernels."""
    engine = Engine.from_folder(folder, backend="triton", launch="ops", options=EngineOptions(max_context=256, max_running=6))
    for persistent in (False, True):
        if persistent:
            gpu_steps.use_megakernel(engine, 1)
        for kinds in [KINDS] if together else [[own] for own in KINDS]:
            for i, own in enumerate(kinds):
                engine.add([5, 6, 7, 8 + i], SamplingParams(max_tokens=24, ignore_eos=True, seed=i, **own))
            engine.step()  # the prompts
            rounds = engine.stats()["rounds"]
            mocked.reads.clear()
            engine.step()
            assert engine.stats()["rounds"] == rounds + len(kinds) and mocked.reads == ["tolist"]
            while engine.busy:
                engine.step()


def test_validate_judges_what_lies_on_the_card(mocked, exported, tmp_path, capsys):
    code, verdict = judged(exported, tmp_path, capsys, "--backend", "triton", "--launch", "ops")
    assert code == 0, verdict["causes"]
    assert {check["status"] for check in verdict["checks"]} <= {"passed", "unchecked"}


@pytest.mark.long
def test_validate_names_a_fault_of_what_lies_on_the_card(mocked, copied, tmp_path, capsys, monkeypatch):
    """Of the kernels, so that every comparison with what they serve is made."""
    from runtime_ref.backends.triton import backend as triton_backend

    right = triton_backend.attend
    monkeypatch.setattr(triton_backend, "attend", lambda q, k, v, sink, *more, **own: right(q, k, v, None, *more, **own))
    code, verdict = judged(copied, tmp_path, capsys, "--backend", "triton", "--launch", "ops")
    assert code == 1 and any("sinks" in cause for cause in verdict["causes"]), verdict["causes"]
