"""Peers: what is measured of one, what is said of a wrong, raising or missing one, and that the adapters compute the layer.

The wheels are not needed: an adapter is given a stand-in that does what the peer documents of each call. Where a wheel is
importable, its own functions take the adapter's weights and calls.
"""

import copy
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from tolerance import EXPERTS_BF16, MODEL_FP32

from mxfp4 import dequantize
from runtime_ref.kernels.repack import Tile
from runtime_ref.measure.gpu_suite import checks as gpu_checks
from runtime_ref.measure.gpu_suite import peers
from runtime_ref.measure.gpu_suite.peer_flashinfer import FlashInfer
from tests.runtime_ref.kernels import expert_cases as cases
from tests.runtime_ref.kernels.at_once import INTERPRETED

E, H, I, A = 6, 128, 64, 2


@pytest.fixture(scope="module")
def weights():
    return cases.make_weights(0, E, H, I)


@pytest.fixture(scope="module")
def truth(weights):
    """(x, index, weight) -> float32, by the model's experts."""
    oracle = cases.oracle(weights)
    return lambda x, index, weight: oracle(x.float(), index.long(), weight)


def inputs_of(tokens: int) -> list:
    return [cases.make_tokens(tokens, seed, E, H, A) for seed in range(3)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


class Fake(peers.Peer):
    """A peer that is right, but for what `spoil` does to its result."""

    package, routed, timed = "torch", "counted", "everything"

    def __init__(self, spoil=lambda out: out, refuse=None, truth=None):
        self.spoil, self.refuse, self.truth = spoil, refuse, truth

    def prepare(self, gate_up, down, device):
        self.layer = gate_up, down

    def route(self, index):
        return index

    def compute(self, x, weight, routes):
        if self.refuse is not None and x.shape[0] == 4:
            raise self.refuse
        return self.spoil(self.truth(x, routes, weight)).to(torch.bfloat16)


def measured(weights, truth, *found) -> tuple[dict, list[int]]:
    """The report, and the numbers of calls that were timed."""
    timed = []

    def time_graph(calls):
        for call in calls:
            call()
        timed.append(len(calls))
        return {"seconds": 1e-3 / len(timed), "runs": []}

    return peers.measure_peers(*weights, inputs_of, (1, 4), time_graph, truth, list(found)), timed


def test_a_right_peer_is_measured_with_and_without_its_routing(weights, truth):
    peer = Fake(truth=truth)
    report, timed = measured(weights, truth, ("right", peer))
    row = report["right"]
    assert row["refused"] is None and row["version"].startswith("torch ") and timed == [3, 3, 3, 3]
    assert [check["tokens"] for check in row["checks"]] == [row["tokens"] for row in row["sweep"]] == [1, 4]
    assert all(check["error"] < peers.LIMIT for check in row["checks"])
    assert [row["seconds"] for row in row["sweep"]] == [1e-3, 1e-3 / 3] and row["sweep"][0]["routed"]["seconds"] == 1e-3 / 2
    assert not hasattr(peer, "layer"), "its weights are kept while the next peer is measured"


@pytest.mark.parametrize("spoil, words", [(lambda out: out * 1.1, "1 tokens: 1.0"), (lambda out: out / 0, "not finite"),
                                          (lambda out: out[:, :1], "expected [1, 128]")])
def test_a_wrong_peer_is_reported_and_not_timed(weights, truth, spoil, words):
    report, timed = measured(weights, truth, ("wrong", Fake(spoil, truth=truth)))
    assert words in report["wrong"]["refused"] and report["wrong"]["sweep"] == [] and timed == []


def test_only_the_second_call_wrong_is_wrong(weights, truth):
    calls = []

    def spoil(out):
        calls.append(out)
        return out if len(calls) % 2 else out * 2

    assert "wrong" in measured(weights, truth, ("worn", Fake(spoil, truth=truth)))[0]["worn"]["refused"]


@pytest.mark.parametrize("refuse", [RuntimeError("no kernel image"), AssertionError("column-major"), FileNotFoundError("nvcc")])
def test_a_raising_or_missing_peer_ends_only_itself(weights, truth, refuse):
    report, _ = measured(weights, truth, ("raises", Fake(refuse=refuse, truth=truth)), ("missing", "not importable: no x"),
                         ("right", Fake(truth=truth)))
    assert report["raises"]["refused"] == f"{type(refuse).__name__}: {refuse}" and report["raises"]["sweep"] == []
    assert report["missing"] == {"missing": "not importable: no x"}
    assert report["right"]["refused"] is None and len(report["right"]["sweep"]) == 2


def timed_out(weights, truth, found, clock) -> tuple[dict, list]:
    """The report of peers of which each call takes a second of the nine that there are, and the reports that were saved."""
    saved = []

    def slow(*inputs):
        clock[0] += 1
        return truth(*inputs)

    for _, peer in found:
        peer.truth = slow
    report = peers.measure_peers(*weights, inputs_of, (1, 4, 5), lambda calls: {"seconds": 1e-3}, truth, found,
                                 lambda: 9.0 - clock[0], lambda report: saved.append(copy.deepcopy(report)))
    return report, saved


def test_each_peer_has_its_share_of_the_time_and_says_what_it_did_not_come_to(weights, truth):
    """Two calls are compared per number of tokens, in 3.6 s by the first peer and in 4 s by the second."""
    report, saved = timed_out(weights, truth, [("one", Fake()), ("other", Fake())], [0])
    for row in report.values():
        assert [check["tokens"] for check in row["checks"]] == [timed["tokens"] for timed in row["sweep"]] == [1, 4]
        assert row["skipped"] == [5] and row["refused"] is None
    assert list(saved[0]) == ["one"] and list(saved[1]) == ["one", "other"] and saved[0]["one"] == report["one"]


def test_a_peer_without_any_time_is_not_prepared(weights, truth):
    class Never(Fake):
        def prepare(self, gate_up, down, device):
            pytest.fail("prepared")

    report, _ = timed_out(weights, truth, [("late", Never())], [9])
    assert report["late"]["skipped"] == [1, 4, 5] and report["late"]["sweep"] == report["late"]["checks"] == []


def test_the_reference_is_not_asked_where_no_peer_is(weights):
    assert peers.measure_peers(*weights, None, (1,), None, None, [("none", "why")]) == {"none": {"missing": "why"}}


def test_peers_that_are_not_installed_are_named_with_the_reason(monkeypatch):
    for name in ("triton_kernels", "triton_kernels.matmul", "humming", "flashinfer"):
        monkeypatch.setitem(sys.modules, name, None)
    found = dict(peers.available())
    assert found.keys() == {"triton_kernels, 4 warps", "triton_kernels, 8 warps", "humming", "flashinfer, SM90 CUTLASS"}
    assert all(reason.startswith("not importable: ") for reason in found.values()), found


def test_against_names_the_fastest_peer_of_each_number_of_tokens():
    found = {"a": {"sweep": [{"tokens": 1, "seconds": 3.0}, {"tokens": 8, "seconds": 5.0}]}, "missing": {"missing": "why"},
             "b": {"sweep": [{"tokens": 1, "seconds": 2.0}]}}
    own = [{"tokens": 1, "seconds": 1.0}, {"tokens": 8, "seconds": 4.0}, {"tokens": 64, "seconds": 9.0}]
    assert peers.against(own, found) == [
        {"tokens": 1, "seconds": 1.0, "peer": "b", "peer_seconds": 2.0, "ratio": 2.0},
        {"tokens": 8, "seconds": 4.0, "peer": "a", "peer_seconds": 5.0, "ratio": 1.25}]


@pytest.mark.parametrize("tile", [Tile(32, 128), Tile(128, 64), Tile(64, 128, hw_fp4=True)])
def test_a_checkpoints_layer_comes_back_from_its_pages(tile):
    weights = cases.make_weights(3, 3, 160, 96)
    found = peers.checkpoint_layer(cases.make_pages(weights, tile=tile))
    for given, back in zip(weights, found, strict=True):
        assert torch.equal(given[0], back[0]) and torch.equal(given[1].view(torch.uint8), back[1])


@pytest.mark.parametrize("tokens, choices, experts, block", [(1, 1, 1, 8), (9, 2, 5, 8), (64, 8, 12, 16), (7, 3, 384, 8)])
def test_aligned_slots_are_whole_blocks_of_one_expert_each_and_hold_every_choice_once(tokens, choices, experts, block):
    _, index, _ = cases.make_tokens(tokens, 1, max(experts, choices) + 1, 16, choices)
    index = index % experts
    slots, owner, used = peers.aligned_slots(index, experts, block)
    assert slots.dtype == owner.dtype == used.dtype == torch.int32 and used.dim() == 0 and int(used) % block == 0
    assert len(slots) == len(owner) * block >= int(used)
    chosen = index.flatten()
    for place, assignment in enumerate(slots.tolist()):
        assert assignment == chosen.numel() or chosen[assignment] == owner[place // block]
        assert place < int(used) or assignment == chosen.numel()
    assert sorted(slots[slots < chosen.numel()].tolist()) == list(range(chosen.numel()))
    assert int(used) == sum(-(-n // block) * block for n in torch.bincount(chosen.long()).tolist())


@pytest.mark.parametrize("tokens, hidden", [(1, 100), (5, 1024)])
def test_the_weighted_sum_is_torchs(tokens, hidden):
    rows = torch.randn(tokens * 3, hidden).to(torch.bfloat16)
    weight = torch.rand(tokens, 3)
    expected = (rows.view(tokens, 3, hidden).float() * weight[:, :, None]).sum(1)
    assert relative(peers.weighted_sum(rows, weight), expected) < EXPERTS_BF16


def stand_in_for_triton_kernels() -> SimpleNamespace:
    """Each call as the package documents it, in float32; layouts keep matrices as they are."""
    def matmul(a, b, bias, a_ragged_metadata, precision_config, gather_indx=None, scatter_indx=None, fused_activation=None):
        assert bias is None
        values = dequantize(b.mT, precision_config.b_mx_scale.mT, dtype=torch.float32)
        rows = a if gather_indx is None else a[gather_indx]
        out = torch.full((len(rows), values.shape[1]), float("nan"))
        start = 0
        for expert, count in enumerate(a_ragged_metadata.tolist()):
            out[start:start + count] = rows[start:start + count].float() @ values[expert].T
            start += count
        if fused_activation is not None:
            assert fused_activation.specs.fn is peers.silu_times and fused_activation.specs.reduction_n == 2
            out = torch.nn.functional.silu(out[:, 0::2]) * out[:, 1::2]
        out = out.to(precision_config.out_dtype)
        return out if scatter_indx is None else torch.empty_like(out).index_copy_(0, scatter_indx.long(), out)

    def topk(x, k, apply_softmax, y_indx):
        assert x.shape[0] == y_indx.shape[0] and k == y_indx.shape[1] and not apply_softmax
        return SimpleNamespace(mask_metadata=SimpleNamespace(
            col_sum=torch.bincount(y_indx.flatten().long(), minlength=x.shape[1]).int(),
            col_sorted_indx=y_indx.flatten().argsort(stable=True).int()))

    layout = SimpleNamespace(make_default_matmul_mxfp4_w_layout=lambda mx_axis: None,
                             make_default_matmul_mxfp4_w_scale_layout=lambda mx_axis, num_warps: None)
    return SimpleNamespace(
        matmul=matmul, topk=topk, layout=layout, ragged=lambda sizes, rows: sizes, FP4="fp4",
        wrap=lambda tensor, dtype=None: tensor, convert_layout=lambda tensor, layout: tensor,
        PrecisionConfig=SimpleNamespace, FusedActivation=lambda specs, arguments: SimpleNamespace(specs=specs),
        FnSpecs=lambda name, fn, arguments, reduction_n: SimpleNamespace(fn=fn, reduction_n=reduction_n))


def stand_in_for_humming(tall=(8, 16)) -> SimpleNamespace:
    """Its indexed product: block b of `sorted_ids` is of expert `expert_ids[b]`, row r of the result is of row r / top_k."""
    calls = []

    def transform(tensors, **sizes):
        codes, scales = tensors["weight"].view(torch.uint8), tensors["weight_scale"].view(torch.uint8)
        assert (sizes["num_experts"], sizes["shape_n"], sizes["shape_k"] // 2) == codes.shape
        return sizes["shape_k"], {"weight": dequantize(codes, scales, dtype=torch.float32), "weight_scale": None}

    def heuristics(config, shape_m, device, gemm_type):
        return {"block_shape": (tall[config == I], 128, 64)}

    def forward(config, inputs, weight, weight_scale, **call):
        calls.append({"config": config, "inputs": inputs, "weight": weight, "weight_scale": weight_scale} | call)
        outputs, rows = call["outputs"].fill_(float("nan")), tall[config == I]
        assert outputs.shape[0] == inputs.shape[0] * call["top_k"] == call["valid_shape_m"]
        for block in range(int(call["num_tokens_padded"]) // rows):
            for row in call["sorted_ids"][block * rows:(block + 1) * rows].tolist():
                if row < outputs.shape[0]:
                    outputs[row] = inputs[row // call["top_k"]].float() @ weight[call["expert_ids"][block]].T
        return outputs

    def process_input(inputs, activation_type, activation_impl):
        assert activation_type == "binary_split" and activation_impl == "a / (1.0f + __expf(-a)) * b"
        gate, up = inputs.float().chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up).to(inputs.dtype), None, None

    return SimpleNamespace(transform=transform, heuristics=heuristics, forward=forward, calls=calls,
                           Schema=lambda **options: options, ops=SimpleNamespace(process_input=process_input),
                           dtypes=SimpleNamespace(float4e2m1="e2m1", float8e8m0="e8m0"))


def stand_in_for_flashinfer() -> SimpleNamespace:
    """Its fused call: up rows first; a layout keeps bytes and forgets shapes."""
    def scales(raw, group_size):
        assert group_size == 32 and raw.dtype is torch.uint8
        return raw.flatten(1)

    def experts(input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights, output_dtype,
                quant_scales, use_w4_group_scaling, output):
        assert use_w4_group_scaling and output.dtype is output_dtype is torch.bfloat16
        assert token_selected_experts.dtype is torch.int32 and all(s.dtype is torch.int32 for s in quant_scales)
        up_gate, down = (dequantize(w, s.view(torch.uint8).view(*w.shape[:2], -1), dtype=torch.float32)
                         for w, s in zip((fc1_expert_weights, fc2_expert_weights), quant_scales, strict=True))
        for t, (own, share) in enumerate(zip(token_selected_experts.tolist(), token_final_scales, strict=True)):
            total = torch.zeros(input.shape[1])
            for expert, part in zip(own, share, strict=True):
                up, gate = (up_gate[expert] @ input[t].float()).chunk(2)
                total += part * (down[expert] @ (torch.nn.functional.silu(gate) * up))
            output[t] = total

    return SimpleNamespace(experts=experts, scales=scales, weights=lambda raw, kind: raw if kind == "fp4" else None)


@pytest.mark.parametrize("tokens", [1, 9, 63])
@pytest.mark.parametrize("make", [lambda: peers.TritonKernels(4, stand_in_for_triton_kernels()),
                                  lambda: peers.Humming(stand_in_for_humming()),
                                  lambda: FlashInfer(stand_in_for_flashinfer())],
                         ids=["triton_kernels", "humming", "flashinfer"])
def test_an_adapter_computes_the_layer(weights, truth, make, tokens):
    peer = make()
    peer.prepare(*weights, "cpu")
    inputs = cases.make_tokens(tokens, 5, E, H, A)
    assert relative(peer.call(*inputs), truth(*inputs)) < EXPERTS_BF16


def test_the_suites_reference_judges_a_peer_on_the_pages_it_was_given():
    pages = cases.make_pages(cases.make_weights(1, E, H, I), tile=Tile(32, 64))
    peer = peers.Humming(stand_in_for_humming())
    peer.prepare(*peers.checkpoint_layer(pages), "cpu")
    inputs = cases.make_tokens(7, 2, E, H, A)
    assert relative(peer.call(*inputs), gpu_checks.reference(*inputs, pages)) < EXPERTS_BF16


@pytest.fixture
def triton_kernels(monkeypatch):
    """The package's names, laying weights out as for a Hopper GPU."""
    try:
        names = peers.import_triton_kernels()
    except ImportError as error:
        pytest.skip(f"triton_kernels is not importable: {error}")
    monkeypatch.setattr(names.layout, "cuda_capability_geq", lambda major, minor=0: (major, minor) <= (9, 0))
    return names


@pytest.mark.parametrize("warps", peers.TritonKernels.WARPS)
def test_triton_kernels_layouts_hold_the_layers_weights(triton_kernels, weights, warps):
    from triton_kernels.numerics_details.mxfp import upcast_from_mxfp_torch

    peer = peers.TritonKernels(warps, triton_kernels)
    peer.prepare(*weights, "cpu")
    plain = triton_kernels.layout.StridedLayout(-2)
    found = []
    for values, precision in (peer.layer.up, peer.layer.down):
        codes, scales = (triton_kernels.convert_layout(t, plain).storage.data for t in (values, precision.b_mx_scale))
        found.append(upcast_from_mxfp_torch(codes, scales, torch.float32, axis=1).mT)
    gate_up, down = (dequantize(*w, dtype=torch.float32) for w in weights)
    torch.testing.assert_close(found[0].unflatten(1, (I, 2)).transpose(1, 2).flatten(1, 2), gate_up, **MODEL_FP32)
    torch.testing.assert_close(found[1], down, **MODEL_FP32)


@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here: make test-kernels")
def test_every_kernel_of_triton_kernels_call_compiles_for_a_hopper_gpu(triton_kernels, monkeypatch):
    """The adapter's own call, with the suite's widths; launches compile and end there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    device = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 90,
                             get_current_stream=lambda device: 0)
    card = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    launch, compiled = JITFunction.run, {}

    def compile_only(self, *arguments, grid, warmup, **options):
        compiled[self.__name__] = launch(self, *arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr(driver, "_active", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    monkeypatch.setattr(JITFunction, "run", compile_only)
    peer = peers.TritonKernels(4, triton_kernels)
    peer.prepare(*((torch.zeros(8, n, k // 2, dtype=torch.uint8), torch.zeros(8, n, k // 32, dtype=torch.uint8))
                   for n, k in ((512, 6144), (6144, 256))), "cpu")
    index, weight = torch.zeros(8, 8, dtype=torch.int32), torch.zeros(8, 8)
    out = peer.call(torch.zeros(8, 6144, dtype=torch.bfloat16), index, weight)
    assert out.shape == (8, 6144) and out.dtype is torch.bfloat16
    assert {"_topk_forward", "_matmul", "weighted_sum_kernel"} <= compiled.keys()
    assert "wgmma.mma_async" in compiled["_matmul"].asm["ptx"]


def test_humming_takes_the_adapters_arguments(weights):
    try:
        names = peers.import_humming()
    except (ImportError, OSError) as error:
        pytest.skip(f"humming is not importable: {error}")
    stand_in = stand_in_for_humming()
    peer = peers.Humming(stand_in)
    peer.prepare(*weights, "cpu")
    peer.call(*cases.make_tokens(3, 0, E, H, A))
    assert len(stand_in.calls) == 2
    for call in stand_in.calls:
        inspect.signature(names.forward).bind(**call)
    inspect.signature(names.heuristics).bind(None, shape_m=8, device=None, gemm_type="indexed")
    inspect.signature(names.ops.process_input).bind(None, activation_type="binary_split", activation_impl="a")
    inspect.signature(names.transform).bind({}, shape_n=1, shape_k=1, weight_schema=None, num_experts=1, torch_dtype=None,
                                            device=None)
    schema = names.Schema(b_dtype=names.dtypes.float4e2m1, bs_dtype=names.dtypes.float8e8m0, weight_scale_group_size=32)
    (codes, scales), n = weights[0], 2 * I
    held = {"weight": codes.view(torch.int32), "weight_scale": scales.view(torch.float8_e8m0fnu)}
    schema.validate_tensors(held, shape_n=n, shape_k=H, num_experts=E, param_dtype=torch.bfloat16, has_bias=False)
