"""Servers in this process on the small exported folder, and what their answers must be."""

import contextlib
import shutil
from pathlib import Path

import pytest
from live_server import MODEL, live_server
from pace import seconds

from checkpoint.load import load_tokenizer
from runtime_ref.engine.engine import Engine, EngineOptions
from runtime_ref.server.request_workers import RequestWorkers
from tests.runtime_ref.conftest import BACKEND

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def chat_folder(folder, tmp_path_factory) -> Path:
    """The small folder with the chat template of the embedded model."""
    out = tmp_path_factory.mktemp("chat") / MODEL
    shutil.copytree(folder, out)
    shutil.copy(ROOT / "recipes" / "seed" / "model" / "chat_template.jinja", out)
    return out


@pytest.fixture(scope="session")
def tokenizer(chat_folder):
    return load_tokenizer(chat_folder)


@pytest.fixture(scope="session")
def new_engine(chat_folder, tokenizer):
    def make(*, drafter: bool = True, **options):
        return Engine.from_folder(chat_folder, drafter=drafter, tokenizer=tokenizer,
                                  options=EngineOptions(**{"max_context": 256, **options}), **BACKEND)

    return make


@pytest.fixture(scope="session")
def alone(new_engine):
    """Generates one answer at a time, without drafts: what every other way of asking has to equal."""
    engine = new_engine(drafter=False)

    def generate(prompt, params):
        return engine.generate([prompt], params)[0]

    return generate


@pytest.fixture(scope="session")
def preparing(chat_folder):
    """Request workers for all servers of the session."""
    with contextlib.closing(RequestWorkers(chat_folder)) as workers:
        yield workers


@pytest.fixture(scope="session")
def live(new_engine, tokenizer, preparing):
    with live_server(new_engine(), tokenizer, preparing, body_bytes=200_000) as server:
        yield server


@pytest.fixture
def serving(new_engine, tokenizer, preparing):
    """Starts a server of its own for a test that breaks it."""
    with contextlib.ExitStack() as stack:
        def start(engine=None, **settings):
            options = {k: settings.pop(k) for k in list(settings) if k in EngineOptions.__dataclass_fields__}
            workers = settings.pop("preparing", preparing)
            return stack.enter_context(live_server(engine or new_engine(**options), tokenizer, workers, **settings))

        yield start


@pytest.fixture(scope="session")
def client(live):
    import openai

    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=seconds(60))
