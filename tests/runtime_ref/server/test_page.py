"""The chat page, in headless Chromium: it asks, shows the answer, and colours what was drafted and accepted."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time

import pytest
from live_server import Hurry, live_server, wait_until

from runtime_ref.backends.base import Drafter
from runtime_ref.core.sampling_params import SamplingParams

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
QUESTION = "one & <b>two</b>"


class Browser:
    """A page of headless Chromium, driven over its debugging pipe (no network port, no driver to install)."""

    def __init__(self, profile, *more):
        self._read, theirs_out = os.pipe()
        theirs_in, self._write = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4.
        script = f"exec {CHROMIUM} --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe " \
                 f"--no-first-run --user-data-dir={profile} {' '.join(more)} about:blank 3<&{theirs_in} 4>&{theirs_out}"
        self.process = subprocess.Popen(["bash", "-c", script], pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest, self.session = 0, b"", None
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def command(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self):
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], 120)[0], "chromium does not answer"
            piece = os.read(self._read, 1 << 16)
            assert piece, "chromium has ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def run(self, script):
        found = self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, (condition, self.run("document.body.innerText"))
            time.sleep(0.05)

    def close(self):
        self.process.terminate()
        self.process.wait(60)
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with contextlib.closing(Browser(tmp_path_factory.mktemp("chromium"))) as found:
        yield found


@pytest.fixture(scope="module")
def expected(tokenizer, alone):
    """(prompt, greedy answer) of the question."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(text)
    return prompt, alone(prompt, SamplingParams(max_tokens=60))


class Knowing(Drafter):
    """Drafts that are right but for every fourth token of the answer, so that a known share is accepted."""

    block, target_layers = 8, []

    def __init__(self, answer, prompt_length, vocabulary):
        self.answer, self.begin, self.vocabulary = answer, prompt_length, vocabulary

    def logits(self, requests):
        import torch

        out = []
        for w in requests:
            rows = torch.zeros(w.count, self.vocabulary)
            for i in range(w.count):
                at = w.position - self.begin + 1 + i
                token = self.answer[at] if at < len(self.answer) and at % 4 else 1
                rows[i, token] = 5.0
            out.append(rows)
        return out


@pytest.fixture(scope="module")
def server(new_engine, tokenizer, preparing, expected):
    from runtime_ref.engine.engine import Engine

    plain = new_engine(drafter=False)
    prompt, answer = expected
    engine = Engine(plain.backend, Knowing(answer, len(prompt), 264), plain.options, end_ids=plain.end_ids, tokenizer=tokenizer)
    with live_server(engine, tokenizer, preparing) as found:
        yield found


def ask(browser, server, question, **fields):
    browser.command("Page.navigate", url=server.url)
    browser.until("document.getElementById('model')?.textContent === 'small'")
    for name, value in {"max": 60, **fields}.items():
        browser.run(f"document.getElementById('{name}').value = {json.dumps(value)}")
    browser.run(f"document.getElementById('text').value = {json.dumps(question)}; document.getElementById('send').click()")


def again(browser, question):
    browser.run(f"document.getElementById('text').value = {json.dumps(question)}; document.getElementById('send').click()")


def letters(text):
    """What Markdown shows as it is."""
    return [c for c in text if c.isalnum() or ord(c) > 127]


def test_the_page_shows_the_answer_and_colours_accepted_drafts(browser, server, tokenizer, expected):
    prompt, answer = expected
    ask(browser, server, QUESTION)
    browser.until("document.querySelector('.assistant')?.dataset.done === 'yes'")
    assert browser.run("document.querySelector('.user').textContent") == QUESTION
    assert browser.run("document.querySelectorAll('#talk b').length") == 0  # text stays text
    shown = browser.run("document.querySelector('.assistant .text').textContent")
    assert letters(shown) == letters(tokenizer.decode(answer, skip_special_tokens=True))
    coloured = browser.run("[...document.querySelectorAll('.accepted')].filter(e => e.closest('.assistant')).length")
    counts = server.worker.engine._counts
    assert 0 < coloured <= counts["accepted"]
    assert counts["accepted"] > counts["rounds"]
    length = float(browser.run("document.getElementById('length').value"))
    assert length == pytest.approx(1 + counts["accepted"] / counts["rounds"], abs=0.006)
    assert float(browser.run("document.getElementById('speed').value")) > 0


