"""What the GPU suite can prove of itself without a GPU: its oracle, its checks, and that red checks forbid speeds."""

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from tolerance import ATTENTION_KERNEL, EXPERTS_KERNEL, MODEL_FP32

from runtime_ref import bench
from runtime_ref.kernels.experts import Launch
from runtime_ref.kernels.repack import Tile
from runtime_ref.measure.gpu_suite import checks as gpu_checks
from runtime_ref.measure.gpu_suite import engine as gpu_engine
from runtime_ref.measure.gpu_suite import page as gpu_page
from runtime_ref.measure.gpu_suite import plan as gpu_plan
from runtime_ref.measure.gpu_suite import steps as gpu_steps
from runtime_ref.measure.gpu_suite import suite as gpu_suite
from tests.runtime_ref.kernels import expert_cases as cases
from tests.runtime_ref.kernels.at_once import INTERPRETED


def test_its_oracle_is_the_models_experts():
    weights = cases.make_weights()
    x, index, weight = cases.make_tokens(9)
    expected = cases.oracle(weights)(x.float(), index.long(), weight)
    torch.testing.assert_close(gpu_checks.reference(x, index, weight, cases.make_pages(weights)), expected, **MODEL_FP32)


def test_its_tolerance_is_the_tests_tolerance():
    assert gpu_checks.TOLERANCE == EXPERTS_KERNEL == ATTENTION_KERNEL


def test_its_check_of_the_experts_is_green_on_good_and_red_on_broken_kernels(monkeypatch):
    pages = cases.make_pages(cases.make_weights())
    (good,) = gpu_checks.check_experts("small", pages, cases.launched(), (2,))
    assert good["passed"], good
    kernel = gpu_checks.run_experts
    monkeypatch.setattr(gpu_checks, "run_experts", lambda *args: kernel(*args).mul_(1.01))
    (wrong,) = gpu_checks.check_experts("small", pages, cases.launched(), (2,))
    assert not wrong["passed"] and "relative error" in wrong["detail"]


@pytest.mark.parametrize("window", [None, 128])
def test_its_check_of_attention_is_green(window):
    check = gpu_checks.check_attention(window, "cpu", float_dot=INTERPRETED)
    assert check["passed"], check


