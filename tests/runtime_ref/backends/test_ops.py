"""The runtime's ops: row-invariant bit for bit, and equal to the model's own forward pass within rounding."""

import pytest
import torch
from tolerance import MODEL_FP32

from checkpoint.load import load_model
from modeling.drafter import load_drafter
from runtime_ref.backends.torch import ops, row_rules
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.checkpoints.folder import verify_checksums
from runtime_ref.checkpoints.load import load_target
from runtime_ref.core.batch import SequenceChunk
from runtime_ref.core.kv_cache import KvCache
from runtime_ref.core.program import check_program, target_program

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def weights(folder):
    return load_target(folder)


def new_backend(weights, dtype):
    return TorchBackend(weights, dtype=dtype, pages={"full": 40, "window": 40})


def computed(backend, program, ids, pieces, tables=None, cache=None):
    """Buffers' logits of `ids` computed in pieces of the given sizes."""
    cache = cache or KvCache(backend.pools)
    tables, found, at = tables or cache.tables(), [], 0
    for n in pieces:
        cache.extend(tables, list(tables), at + n)
        step = backend.plan([SequenceChunk(tables, at, ids[at:at + n])])
        found.append(backend.run(program, step)["logits"][:n])
        at += n
        cache.evict_outside_window(tables, dict.fromkeys(tables, at))
    cache.release(tables)
    return torch.cat(found)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 260, (200,), generator=torch.Generator().manual_seed(5)).tolist()