def test_a_servers_refusal_is_shown_and_stop_frees_the_slot(browser, server, monkeypatch):
    Hurry(server.worker.engine, monkeypatch, 0.5)  # or it ends before it is stopped
    ask(browser, server, "x", max=100000)
    browser.until("document.querySelector('.assistant.failed')?.textContent.includes('max_tokens')")
    aborted = server.worker.engine._counts["aborted"]
    ask(browser, server, "y " * 20, max=150)
    browser.until("document.getElementById('stop').hidden === false")
    wait_until(lambda: server.worker.engine.busy)
    browser.run("document.getElementById('stop').click()")
    server.until_empty()
    assert server.worker.engine._counts["aborted"] == aborted + 1


def history(browser):
    return browser.run("history.map(m => [m.role, m.content.length])")


def test_a_turn_that_failed_is_no_part_of_the_talk_and_the_next_one_is_answered(browser, server):
    ask(browser, server, "one", max=20)
    browser.until("document.querySelector('.assistant')?.dataset.done === 'yes'")
    before = history(browser)
    assert [role for role, _ in before] == ["user", "assistant"]
    again(browser, "x " * 3000)
    browser.until("document.querySelector('.turn.assistant.failed') && !abort")
    assert history(browser) == before
    assert browser.run("document.getElementById('text').value").startswith("x x x")  # to be mended and sent again
    again(browser, "two")
    browser.until("document.querySelectorAll('.assistant[data-done=yes]').length === 2 && !abort")
    assert [role for role, _ in history(browser)] == ["user", "assistant"] * 2


def test_an_answer_that_was_cut_says_so_and_what_is_drafted_by_default_is_seen(browser, server):
    ask(browser, server, QUESTION, max=20)
    browser.until("document.querySelector('.assistant')?.dataset.done === 'yes'")
    assert "cut off" in browser.run("document.querySelector('.note').textContent")
    assert browser.run("document.querySelectorAll('.text .accepted').length") > 0


def test_the_system_prompt_and_top_p_reach_the_server(browser, server, tokenizer):
    ask(browser, server, "one", max=8, system="be short", top_p="0.5", temperature="0.7")
    browser.until("document.querySelector('.assistant')?.dataset.done === 'yes'")
    assert browser.run("JSON.stringify(body('q')[1].messages[0])") == json.dumps(
        {"role": "system", "content": "be short"}, separators=(",", ":"))
    assert browser.run("body('q')[1].top_p") == 0.5


MARKDOWN = """# A <i>title</i>

Some **bold *and* more** and `co<b>de` [link](https://a.example/x) [bad](javascript:alert(1)) <img src=x onerror=alert(1)>

- one
  - in
- two

3. three

```python
a = "<script>"
```
| h | i |
|---|---|
| 1 | 2 |

> said \\*so\\*
<script>document.title = 'owned'</script>"""


def test_markdown_becomes_nodes_and_markup_stays_text(browser, server):
    ask(browser, server, "one", max=4)
    browser.until("document.querySelector('.assistant')?.dataset.done === 'yes'")
    browser.run(f"window.box = document.createElement('div'); document.body.append(box); "
                f"box.append(rendered({json.dumps(MARKDOWN)}, [[2, 5], [12, 30]]))")

    def found(selector):
        return browser.run(f"[...box.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")

    assert found("h1") == ["A <i>title</i>"] and found("strong") == ["bold and more"] and found("strong em") == ["and"]
    assert found("p > code") == ["co<b>de"] and found("a") == ["link"] and found("pre code") == ['a = "<script>"']
    assert found("ul > li > ul > li") == ["in"] and found("ol") == ["three"] and found("th, td") == [" h ", " i ", " 1 ", " 2 "]
    assert found("script, img, i, b, [onerror]") == [] and "javascript:alert(1)" in browser.run("box.textContent")
    assert "".join(found(".accepted")).startswith("A <") and browser.run("document.title") == "small"
    assert browser.run("box.querySelector('a').rel") == "noopener noreferrer"


