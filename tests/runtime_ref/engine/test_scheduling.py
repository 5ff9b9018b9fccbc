"""Engine mechanics: pages, fairness, aborts, limits, text."""

import pytest
from pace import KERNELS

from runtime_ref.core.kv_cache import PAGE, KvCache, OutOfPages, Pool, extend_hashes
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.detokenizer import TextStream
from runtime_ref.engine.sequence import Finish

SHORT = SamplingParams(max_tokens=5, ignore_eos=True)


def pools(pages=8, window=PAGE):
    import torch

    return {"full": Pool({0: (1, 2, 2)}, pages, torch.float32, None),
            "window": Pool({1: (1, 2, 2)}, pages, torch.float32, window)}


def test_a_window_holds_a_constant_number_of_pages():
    cache = KvCache(pools())
    tables, most = cache.tables(), 0
    for length in range(1, 6 * PAGE):
        cache.extend(tables, ["window"], length + 8)
        most = max(most, cache.used()["window"])
        cache.evict_outside_window(tables, {"window": length})
    assert most <= 3
    cache.release(tables)
    assert cache.used() == {"full": 0, "window": 0}


def test_taking_more_pages_than_there_are_takes_none():
    cache = KvCache(pools(pages=2))
    tables = cache.tables()
    with pytest.raises(OutOfPages):
        cache.extend(tables, ["full", "window"], 3 * PAGE)
    assert cache.used() == {"full": 0, "window": 0} and tables["full"].pages == []


def test_prefixes_survive_their_sequence_and_give_way_when_pages_are_needed():
    cache = KvCache(pools(pages=3))
    tokens, hashes = list(range(2 * PAGE)), []
    extend_hashes(hashes, tokens)
    tables = cache.tables()
    cache.extend(tables, ["full", "window"], 2 * PAGE)
    for logical in (0, 1):
        cache.cache_page(tables, hashes, logical, ["full", "window"])
    cache.release(tables)
    assert cache.used() == {"full": 2, "window": 2}
    again = cache.tables()
    assert cache.match_prefix(again, hashes, ["full", "window"]) == 2 * PAGE
    assert again["full"].pages == [1, 2] and again["window"].first == 1
    cache.release(again)
    other = cache.tables()
    cache.extend(other, ["full"], 3 * PAGE)  # needs the pages that only the cache holds
    assert cache.match_prefix(cache.tables(), hashes, ["full"]) < 2 * PAGE


def test_hashes_depend_on_all_tokens_before():
    first, second = [], []
    extend_hashes(first, [1] + [0] * (2 * PAGE - 1))
    extend_hashes(second, [2] + [0] * (2 * PAGE - 1))
    assert len(first) == 2 and first[1] != second[1]


def test_a_long_prompt_does_not_stall_running_answers_nor_short_prompts(make_engine, prompts):
    engine = make_engine(rows=64, max_running=3, drafter=False, prefix_cache=False)
    running = engine.add(prompts[2], SamplingParams(max_tokens=30, ignore_eos=True))
    engine.step()
    long = engine.add((prompts[-1] * 5)[:300], SHORT)
    short = engine.add(prompts[1], SHORT)
    seen: dict[int, int] = {}
    for number in range(4):
        outputs = {o.id for o in engine.step()}
        assert running in outputs
        for i in outputs:
            seen.setdefault(i, number)
    assert seen[short] == 0 and long not in seen


@pytest.mark.skipif(KERNELS, reason="the scheduler's alone: runs with the default backend")
def test_a_sequence_that_comes_back_and_gets_one_row_emits_nothing_from_its_middle(make_engine, ids):
    """Eight sequences share eight rows and too few pages of the window: whoever is read again may get a single row."""
    prompts, long = [ids[20 * i:20 * i + 20] for i in range(8)], SamplingParams(max_tokens=100, ignore_eos=True)
    engine = make_engine(drafter=False, rows=8, max_running=8, prefix_cache=False, pages={"full": 100, "window": 11})
    plan, single = engine.scheduler.plan, []

    def planned():
        work = plan()
        single.extend(w for w in work if w.count == 1 and w.sequence.answered and w.sequence.waiting_tokens > 1)
        return work

    engine.scheduler.plan = planned
    assert engine.generate(prompts, long) == make_engine(drafter=False).generate(prompts, long)
    assert single and engine.stats()["preemptions"] > 0


def test_requests_beyond_the_limit_wait_in_order(make_engine, prompts):
    engine = make_engine(max_running=2, drafter=False)
    ids = [engine.add(p, SHORT) for p in prompts[:6]]
    assert engine.stats()["waiting"] == 6
    finished = []
    while engine.busy:
        finished += [o.id for o in engine.step() if o.finish]
        assert engine.stats()["running"] <= 2
    assert finished == ids