def test_logits_are_those_of_the_independent_model(folder, weights, ids):
    reference = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids])).logits[0]
    backend = new_backend(weights, torch.float32)
    torch.testing.assert_close(computed(backend, target_program(weights.config), ids, [200]), expected, **MODEL_FP32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", [[1] * 200, [8] * 25, [63, 1, 64, 72], [3, 5, 7, 100, 4, 81], [199, 1]])
def test_logits_do_not_depend_on_how_the_text_is_cut(weights, ids, dtype, pieces):
    backend, program = new_backend(weights, dtype), target_program(weights.config)
    assert torch.equal(computed(backend, program, ids, pieces), computed(backend, program, ids, [200]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_do_not_depend_on_other_rows(weights, ids, dtype):
    backend, program = new_backend(weights, dtype), target_program(weights.config)
    alone = computed(backend, program, ids, [100, 1, 7])
    cache = KvCache(backend.pools)
    texts = [ids[:100], ids[50:57], ids[60:129]]
    for order in ([0, 1, 2], [2, 0, 1]):
        chosen = [SequenceChunk(cache.tables(), 0, texts[i]) for i in order]
        for span in chosen:
            cache.extend(span.tables, list(span.tables), len(span.tokens))
        logits = backend.run(program, backend.plan(chosen))["logits"]
        mine = chosen[order.index(0)]
        assert torch.equal(logits[mine.row:mine.row + 100], alone[:100])
        for span in chosen:
            cache.release(span.tables)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 13, 24, 64, 100])
def test_every_op_gives_a_row_the_same_bits_in_any_position_and_batch(weights, dtype, rows):
    generator = torch.Generator().manual_seed(rows)
    rules = new_backend(weights, dtype).rules
    R = row_rules.padded(rows, rules)
    x = row_rules.rounded(torch.randn(8, 64, generator=generator), dtype)
    many = row_rules.rounded(torch.randn(R, 64, generator=generator) * 3, dtype)
    at = rows - 1
    many[at] = x[2]
    layer, config = weights.layers[1], weights.config
    dense = weights.layers[0].mlp

    def routed(y):
        index, weight = ops.route(y, layer.mlp, config, rules)
        return ops.run_experts(y, index, weight, layer.mlp.experts, y.shape[0], rules).transpose(0, 1)

    rowwise = {
        "norm": lambda y: ops.norm(y, layer.post_norm, 1e-5),
        "queries": lambda y: ops.spread(y, layer.attention.qk, rules).transpose(0, 1),
        "dense": lambda y: ops.dense_mlp(y, dense, rules).transpose(0, 1),
        "router": lambda y: ops.route(y, layer.mlp, config, rules)[1],
        "experts": routed,
        "head": lambda y: ops.head_logits(y, weights.head, weights.ranks, rules),
        "parts": lambda y: ops.add_parts(y, ops.dense_mlp(y, dense, rules), weights.ranks, dtype, rules)}
    for name, op in rowwise.items():
        assert torch.equal(op(many)[at], op(x)[2]), name


def test_eight_row_products_and_single_additions_give_the_bits_of_the_fast_ways(weights, ids):
    backend, program = new_backend(weights, torch.float32), target_program(weights.config)
    expected = computed(backend, program, ids, [200])
    backend.rules = row_rules.STRICT
    assert row_rules.padded(1, backend.rules) == 8
    assert torch.equal(computed(backend, program, ids, [100, 3, 97]), expected)


def test_two_models_in_one_process_keep_their_row_rules_and_bits(weights, ids, tmp_path, monkeypatch):
    """The other model's products are measured as loose where the first one's are strict, and the other way round."""
    from tests.runtime_ref.conftest import random_target, runtime_config, write_native

    other = load_target(write_native(tmp_path, random_target(runtime_config(hidden_size=96, sliding_window=32))))
    loose = row_rules.RowRules(wide=True, narrow=True, sums=True)

    def measured(strict: int):
        """Rules by the shape of a model's head: [8 parts, 64 or 96, 33]."""
        monkeypatch.setattr(row_rules, "probe_rows", lambda shapes: row_rules.STRICT if (8, strict, 33) in shapes else loose)

    def logits_of(backend):
        return computed(backend, target_program(backend.config), ids[:40], [29, 1, 10])

    for strict in (64, 96):
        measured(strict)
        alone = {w.config.hidden_size: logits_of(new_backend(w, torch.bfloat16)) for w in (weights, other)}
        backends = [new_backend(w, torch.bfloat16) for w in (weights, other)]
        for backend in (*backends, *reversed(backends)):
            H = backend.config.hidden_size
            assert backend.capabilities.row_multiple == (8 if H == strict else 4)
            assert torch.equal(logits_of(backend), alone[H])


def test_experts_decoded_every_time_give_the_bits_of_the_cache(folder, weights, ids):
    none = load_target(folder, decoded_bytes=0)
    backends = [new_backend(w, torch.bfloat16) for w in (weights, none)]
    first, second = (computed(b, target_program(weights.config), ids, [50]) for b in backends)
    assert torch.equal(first, second) and none.decoded.used == 0 and weights.decoded.used > 0


def test_packed_bytes_are_the_files_bytes(folder, weights):
    from checkpoint.tensor_files import TensorFiles
    files = TensorFiles(folder)
    packed = weights.layers[2].mlp.experts.matrices[5]
    for kind in ("gate", "up", "down"):
        name = f"model.layers.2.mlp.experts.5.{kind}_proj.weight"
        assert torch.equal(packed[kind].codes, files.read(name))
        assert torch.equal(packed[kind].scales, files.read(name + "_scale"))


def test_the_schedule_writes_before_it_reads_and_can_be_watched(weights, ids):
    program = target_program(weights.config, target_layers=[0, 3])
    check_program(program)
    with pytest.raises(AssertionError, match="was never written|never written"):
        check_program(program[1:])
    backend, seen = new_backend(weights, torch.float32), []
    cache = KvCache(backend.pools)
    tables = cache.tables()
    cache.extend(tables, list(tables), 8)
    step = backend.plan([SequenceChunk(tables, 0, ids[:8])])
    found = backend.run(program, step, watch=lambda op, buffers: seen.append(str(op)))
    assert len(seen) == len(program) and {"target_hidden.0", "target_hidden.3", "logits"} <= found.keys()


def test_drafts_are_those_of_the_drafter_model(folder, weights, ids):
    """Features of a text in pieces, then a block: against DFlashDraftModel on the whole text, in float32."""
    from runtime_ref.core.batch import DraftRequest

    backend = new_backend(weights, torch.float32)
    drafter = backend.load_drafter(folder / "dflash", 20, 256)
    reference, target = load_drafter(folder / "dflash", torch.float32), load_model(folder, dtype=torch.float32)
    cache = KvCache(backend.pools | {"draft": drafter.pool})
    tables, n = cache.tables(), 130
    with torch.no_grad():
        out = target.model(input_ids=torch.tensor([ids[:n]]), aux_layers=reference.target_layer_ids)
        target_hidden = torch.cat(out.aux_hidden_states, dim=-1)
        positions = torch.arange(n)[None]
        context = reference.context_keys_values(reference.fuse(target_hidden), positions)
        embeds = reference.embed_block(torch.tensor([ids[n]]), target.model.embed_tokens)
        hidden = reference.block_hidden(embeds, torch.arange(n, n + 8)[None], context, positions)
        expected = target.lm_head(hidden)[0, 1:]
    cache.extend(tables, ["draft"], n + 8)
    drafter.extend_tables(target_hidden[0, :n - 5], 0, tables["draft"])
    for count in (7, 3, 1):
        pending = target_hidden[0, n - 5:] if count == 7 else None
        found = drafter.logits([DraftRequest(tables, ids[n], n, count, pending)])[0]
        if count == 7:
            torch.testing.assert_close(found, expected, **MODEL_FP32)
        assert found.shape == (count, 264)


def test_checksums_find_a_changed_byte(folder, tmp_path):
    import hashlib
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(ValueError, match="no checksums.sha256"):
        verify_checksums(copy)
    file = copy / "model.safetensors"
    (copy / "checksums.sha256").write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  model.safetensors\n")
    verify_checksums(copy)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load_target(copy, checksum=True)
