"""Requests made from the published OpenAPI schema, right and wrong ones: no 5xx, no hang, no undocumented answer."""

import os

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from live_server import live_server
from pace import seconds
from schemathesis import GenerationMode
from schemathesis.checks import negative_data_rejection, positive_data_acceptance

POSTS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
# What a schema cannot say (the model's name, the length of the context) refuses many requests that fit it.
LEFT_OUT = [positive_data_acceptance]
LOAD = os.environ.get("FP4_LOAD") == "1"


@pytest.fixture(scope="module")
def small_context(new_engine, tokenizer, preparing):
    with live_server(new_engine(max_context=96), tokenizer, preparing, max_requests=4) as server:
        yield server


def ask(server, path, method, mode, count):
    """Sends `count` cases of an operation and checks each answer; returns the statuses."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation, statuses = schema[path][method], []

    @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body.pop("model", None)
        answer = case.call(timeout=seconds(60))
        statuses.append(answer.status_code)
        # 413 is a refusal too, though not on the tool's list: lists beyond their limits can be larger than any body may be.
        refused = [negative_data_rejection] if answer.status_code == 413 else []
        case.validate_response(answer, excluded_checks=LEFT_OUT + refused)
        assert answer.status_code < 500

    send()
    return statuses


def check(server, cases):
    statuses = {}
    for path in POSTS:
        for mode in GenerationMode:
            statuses[path, mode] = ask(server, path, "POST", mode, cases)
        assert statuses[path, GenerationMode.NEGATIVE].count(400) > len(statuses[path, GenerationMode.NEGATIVE]) / 2
    # The thirty cases of one path may all ask for more than the context holds; those of all paths never do.
    positive = [statuses[path, GenerationMode.POSITIVE] for path in POSTS]
    assert all(200 in found for found in positive) if cases > 100 else 200 in sum(positive, [])
    statuses["models"] = ask(server, "/v1/models/{name}", "GET", GenerationMode.POSITIVE, cases)
    assert set(server.until_empty(seconds(30)).values()) == {0}
    assert httpx.get(f"{server.url}/health", timeout=seconds(30)).status_code == 200
    return sum(map(len, statuses.values()))


def test_hundreds_of_generated_requests_never_break_the_server(small_context):
    assert check(small_context, 30) >= 200


@pytest.mark.load
@pytest.mark.skipif(not LOAD, reason="minutes of load: make test-load")
def test_five_thousand_generated_requests_never_break_the_server(small_context):
    assert check(small_context, 650) >= 5000