def test_an_abort_frees_everything_at_once_and_nobody_else_notices(make_engine, prompts):
    engine = make_engine(prefix_cache=False)
    alone = engine.generate([prompts[5]], SHORT)[0]
    victim, kept = engine.add(prompts[-1], SamplingParams(max_tokens=100, ignore_eos=True)), engine.add(prompts[5], SHORT)
    tokens = [t for o in engine.step() if o.id == kept for t in o.tokens]
    engine.abort(victim)
    engine.abort(victim)
    while engine.busy:
        for output in engine.step():
            assert output.id == kept
            tokens += output.tokens
    assert tokens == alone
    assert set(engine.stats()["pages"].values()) == {0} and engine.stats()["aborted"] == 1


def test_limits_are_refused_in_one_line(make_engine):
    engine = make_engine()
    beyond = engine.backend.config.vocab_size
    for prompt, params, named in (([], SHORT, "no tokens"), ([beyond], SHORT, f"token {beyond}"), ([-1], SHORT, "token -1"),
                                  ([1] * 600, SHORT, "600 tokens"), ([1], SamplingParams(stop=("x",)), "tokenizer")):
        with pytest.raises(ValueError, match=named):
            engine.add(prompt, params)
    assert not engine.busy


def test_answers_end_at_the_limit_at_an_end_token_and_within_a_round(make_engine, prompts):
    engine = make_engine()
    answer = engine.generate([prompts[4]], SamplingParams(max_tokens=20, ignore_eos=True))[0]
    for i in (0, 3, 11):
        first = answer.index(answer[i])
        request = engine.add(prompts[4], SamplingParams(max_tokens=20, ignore_eos=True, stop_ids=(answer[i],)))
        tokens, last = [], None
        while engine.busy:
            for last in engine.step():
                tokens += last.tokens
        assert (tokens, last.finish, last.id) == (answer[:first + 1], Finish.STOP, request)


def test_logprobs_belong_to_the_emitted_tokens(make_engine, prompts):
    found = {}
    for speculate in (False, True):
        engine = make_engine()
        engine.add(prompts[3], SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2, speculate=speculate))
        entries = []
        while engine.busy:
            for output in engine.step():
                assert [e.token for e in output.logprobs] == output.tokens
                entries += output.logprobs
        found[speculate] = [(e.token, e.logprob, e.top) for e in entries]
        assert all(e.top[0] == (e.token, e.logprob) for e in entries)
    assert found[False] == found[True]


@pytest.fixture(scope="module")
def tokenizer(folder):
    from checkpoint.load import load_tokenizer

    return load_tokenizer(folder)


@pytest.mark.parametrize("text", ["plain", "häß", "日本語 text", "a👍🏽b", "é" * 9])
def test_streamed_text_is_the_text_and_never_half_a_character(tokenizer, text):
    stream, pieces = TextStream(tokenizer), []
    for token in tokenizer.encode(text):
        pieces.append(stream.push(token))
        assert "\ufffd" not in pieces[-1]
    assert "".join(pieces) + stream.finish() == text


def test_broken_bytes_are_shown_in_the_end(tokenizer):
    stream = TextStream(tokenizer)
    broken = tokenizer.encode("é")[:1]
    assert stream.push(broken[0]) == "" and stream.finish() == "\ufffd"


@pytest.mark.parametrize("stop, shown", [(("END",), "one E two EN three "), (("two",), "one E "), (("zzz",), None)])
def test_stop_strings_end_the_text_before_them_and_their_beginnings_wait(tokenizer, stop, shown):
    text = "one E two EN three END four"
    stream, out = TextStream(tokenizer, stop), ""
    for token in tokenizer.encode(text):
        out += stream.push(token)
        assert text.startswith(out) and not any(s in out for s in stop)
        if stream.stopped:
            break
    out += stream.finish()
    assert out == (text if shown is None else shown) and stream.stopped == (shown is not None)


def test_a_stop_string_ends_an_answer(make_engine, tokenizer, prompts):
    engine = make_engine(tokenizer=tokenizer)
    text = ""
    engine.add(prompts[6], SamplingParams(max_tokens=60, ignore_eos=True))
    while engine.busy:
        text += "".join(o.text for o in engine.step())
    stop = text[5:8]
    engine.add(prompts[6], SamplingParams(max_tokens=60, ignore_eos=True, stop=(stop,)))
    cut, last = "", None
    while engine.busy:
        for last in engine.step():
            cut += last.text
    assert cut == text[:text.index(stop)] and last.finish == Finish.STOP
