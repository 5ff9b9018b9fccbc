"""Bugs that running engines had with drafters and sampling, injected into the runtime: found, and named.

Each is a published one: noise of the draft used again for its replacement, a split schedule made for another length, context
keys of long prompts at wrong positions, positions beyond the trained length, windows ignored, a prefix-cache hit without
features, a quantized drafter bypassed, the capture offset, padded rows taken for tokens.
"""

import dataclasses

import pytest
import torch
from pace import KERNELS
from wrong_folders import drafter, judged

from runtime_ref.backends.torch.drafter import TorchDrafter as Drafter
from runtime_ref.core.kv_cache import PAGE, KvCache
from runtime_ref.engine import speculative
from runtime_ref.validation.checks import sampling

pytestmark = pytest.mark.skipif(KERNELS, reason="of the torch drafter and the sampler on the host")


def made(change):
    """A drafter changed after it was made."""
    def inject(patch, folder):
        right = Drafter.__init__

        def wrong(self, model, *more):
            right(self, model, *more)
            change(self, model)

        patch.setattr(Drafter, "__init__", wrong)

    return inject


def stale(patch, folder):
    """The four newest context keys are not seen."""
    right = Drafter._metadata

    def wrong(self, requests, positions, T):
        found = right(self, requests, positions, T)
        first = self.pool.first_needed(requests[0].position)
        keys = first * PAGE + torch.arange(found.attention.hidden.shape[1] * PAGE).view(1, -1, 1, PAGE)
        late = (keys >= requests[0].position - 4) & (keys < requests[0].position)
        found.attention.hidden.masked_fill_(late, float("-inf"))
        return found

    patch.setattr(Drafter, "_metadata", wrong)


def chunked(patch, folder):
    right = Drafter.extend
    patch.setattr(Drafter, "extend", lambda self, target_hidden, positions, slots: right(
        self, target_hidden, [p % 32 for p in positions], slots))


def clamped(patch, folder):
    drafter({"max_position_embeddings": 48})(folder)

    def change(self, model):
        right = self.rotary.rows
        self.rotary.rows = lambda positions, longest: right(positions.clamp_max(47), min(longest, 47))

    made(change)(patch, folder)


def no_window(self, model):
    self.window = None


def raw_slice(self, model):
    width = self.context_v.shape[0] // len(model.layers)
    for i, layer in enumerate(model.layers):
        a = layer.self_attn
        top = max(float(p.weight.abs().max()) for p in (a.q_proj, a.k_proj, a.v_proj))
        self.context_v[i * width:(i + 1) * width] *= 448 / top


def capture(self, model):
    self.target_layers = [min(i + 1, self.backend.config.num_hidden_layers - 1) for i in self.target_layers]


def padded(patch, folder):
    """Features are filled up to whole eights, and the position runs on."""
    right = Drafter.logits

    def wrong(self, requests):
        requests = list(requests)
        for i, w in enumerate(requests):
            if w.target_hidden is None or not w.target_hidden.shape[0]:
                pad = -w.position % 8
                last = getattr(self, "last_features", None)
                requests[i] = dataclasses.replace(w, target_hidden=last.expand(pad, -1) if pad else None,
                                                position=w.position + pad)
        return right(self, requests)

    extend = Drafter.extend

    def seen(self, target_hidden, positions, slots):
        self.last_features = target_hidden[-1:]
        extend(self, target_hidden, positions, slots)

    patch.setattr(Drafter, "extend", seen)
    patch.setattr(Drafter, "logits", wrong)


def hit_without_features(patch, folder):
    right = KvCache.match_prefix

    def wrong(self, tables, hashes, kinds):
        count = right(self, tables, hashes, kinds)
        if count and "draft" in kinds:
            pool = self.pools["draft"]
            for page in tables["draft"].pages:
                for store in (*pool.keys.values(), *pool.values.values()):
                    store[:, page * PAGE:(page + 1) * PAGE] = 0
        return count

    patch.setattr(KvCache, "match_prefix", wrong)


WRONG_ENGINES = {
    "stale split schedule": (stale, "split schedule"), "chunks restart": (chunked, "positions restart in each chunk"),
    "beyond the trained length": (clamped, "trained length"), "windows ignored": (made(no_window), "whole context"),
    "raw slice of qkv": (made(raw_slice), "bypassed"), "capture offset": (made(capture), "capture offset"),
    "padded rows": (padded, "padded rows"), "hit without features": (hit_without_features, "prefix-cache hit"),
}