@pytest.fixture
def card(monkeypatch):
    """A card, as far as the suite itself looks, with green checks and parts that measure nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=2))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_suite, "git_revision", lambda: "unknown")
    for module, name, found in (
            (gpu_checks, "check_kernels", [{"name": "decoding", "passed": True, "detail": "fine"}]),
            (gpu_suite, "_bandwidths", {"read": 4e12, "copy": 3e12}), (gpu_suite, "measure", {"experts": [], "sweep": []}),
            (gpu_steps, "measure_fake_quantize", {"share_of_copy": 0.9}), (gpu_suite, "measure_training", {}),
            (gpu_steps, "measure_steps", STEP), (gpu_engine, "measure_engine", ENGINE),
            (gpu_engine, "check_folder", None), (gpu_suite, "measure_peers", {"peers": {}, "against": []})):
        monkeypatch.setattr(module, name, lambda *_, found=found, **__: found)


STEP = {"weights_bytes": 1, "position": 8, "compared": None, "op_by_op": None,
        "walk": {"refused": "two megakernel launches differ"}, "barrier_seconds": None,
        "verify": None, "draft": None, "launches_op_by_op": None}
ENGINE = {"tokens": 8, "greedy_equal": {"op by op": True}, "tokens_per_second": {"plain, op by op": 9.0}, "timeline": {},
          "failed": [], "walked_as_op_by_op": None, "acceptance_length": None}


def raising(error):
    def call(*_, **__):
        raise error
    return call


def test_no_speed_is_measured_after_a_red_check(card, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_checks, "check_kernels", lambda *_: [{"name": "decoding", "passed": False, "detail": "2 differ"}])
    monkeypatch.setattr(gpu_suite, "measure", lambda *_: pytest.fail("measured on red"))
    assert gpu_suite.run(tmp_path / "gpu.json") == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["checks"][0]["detail"] == "2 differ" and "bandwidth" not in report and report["complete"]
    assert "no speed was measured" in capsys.readouterr().out


PARTS = {"bandwidth": (gpu_suite, "_bandwidths"), "experts": (gpu_suite, "measure"),
         "fused fake quantization": (gpu_steps, "measure_fake_quantize"), "peers": (gpu_suite, "measure_peers"),
         "a training step": (gpu_suite, "measure_training"),
         "a rank's step at full geometry": (gpu_steps, "measure_steps"),
         "the engine end to end": (gpu_engine, "measure_engine")}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_fails_is_a_line_of_the_report_and_the_others_are_measured(card, monkeypatch, tmp_path, part):
    error = {"bandwidth": torch.OutOfMemoryError("no room"), "the engine end to end": FloatingPointError("not finite")}
    monkeypatch.setattr(*PARTS[part], raising(error.get(part, RuntimeError("no room"))))
    assert gpu_suite.run(tmp_path / "gpu.json", tmp_path, tmp_path / "gpu.md") == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    (line,) = report["refused"]
    assert line.startswith(f"{part}: ") and f"- {line}" in (tmp_path / "gpu.md").read_text()
    found = {"bandwidth", "experts", "fake_quantize", "qat_step", "step", "engine", "peers"} & report.keys()
    assert len(found) == 6 and report["complete"]


def test_what_was_measured_is_on_disk_before_the_next_part_begins(card, monkeypatch, tmp_path):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_engine, "measure_engine", die)
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.run(tmp_path / "gpu.json", tmp_path, tmp_path / "gpu.md")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert not report["complete"] and {"checks", "bandwidth", "experts", "fake_quantize", "step"} <= report.keys()
    assert "did not come to its end" in (tmp_path / "gpu.md").read_text()


def test_memory_of_a_part_is_free_before_the_next(card, monkeypatch, tmp_path):
    """Though what held it is a cycle, as a backend with its bound methods is."""
    held, freed = [], []

    class Backend:
        """An object that can be watched."""

    def steps(*_, **__):
        backend = Backend()
        backend.itself = backend
        held.append(weakref.ref(backend))
        return STEP

    monkeypatch.setattr(gpu_steps, "measure_steps", steps)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(bool(held) and held[0]() is None))
    gc.disable()
    try:
        gpu_suite.run(tmp_path / "gpu.json", only=["steps"])
    finally:
        gc.enable()
    assert freed[-1]


@pytest.mark.parametrize("config, said", [(None, "no such folder"), ({"model_type": "llama"}, "llama"), ({}, "gpt_oss")])
def test_a_wrong_checkpoint_is_refused_before_anything_is_checked(monkeypatch, tmp_path, capsys, config, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_checks, "check_kernels", lambda *_: pytest.fail("checked"))
    folder = tmp_path / "model"
    if config == {}:  # one that the runtime runs, but not with these kernels
        monkeypatch.setattr(gpu_engine, "read_geometry", lambda _: (SimpleNamespace(model_type="gpt_oss"), {}))
    if config is not None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    assert bench.main(["--suite", "gpu", "--json", str(tmp_path / "gpu.json"), "--checkpoint", str(folder)]) == 2
    said_lines = capsys.readouterr().err.splitlines()
    assert len(said_lines) == 1 and said in said_lines[0] and not (tmp_path / "gpu.json").exists()


def test_a_checkpoint_that_the_kernels_run_is_taken(folder):
    gpu_engine.check_folder(folder)


def checks_of(monkeypatch, refuse) -> tuple[list[dict], dict[str, str]]:
    """What `check_kernels` yields where everything is green but the experts that `refuse` tells by their launch."""
    def experts(name, pages, launch, counts):
        if refuse(launch):
            raise RuntimeError("Triton Error [CUDA]: out of resource\nwhere")
        return [{"name": name, "passed": True, "detail": ""}]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=2))
    monkeypatch.setattr(gpu_checks, "random_weights", lambda *_: (None, None))
    monkeypatch.setattr(gpu_checks, "repack_experts", lambda *_, **__: SimpleNamespace(to=lambda _: None))
    green = {"name": "green", "passed": True, "detail": ""}
    for name in ("_check_decoding", "check_attention"):
        monkeypatch.setattr(gpu_checks, name, lambda *_: green)
    monkeypatch.setattr(gpu_steps, "check_fake_quantize", lambda *_: green)
    monkeypatch.setattr(gpu_steps, "check_steps", raising(ValueError("no such step")))
    monkeypatch.setattr(gpu_checks, "check_experts", experts)
    unfit = {}
    return list(gpu_checks.check_kernels(gpu_plan.Plan(), unfit)), unfit


def test_a_variant_that_cannot_be_launched_is_refused_and_a_check_that_raises_is_red(monkeypatch):
    found, unfit = checks_of(monkeypatch, lambda launch: launch.stages == 4)
    assert [check for check in found if not check["passed"]] == [
        {"name": "steps", "passed": False, "detail": "ValueError: no such step"}]
    assert len(unfit) == 2 and set(unfit.values()) == {"RuntimeError: Triton Error [CUDA]: out of resource"}
    assert all("stages 4" in name for name in unfit)


def test_the_default_variant_has_to_pass(monkeypatch):
    found, unfit = checks_of(monkeypatch, lambda launch: launch == Launch(programs=8))
    default = f"experts 6144-256, {gpu_checks.words(Tile(), Launch(programs=8))}"
    assert [check["name"] for check in found if not check["passed"]] == [default, "steps"]
    assert list(unfit) == [gpu_checks.words(Tile(128, 256), Launch(programs=8))]


def test_variants_are_neither_checked_nor_measured_when_the_parts_would_not_fit_any_more(monkeypatch):
    monkeypatch.setattr(gpu_plan.Plan, "seconds_left", lambda self, part=None: -1.0)
    found, unfit = checks_of(monkeypatch, lambda launch: False)
    assert len(unfit) == len(gpu_checks.variants(2)) - 1 and set(unfit.values()) == {"not checked: no time"}
    assert sum("6144-256" in check["name"] for check in found) == 1


def test_a_variant_that_is_unfit_is_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_suite, "_random_pages", lambda *_: "pages")
    monkeypatch.setattr(gpu_suite, "_measure_torch", raising(torch.OutOfMemoryError("full")))

    def measured(pages, launch, tokens, read):
        if tokens == 16:
            raise RuntimeError("no")
        return {"seconds": launch.programs, "failed": False, "tokens": tokens}

    monkeypatch.setattr(gpu_suite, "_measure_experts", measured)
    monkeypatch.setattr(gpu_suite, "_same_bits", lambda pages, launch, tokens: tokens != 2 or launch.packed)
    plan, name = gpu_plan.Plan(), gpu_checks.words(Tile(), Launch(programs=4, stages=3))
    report = gpu_suite.measure(plan, 2, None, {name: "why"})
    assert len(report["experts"]) == len(gpu_checks.variants(2)) - 1
    assert [row["tokens"] for row in report["sweep"]] == [n for n in gpu_suite.SWEEP if n != 16]
    assert plan.refused == [f"8 tokens, {name}: why", "sweep, 2 tokens, a slot a choice: ArithmeticError: other bits than with "
                            "tickets", *(f"sweep, 16 tokens, {way}: RuntimeError: no" for way in gpu_checks.dispatches(
                                Launch(programs=4), 1)), "torch in bf16: OutOfMemoryError: full"]
    assert len(report["dispatch"]) == 3 * (len(gpu_suite.SWEEP) - 1) - 1


@pytest.fixture
def small_toy(monkeypatch):
    for name, value in {"vocab_size": 100, "num_hidden_layers": 1, "hybrid_layer_pattern": [0], "moe_layer_freq": [1]}.items():
        monkeypatch.setitem(gpu_steps.TOY, name, value)


@pytest.mark.long
def test_its_check_of_whole_steps_is_green_in_the_interpreter(monkeypatch):
    monkeypatch.setitem(gpu_steps.TOY, "vocab_size", 100)
    checks = gpu_steps.check_steps("cpu", 1)
    assert [check["passed"] for check in checks] == [True, True], checks
    assert "bits of the launches equal" in checks[1]["detail"]


def spoiled(name: str):
    """A launch of a megakernel that then changes its logits, what it gave its first layer's successor, or only the second."""
    launch, seen = gpu_steps.Megakernel.launch, []

    def call(self, step, logits, target_hidden):
        launch(self, step, logits, target_hidden)
        seen.append(self)
        if name == "logits":
            logits[3] *= 1.01
        elif name == "target_hidden":
            target_hidden[0, 7] *= 1.01
        elif name == "infinite":
            target_hidden[0, 2, 5] = float("inf")
        elif name == "second" and len(seen) == 2:
            target_hidden[0, 0, 0] += 1
    return call


