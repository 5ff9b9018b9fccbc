"""Web pages and rebound names stay outside; the key and the options let in whom they name."""

import argparse
from pathlib import Path

import httpx
import pytest
from pace import seconds

from runtime_ref.serve import access_rules
from runtime_ref.server.access import AccessRules

ASK = {"prompt": "x", "max_tokens": 1}
WAIT = seconds(30)


def ask(server, **headers):
    return httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=WAIT,
                      headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "text/json",
                                  "multipart/form-data; boundary=x", "json"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_a_body_that_is_not_said_to_be_json_is_refused_unread(live, kind, path):
    """A page may send anything for which its browser need not ask first: no type, text, forms."""
    headers = {} if kind is None else {"Content-Type": kind}
    answer = httpx.post(live.url + path, content=b'{"prompt":"x","max_tokens":1}', headers=headers, timeout=seconds(30))
    assert answer.status_code == 415 and answer.json()["error"]["code"] == "unsupported_media_type"
    assert answer.headers["connection"] == "close"


def test_json_may_say_its_characters(live):
    answer = httpx.post(f"{live.url}/v1/completions", content=b'{"prompt":"x","max_tokens":1}', timeout=WAIT,
                        headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert answer.status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example",
                                  "evillocalhost", "127.0.0.1@evil.example", "0x7f.1", "", "[evil]", "gateway"])
@pytest.mark.parametrize("path", ["/v1/models", "/", "/health", "/metrics", "/none"])
def test_a_name_that_is_not_the_servers_reaches_nothing(live, host, path):
    answer = httpx.get(live.url + path, headers={"Host": host}, timeout=seconds(30))
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"
    assert "small" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "a.localhost", "127.0.0.1:80", "127.8.9.10", "[::1]:80",
                                  "10.0.0.7"])
def test_addresses_and_localhost_cannot_be_rebound(live, host):
    assert httpx.get(f"{live.url}/v1/models", headers={"Host": host}, timeout=seconds(30)).status_code == 200


FOREIGN = ["https://evil.example", "http://localhost:1", "http://127.0.0.1", "null", "", "file://", "http://a@127.0.0.1",
           "chrome-extension://abc"]


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_page_of_another_origin_is_refused_before_the_engine_hears_of_it(live, origin):
    asked = live.worker.engine._counts["prompt_tokens"]
    answer = ask(live, Origin=origin)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed"
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert live.worker.engine._counts["prompt_tokens"] == asked


def test_the_servers_own_page_and_a_browser_that_vouches_for_it_are_let_in(live):
    assert ask(live, Origin=live.url).status_code == 200
    assert ask(live, Origin="https://behind.a.proxy", Sec_Fetch_Site="same-origin").status_code == 200
    assert ask(live, Origin="https://evil.example", Sec_Fetch_Site="cross-site").status_code == 403


def test_a_page_that_is_allowed_may_ask_first_and_read_the_answer(serving):
    server = serving(access=AccessRules(api_key="k", origins=("https://ui.example",)))
    first = httpx.options(f"{server.url}/v1/chat/completions", headers={
        "Origin": "https://ui.example", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        "Access-Control-Request-Private-Network": "true"})
    assert first.status_code == 204 and first.content == b""
    assert first.headers["access-control-allow-origin"] == "https://ui.example" and "Origin" in first.headers["vary"]
    assert "x-stainless-os" in first.headers["access-control-allow-headers"]
    assert first.headers["access-control-allow-private-network"] == "true"
    answer = ask(server, Origin="https://UI.example", Authorization="Bearer k")
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://UI.example"
    refused = ask(server, Origin="https://ui.example")
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://ui.example"
    for origin in ("https://ui.example.evil", "http://ui.example", "https://ui.example:8443"):
        assert ask(server, Origin=origin, Authorization="Bearer k").status_code == 403


def test_a_preflight_of_a_page_that_is_not_allowed_is_refused(live):
    answer = httpx.options(f"{live.url}/v1/completions", headers={"Origin": "https://evil.example",
                                                                  "Access-Control-Request-Method": "POST"})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_every_page_may_ask_where_the_option_says_so(serving):
    server = serving(access=AccessRules(origins=("*",)))
    for origin in ("https://a.example", "null"):
        assert ask(server, Origin=origin).headers["access-control-allow-origin"] == "*"


def test_every_answer_has_a_number_of_the_client_or_a_new_one(live):
    assert ask(live, X_Request_Id="mine-7").headers["x-request-id"] == "mine-7"
    numbers = {httpx.get(f"{live.url}/none", timeout=seconds(30)).headers["x-request-id"] for _ in range(3)}
    assert len(numbers) == 3
    assert ask(live, X_Request_Id="x" * 200).headers["x-request-id"] != "x" * 200


def options(**changes):
    return argparse.Namespace(**{"api_key": None, "api_key_file": None, "host": "127.0.0.1", "allowed_host": [],
                                 "allow_origin": [], **changes})


@pytest.mark.parametrize("key", ["", " ", "\t\n", " k", "k\n", "a\x00b"])
@pytest.mark.parametrize("source", ["argument", "variable", "file"])
def test_a_key_that_is_empty_or_cannot_be_sent_is_a_mistake_and_not_an_open_server(key, source, monkeypatch, tmp_path):
    monkeypatch.delenv("FP4_DFLASH_API_KEY", raising=False)
    given = {}
    if source == "argument":
        given["api_key"] = key
    elif source == "file":
        if key.strip() and "\x00" not in key:
            pytest.skip("space around a file's text is not part of the key")
        given["api_key_file"] = tmp_path / "key"
        given["api_key_file"].write_text(key)
    elif "\x00" in key:
        pytest.skip("no variable can hold it")
    else:
        monkeypatch.setenv("FP4_DFLASH_API_KEY", key)
    with pytest.raises(ValueError, match="expected a key"):
        access_rules(options(**given))


def test_a_key_comes_from_the_argument_the_file_or_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("FP4_DFLASH_API_KEY", "v")
    (tmp_path / "key").write_text("f\n")
    assert access_rules(options()).api_key == "v"
    assert access_rules(options(api_key="a")).api_key == "a"
    assert access_rules(options(api_key_file=tmp_path / "key")).api_key == "f"
    with pytest.raises(ValueError, match="No such file"):
        access_rules(options(api_key_file=Path("/none/key")))


def test_beyond_loopback_names_are_checked_unless_a_key_does_it(monkeypatch):
    monkeypatch.delenv("FP4_DFLASH_API_KEY", raising=False)
    assert access_rules(options(host="0.0.0.0", api_key="k")).hosts is None
    assert access_rules(options(host="0.0.0.0", api_key="k", allowed_host=["llm.example"])).hosts is not None
    assert "llm.example" in access_rules(options(host="0.0.0.0", allowed_host=["LLM.example:443"])).hosts
    assert access_rules(options(host="127.0.0.1", api_key="k")).hosts == ()
    assert access_rules(options(host="0.0.0.0", allowed_host=["*"])).hosts is None