@pytest.mark.parametrize("text", ["**", "```", "| a", "`", "[x](", "> ", "- ", "1. ", "\\", "<think>", "*" * 3000, "> " * 2000,
                                  "[" * 3000, "`" * 3001, "|" * 3000 + "\n" + "|-" * 1500, "# \n\n\n"])
def test_unfinished_and_absurd_markdown_neither_fails_nor_hangs(browser, server, text):
    if not browser.run("typeof rendered === 'function'"):
        ask(browser, server, "one", max=4)
    began = time.monotonic()
    browser.run(f"document.createElement('div').append(rendered({json.dumps(text)}, [[0, 1]]))")
    assert time.monotonic() - began < 20  # what is of the square of the length takes minutes


def test_a_page_that_smuggles_a_script_in_is_stopped_by_the_policy(browser, server):
    ask(browser, server, "one", max=4)
    browser.run("const s = document.createElement('script'); s.textContent = 'window.owned = 1'; document.body.append(s)")
    assert browser.run("typeof window.owned") == "undefined"


def elsewhere(browser, url):
    """Opens a page, and waits for it."""
    browser.command("Page.navigate", url=url)
    browser.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")


@pytest.fixture
def other_site(tmp_path):
    """A web server with an empty page, on another port and so of another origin."""
    import functools
    import http.server
    import threading

    (tmp_path / "index.html").write_text("<!doctype html><title>other</title>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}/"
        found.shutdown()


WAYS = {
    "no type": "{method: 'POST', mode: 'no-cors', body: new Blob([BODY])}",
    "text": "{method: 'POST', mode: 'no-cors', headers: {'Content-Type': 'text/plain'}, body: BODY}",
    "json, asking first": "{method: 'POST', headers: {'Content-Type': 'application/json'}, body: BODY}",
    "a form": "{method: 'POST', mode: 'no-cors', body: new URLSearchParams({a: BODY})}"}


@pytest.mark.parametrize("way", WAYS)
def test_a_page_of_another_origin_makes_no_token_and_reads_nothing(browser, server, other_site, way):
    elsewhere(browser, other_site)
    asked = server.worker.engine._counts["prompt_tokens"]
    body = json.dumps({"prompt": "x", "max_tokens": 4})
    read = browser.run(f"fetch('{server.url}/v1/completions', {WAYS[way].replace('BODY', json.dumps(body))})"
                       ".then(r => r.text(), e => 'refused')")
    assert read in ("", "refused")
    assert browser.run(f"fetch('{server.url}/v1/models').then(r => r.text(), e => 'refused')") == "refused"
    assert server.worker.engine._counts["prompt_tokens"] == asked


def test_a_page_that_is_allowed_reads_the_answer(browser, other_site, new_engine, tokenizer, preparing):
    from runtime_ref.server.access import AccessRules

    with live_server(new_engine(), tokenizer, preparing, access=AccessRules(origins=(other_site.rstrip("/"),))) as server:
        elsewhere(browser, other_site)
        answer = browser.run(f"fetch('{server.url}/v1/completions', {{method: 'POST', headers: {{'Content-Type': "
                             "'application/json'}, body: JSON.stringify({prompt: 'x', max_tokens: 4})}).then(r => r.json())")
        assert answer["usage"]["completion_tokens"] <= 4


def test_a_rebound_name_reads_nothing(server, tmp_path):
    port = server.url.rsplit(":", 1)[1]
    with contextlib.closing(Browser(tmp_path, "--host-resolver-rules='MAP evil.example 127.0.0.1'")) as found:
        elsewhere(found, f"http://evil.example:{port}/v1/models")
        text = found.run("document.body.innerText")
    assert "host_not_allowed" in text and "small" not in text