@pytest.mark.parametrize("name, said", [("logits", "at the logits"), ("target_hidden", "at layer 0"), ("second",
                                        "two megakernel launches differ"), ("infinite", "not finite after layer 0"), ("failed",
                                                                                                        "a wait was given up")])
def test_its_check_of_whole_steps_is_red_when_a_megakernel_is_wrong(small_toy, monkeypatch, name, said):
    if name == "failed":
        monkeypatch.setattr(gpu_steps.Megakernel, "failed", lambda self: True)
    else:
        monkeypatch.setattr(gpu_steps.Megakernel, "launch", spoiled(name))
    one, other = gpu_steps.check_steps("cpu", 1)
    assert one["passed"] and not other["passed"] and said in other["detail"]


def test_a_wrong_megakernel_has_no_speed(small_toy, monkeypatch):
    """Though everything else of the step has one."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=1))
    weights = SimpleNamespace(arena=SimpleNamespace(used=1))
    monkeypatch.setattr(gpu_steps, "Prepared", lambda *_: SimpleNamespace(
        step=lambda rows: None, program=[], backend=SimpleNamespace(kernel_weights=weights)))
    monkeypatch.setattr(gpu_steps, "compare_megakernel", lambda *_: {"wrong": "two megakernel launches differ"})
    monkeypatch.setattr(gpu_steps, "_measure_megakernel", lambda *_: pytest.fail("timed"))
    for name in ("measure_verify", "measure_draft", "measure_barrier"):
        monkeypatch.setattr(gpu_steps, name, lambda *_: {"seconds": 2e-3, "refused": None, "reductions": 10, "launches": 1})
    monkeypatch.setattr(gpu_steps, "measure_barrier", raising(RuntimeError("a wait was given up")))
    problems = []
    report = gpu_steps.measure_steps(None, lambda calls: {"seconds": 1e-3}, problems)
    assert report["walk"] == {"refused": "two megakernel launches differ"} and report["step_and_draft_seconds"] == 3e-3
    assert problems == [f"a rank's step, barriers, {way}: RuntimeError: a wait was given up"
                        for way in ("counter", "release flag")] and report["barrier_seconds"] is None


def test_a_switch_of_the_megakernel_stays_on_if_it_is_faster_and_makes_the_same_bits(monkeypatch):
    class Kernel:
        """A megakernel whose bits are spoiled by one switch."""

        def __init__(self, backend, program, programs, tuning=gpu_steps.Tuning()):  # noqa: B008 (frozen)
            self.tuning = tuning

        def run(self, step):
            return {"logits": torch.full((1,), float(self.tuning.ahead == 16384))}

        def failed(self):
            return False

    monkeypatch.setattr(gpu_steps, "Megakernel", Kernel)
    ready = SimpleNamespace(backend=None, program=None, step=lambda rows: None)
    seconds = iter([4.0, 3.0, 1.0, 2.0])
    problems, spare = [], iter([True, True, True, True])
    rows = gpu_steps.tune_megakernel(ready, 1, lambda _: {"seconds": next(seconds), "runs": []}, 3.5, problems,
                                     lambda: next(spare))
    assert [row["tuning"] for row in rows] == [
        {"release_flag": True, "ahead": 0, "packed": True}, {"release_flag": False, "ahead": 4096, "packed": True},
        {"release_flag": False, "ahead": 16384, "packed": True}, {"release_flag": False, "ahead": 4096, "packed": False}]
    assert [row["equal"] for row in rows] == [True, True, False, True] and len(problems) == 1 and "other bits" in problems[0]
    assert gpu_steps.tune_megakernel(ready, 1, None, 3.5, problems, lambda: False) == [] and "no time" in problems[-1]


def test_its_check_of_fake_quantization_is_green_and_red_on_another_rule(monkeypatch):
    assert gpu_steps.check_fake_quantize("cpu")["passed"]
    real = gpu_steps.fake_quantize_fused_
    monkeypatch.setattr(gpu_steps, "fake_quantize_fused_", lambda out, w, scale_rule: real(out, w, scale_rule="even"))
    assert not gpu_steps.check_fake_quantize("cpu")["passed"]


def test_a_rank_of_eight_is_a_model_with_an_eighth_of_every_shared_size():
    from modeling.published_geometries import released_config
    from runtime_ref.checkpoints.device_weights import layer_heads, layer_shapes
    from runtime_ref.core.tensor_parallel import SINGLE_RANK
    from runtime_ref.measure.gpu_suite.steps import projected, rank_config

    config = rank_config(released_config("MiMo-V2.5-Pro"), 8)
    heads = layer_heads(config, 0, SINGLE_RANK)
    assert (heads.queries, heads.keys, heads.d, heads.v) == (16, 1, 192, 128) and config.moe_intermediate_size == 256
    shapes = layer_shapes(config, 1, SINGLE_RANK, frozenset({"qkv"}))
    pages = sum(torch.Size(shapes[name][0]).numel() for name in ("up_pages", "down_pages"))
    assert pages == 384 * 3 * 6144 * 256 * 17 // 32
    assert projected(4.4e-3, 140)["tokens_per_second"]["5 us"] == pytest.approx(6.30 / (4.4e-3 + 140 * 5e-6))
    with pytest.raises(ValueError, match="expected a multiple of 7 ranks"):
        rank_config(released_config("MiMo-V2.5-Pro"), 7)


def test_a_part_begins_only_while_what_comes_after_it_still_fits(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu_plan.time, "monotonic", lambda: now[0])
    plan = gpu_plan.Plan()
    now[0] = gpu_plan.SECONDS - sum(gpu_plan.PARTS.values())
    assert plan.seconds_left() == 0 and plan.begins("experts", "experts") and plan.spares("experts", "a variant")
    now[0] += 1
    assert plan.begins("experts", "experts") and not plan.spares("experts", "a variant")
    now[0] += gpu_plan.PARTS["experts"]
    assert not plan.begins("quantize", "rounding") and plan.begins("steps", "a step") and plan.begins("engine", "tokens")
    now[0] = gpu_plan.SECONDS - 189
    assert plan.begins("steps", "a step") and not plan.begins("engine", "tokens") and plan.begins("peers", "peers")
    assert plan.skipped == ["a variant: no time", "rounding: no time", "tokens: no time"]
    alone = gpu_plan.Plan(["experts"])
    now[0] += gpu_plan.SECONDS - gpu_plan.PARTS["experts"]
    assert alone.begins("experts", "a variant") and not alone.begins("steps", "a step") and not alone.skipped
    with pytest.raises(ValueError, match="--only: 'expert', expected some of experts, quantize"):
        gpu_plan.Plan(["expert"])


def test_late_experts_measure_what_the_backends_launch_and_the_sweep(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_suite, "_random_pages", lambda *_: "pages")
    monkeypatch.setattr(gpu_suite, "_measure_torch", lambda *_: {})
    monkeypatch.setattr(gpu_suite, "_same_bits", lambda *_: True)
    monkeypatch.setattr(gpu_suite, "_measure_experts", lambda _, launch, tokens, read: {"seconds": 1.0, "failed": False})
    plan = gpu_plan.Plan()
    plan.end -= gpu_plan.SECONDS - 200
    report = gpu_suite.measure(plan, 2, None, {})
    assert len(report["experts"]) == 1 and len(report["sweep"]) == len(gpu_suite.SWEEP)
    assert len(plan.skipped) == len(gpu_checks.variants(2)) - 1


def test_the_parts_leave_two_minutes_for_the_checks():
    assert gpu_plan.SECONDS - sum(gpu_plan.PARTS.values()) >= 120 and gpu_plan.PARTS["engine"] >= 110


class Stub:
    """An engine that answers at once, and remembers what it was asked."""

    def __init__(self, wrong=(), failed=False):
        self.asked, self.failed, self.wrong, self.program = [], failed, wrong, None
        self.backend = SimpleNamespace(config=SimpleNamespace(vocab_size=256), runner=None)
        self.drafter = object()

    def generate(self, prompts, params):
        name = f"{'drafting' if params.speculate else 'plain'}, {'walked' if self.backend.runner else 'op by op'}"
        self.asked.append((name, tuple(prompts[0]), params.max_tokens))
        return [[7, 7, 8 if name in self.wrong else 7]]

    def stats(self):
        return {"acceptance_length": 2.0}


@pytest.fixture
def stubbed(monkeypatch):
    def measured(engine, left=lambda: 1.0, timeline=lambda call: call() and [["step_kernel", 0.0, 1.0]]):
        def from_folder(folder, backend, options, launch):
            assert (backend, launch) == ("triton", "ops") and not options.prefix_cache
            return engine

        def use_megakernel(engine, programs):
            engine.backend.runner = SimpleNamespace(failed=lambda: engine.failed)

        monkeypatch.setattr(gpu_engine.Engine, "from_folder", from_folder)
        monkeypatch.setattr(gpu_engine, "use_megakernel", use_megakernel)
        monkeypatch.setattr(gpu_engine, "timeline", timeline)
        problems = []
        return gpu_engine.measure_engine("folder", problems, left, tokens=3), problems

    return measured


def test_the_engine_is_timed_on_what_it_has_computed_before(stubbed):
    engine = Stub()
    report, problems = stubbed(engine)
    assert not problems and report["greedy_equal"] == {"op by op": True, "walked": True}
    assert len(report["tokens_per_second"]) == 4 and list(report["timeline"]) == ["op by op", "walked"]
    for name in report["tokens_per_second"]:
        own = [asked for asked in engine.asked if asked[0] == name]
        assert own[:2] == own[2:4] and len(set(own)) == 2, "the first pass is not the second"
        assert len(own) == 4 + ("drafting" in name)


@pytest.mark.parametrize("wrong, equal, alike", [
    ({"drafting, walked"}, {"op by op": True, "walked": False}, [3, 3]),
    ({"plain, walked", "drafting, walked"}, {"op by op": True, "walked": True}, [2, 2])])
def test_drafting_is_judged_within_its_way_and_the_ways_apart(stubbed, wrong, equal, alike):
    report, _ = stubbed(Stub(wrong))
    assert report["greedy_equal"] == equal and report["walked_as_op_by_op"] == alike


def test_a_wait_that_was_given_up_is_reported_and_takes_the_megakernels_speeds(stubbed):
    report, _ = stubbed(Stub(failed=True))
    assert report["failed"] == ["step"] and list(report["tokens_per_second"]) == ["plain, op by op", "drafting, op by op"]


def test_a_profiler_that_fails_takes_only_the_timeline(stubbed, monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", raising(RuntimeError("not permitted")))
    report, problems = stubbed(Stub(), timeline=gpu_engine.timeline)
    assert len(report["tokens_per_second"]) == 4 and report["timeline"] == {}
    assert problems == [f"the timeline, {way}: RuntimeError: not permitted" for way in ("op by op", "walked")]


def test_an_engine_that_is_late_or_has_no_megakernel_keeps_what_it_has(stubbed, monkeypatch):
    left = iter([1.0, 1.0, -1.0, -1.0])
    report, problems = stubbed(Stub(), lambda: next(left))
    assert list(report["greedy_equal"]) == ["op by op"]
    assert problems == ["the engine, plain, walked: no time", "the engine, drafting, walked: no time"]
    engine = Stub()
    engine.backend = SimpleNamespace(config=engine.backend.config, runner=None)
    monkeypatch.setattr(gpu_engine, "_measure_way", lambda *a, real=gpu_engine._measure_way: (
        raising(ValueError("norms of heads"))() if a[3] == "walked" else real(*a)))
    report, problems = stubbed(engine)
    assert problems == ["the engine, plain, walked: ValueError: norms of heads"]
    assert report["walked_as_op_by_op"] is None and len(report["tokens_per_second"]) == 2


def test_launches_are_counted_and_a_profiler_that_sees_none_counts_nothing(monkeypatch):
    import contextlib

    on_card = torch.autograd.DeviceType.CUDA
    names = []
    trace = SimpleNamespace(events=lambda: [SimpleNamespace(name=name, device_type=on_card) for name in names])
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(trace))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu_steps.count_launches(lambda: None) is None
    names += ["step_kernel", "Memcpy HtoD (Pageable -> Device)", "void at::hw_fp4::vectorized_elementwise_kernel<4>"]
    assert gpu_steps.count_launches(lambda: None) == 2
    monkeypatch.setattr(torch.profiler, "profile", raising(RuntimeError("not permitted")))
    assert gpu_steps.count_launches(lambda: None) is None
    step = STEP | {"walk": {"launches": 1}, "draft": {"launches": 1}, "verify": {"launches": 2}}
    assert gpu_page.launches({"step": step}) == 4 and gpu_page.launches({"step": STEP}) is None


def test_a_page_says_what_a_wrong_megakernel_is_and_gives_it_no_speed():
    report = dict.fromkeys(("device", "date", "torch", "triton", "python", "revision", "command"), "")
    report |= {"checks": [], "skipped": [], "refused": [], "complete": True, "step": STEP,
               "engine": ENGINE | {"failed": ["step"]}}
    words = gpu_page.page(report, None)
    assert "| verification, megakernel (**WRONG**: two megakernel launches differ) | not measured | not counted |" in words
    assert "**A wait was given up** by the megakernel of the step" in words
    goals = {what: found for what, found, *_ in gpu_page.goals(report)}
    assert goals["G3 launches of a step, its draft and verdict"] == "not measured"
