"""Nothing is uploaded without --push; what a push does to a hub, and what is left when it fails, against a hub made here."""

import base64
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from toy_export import make_run

from checkpoint.verify import verify
from export.push import push

ROOT = Path(__file__).resolve().parents[2]


class Hub(http.server.ThreadingHTTPServer):
    """As much of a hub as an upload asks for: create, preupload, LFS batch and storage, commit. `fail`: path part -> status."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.private = None
        self.tokens: set[str | None] = set()
        self.fail: dict[str, int] = {}
        self.asked, self.stall = threading.Event(), None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        hub.tokens.add(self.headers.get("Authorization"))
        for part, status in hub.fail.items():
            if part in path:
                return self.answer({"error": f"no: {part}"}, status)
        if hub.stall and hub.stall in path:
            hub.asked.set()
            threading.Event().wait(120)
        if path == "/api/repos/create":
            asked = json.loads(body)
            hub.private = asked.get("private", asked.get("visibility") == "private")
            return self.answer({"url": f"{hub.url}/me/{asked['name']}", "name": f"me/{asked['name']}"})
        if "/preupload/" in path:
            return self.answer({"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".pt")) else "regular",
                 "shouldIgnore": False} for f in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer({"objects": [
                {**o, "actions": {"upload": {"href": f"{hub.url}/storage/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]]})
        if path.startswith("/storage/"):
            hub.objects[path.removeprefix("/storage/")] = body
            return self.answer({})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            return self.answer({"commitUrl": f"{hub.url}/me/toy/commit/1", "commitOid": "1", "hookOutput": "", "success": True})
        known = hub.private is not None  # created
        return self.answer({"siblings": [], "sha": "0", "id": "me/toy"} if known else {}, 200 if known else 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("push"), drafter=False)


def environment(hub, home: Path, token: str | None) -> dict:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return env | ({"HF_TOKEN": token} if token else {})


def command(recipe: Path, out: Path, *more) -> list[str]:
    return [sys.executable, str(ROOT / "export/to_hf.py"), str(recipe), "--out", str(out), *more]


def run(hub, recipe, out, *more, token="hf_secret"):
    return subprocess.run(command(recipe, out, *more), env=environment(hub, out.parent / "home", token), capture_output=True,
                          text=True)


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file()}


def test_without_the_flag_nobody_is_asked_anything(hub, recipe, tmp_path):
    done = run(hub, recipe, tmp_path / "out")
    assert done.returncode == 0 and (tmp_path / "out/config.json").is_file()
    assert hub.requests == []


def test_a_push_makes_a_private_repository_that_holds_exactly_the_folder(hub, recipe, tmp_path):
    done = run(hub, recipe, tmp_path / "out", "--push", "me/toy")
    assert done.returncode == 0, done.stderr
    assert hub.private is True and hub.tokens - {None} == {"Bearer hf_secret"}
    assert {n: hashlib.sha256(data).hexdigest() for n, data in hub.files.items()} == contents(tmp_path / "out")
    assert f"pushed {tmp_path / 'out'} to" in done.stdout


@pytest.fixture
def folder(hub, tmp_path, monkeypatch) -> Path:
    """A small folder, and this process's hub client pointed at `hub`."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = tmp_path / "model"
    (out / "dflash").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "dflash/config.json"):
        (out / name).write_bytes(name.encode())
    return out


@pytest.mark.parametrize("part, status", [("/api/repos/create", 401), ("/api/repos/create", 403), ("/preupload/", 404),
                                          ("/objects/batch", 413), ("/storage/", 403), ("/commit/", 412)])
def test_a_refused_push_says_so_in_one_line_and_keeps_the_folder(part, status, hub, folder):
    before = contents(folder)
    hub.fail[part] = status
    with pytest.raises(OSError, match=r"--push me/toy: .*is complete and verified on disk") as caught:
        push(folder, "me/toy")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value) and "hf_secret" not in str(caught.value)
    assert contents(folder) == before and not hub.files


def test_a_failed_push_succeeds_when_repeated(hub, folder):
    hub.fail["/commit/"] = 412
    with pytest.raises(OSError):
        push(folder, "me/toy")
    hub.fail.clear()
    push(folder, "me/toy")
    assert {n: hashlib.sha256(data).hexdigest() for n, data in hub.files.items()} == contents(folder)


def test_a_hub_that_is_not_there_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"--push me/toy: .*refused.*; .*is complete and verified on disk"):
        push(folder, "me/toy")


def test_an_interrupted_push_keeps_the_verified_folder_and_says_so_in_one_line(hub, recipe, tmp_path):
    hub.stall = "/preupload/"
    process = subprocess.Popen(command(recipe, tmp_path / "out", "--push", "me/toy"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=environment(hub, tmp_path / "home", "hf_secret"),
                               # a suite that a shell runs in the background hands on an ignored Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert hub.asked.wait(600)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: --push me/toy: interrupted; ")
    assert verify(tmp_path / "out").findings == [] and not hub.files


@pytest.mark.parametrize("name, token, message", [
    ("me/toy", None, "--push me/toy: no token for the hub; log in (`hf auth login`) or set HF_TOKEN"),
    ("a/b/c", "hf_secret", "expected name or organisation/name"),
])
def test_mistakes_are_found_before_anything_is_written(name, token, message, hub, recipe, tmp_path):
    done = run(hub, recipe, tmp_path / "out", "--push", name, token=token)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not hub.requests and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