@pytest.mark.parametrize("bug", WRONG_ENGINES)
def test_an_engine_that_feeds_its_drafter_wrongly_is_named(copied, tmp_path, capsys, monkeypatch, bug):
    inject, cause = WRONG_ENGINES[bug]
    inject(monkeypatch, copied)
    code, verdict = judged(copied, tmp_path, capsys, "--backend", "torch")
    assert code == 1
    assert any(cause in c and "the runtime" in c for c in verdict["causes"]), [c["findings"] for c in verdict["checks"]]


def noise(change):
    """Another random number for a purpose: change(right, seed, position, purpose)."""
    def inject(patch):
        right = speculative.uniform
        patch.setattr(speculative, "uniform", lambda *call: change(right, *call))

    return inject


def rejected(change):
    """A round whose draft the rule rejects emits change(draft, logits, params, position), or what it would have (None)."""
    def inject(patch):
        right = speculative.accept

        def wrong(logits, proposal, params, position, prompt, answer):
            result = right(logits, proposal, params, position, prompt, answer)
            if result.accepted:
                return result
            token = change(proposal, logits[0], params, position)
            return result if token is None else dataclasses.replace(result, tokens=[token])

        patch.setattr(speculative, "accept", wrong)

    return inject


def lax(proposal, logits, params, position):
    """Eight rejected drafts in a hundred are kept: about three points of all."""
    return proposal.tokens[0] if speculative.uniform(params.seed, position, "a coin of the bug") < 0.08 else None


def from_the_target(proposal, logits, params, position):
    return None if proposal.q is None else speculative.sample(logits, params, position + 1, [], [])


WRONG_RULES = {
    "noise of the draft again": (noise(lambda right, seed, where, purpose: right(
        seed, where, "draft" if purpose == "token" else purpose)), "draft noise is reused"),
    "one number for draft and acceptance": (noise(lambda right, seed, where, purpose: right(
        seed, where, "draft" if purpose == "accept" else purpose)), "with the random number that drew it"),
    "ten per cent too often": (noise(lambda right, seed, where, purpose: right(seed, where, purpose) * (
        0.9 if purpose == "accept" else 1)), "accepted too often"),
    "three points too often": (rejected(lax), "accepted too often"),
    "a replacement from the target": (rejected(from_the_target), "not of max(p - q, 0)"),
}


@pytest.fixture
def engine(make_engine, monkeypatch):
    monkeypatch.setattr(sampling, "TEMPERATURES", (1.0,))
    return make_engine()


@pytest.fixture
def some(engine):
    from runtime_ref.validation.checks.decoding import read_prompts

    return read_prompts(None, None, engine.backend.config.vocab_size, per_domain=2, longest=64)


def sampled(engine, prompts):
    from runtime_ref.validation.result import Check

    check = Check("sampling", "")
    sampling.check_sampler(check, engine, prompts)
    return check


@pytest.mark.parametrize("bug", WRONG_RULES)
def test_a_biased_rule_is_found_and_named(engine, some, monkeypatch, bug):
    inject, cause = WRONG_RULES[bug]
    inject(monkeypatch)
    check = sampled(engine, some)
    assert check.status == "failed" and any(cause in c for c in check.causes), (check.causes, check.findings)


def test_the_right_rules_pass(engine, some):
    check = sampled(engine, some)
    assert check.status == "passed" and not check.notes, check.findings
    assert all(row[2] == row[3] == sampling.ROUNDS for row in check.tables["sampling: both rules"][1:])


def test_a_rule_with_other_random_numbers_is_right(engine, some, monkeypatch):
    noise(lambda right, seed, where, purpose: right(seed + 10**6, where, purpose))(monkeypatch)
    check = sampled(engine, some)
    assert check.status == "passed" and any("not the reference's" in n for n in check.notes)


def test_a_bias_of_three_points_shows_in_the_draws_that_are_made():
    """The statistics alone, of 200 repetitions: a rule that accepts 63 of 100 instead of 60 is found, the right one never."""
    p = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    wrong = torch.tensor([0.63, 0.23, 0.095, 0.045], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def z(q):
        drawn = torch.multinomial(q.float(), sampling.ENGINE_DRAWS, replacement=True, generator=generator)
        return sampling.chi_square_z(torch.bincount(drawn, minlength=4).double(), p)

    assert sum(z(wrong) > sampling.CHI_SQUARE_Z for _ in range(200)) >= 198
    assert not any(z(p) > sampling.CHI_SQUARE_Z for _ in range(200))
