"""A crowd of clients that ask, read for a while, and sometimes leave in the middle."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

import httpx
from pace import paced
from pace import seconds as limit

from runtime_ref.core.sampling_params import SamplingParams


@dataclass
class Report:
    finished: int = 0
    left: int = 0
    full: int = 0
    wrong: list = field(default_factory=list)
    unexpected: list = field(default_factory=list)
    answers: list = field(default_factory=list)  # (prompt, parameters, tokens)


def a_request(rng: random.Random) -> tuple[dict, SamplingParams]:
    tokens = rng.choice(paced((1, 3, 8, 20, 60), (1, 3, 8)))
    temperature, seed = rng.choice((0.0, 0.7, 1.2)), rng.randrange(4)
    shared = [9, 8, 7] * 25  # a beginning of more than a page, for the prefix cache
    prompt = (shared if rng.random() < 0.3 else []) + [rng.randrange(1, 250) for _ in range(rng.choice((1, 5, 30)))]
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": temperature, "seed": seed, "return_token_ids": True,
            "stream": rng.random() < 0.7, "speculate": rng.random() < 0.8}
    return body, SamplingParams(max_tokens=tokens, temperature=temperature, seed=seed)


async def one(client: httpx.AsyncClient, url: str, rng: random.Random, report: Report) -> None:
    body, params = a_request(rng)
    leaves = rng.choice((None, None, 0.0, 0.02, 0.2))
    tokens, ended = [], False
    try:
        async with asyncio.timeout(leaves if leaves is not None else limit(60)):
            async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                if answer.status_code == 429:
                    report.full += 1
                    await answer.aread()
                    await asyncio.sleep(0.1)
                    return
                if answer.status_code != 200:
                    report.unexpected.append((answer.status_code, await answer.aread()))
                    return
                if body["stream"]:
                    async for line in answer.aiter_lines():
                        ended = ended or line == "data: [DONE]"
                        if line.startswith("data: {"):
                            tokens += json.loads(line[6:])["choices"][0]["token_ids"]
                else:
                    tokens, ended = json.loads(await answer.aread())["choices"][0]["token_ids"], True
    except TimeoutError:
        if leaves is None:
            report.unexpected.append("no answer in a minute")
        report.left += 1
        return
    if not ended:
        report.unexpected.append("a stream without its end")
    report.finished += 1
    report.answers.append((body["prompt"], params, tokens))


async def crowd(url: str, alone, *, clients: int, seconds: float, seed: int, until=lambda report: True) -> Report:
    """Runs the clients, then compares every finished answer with the same request alone (`alone(prompt, params)`).

    Args:
        until: they go on, on a slow machine, until this is true of the report, for thirty times as long at most.
    """
    report, begun = Report(), time.monotonic()

    async def stay(number: int) -> None:
        rng = random.Random(1000 * seed + number)
        async with httpx.AsyncClient(timeout=limit(60)) as client:
            while (present := time.monotonic() - begun) < seconds or present < 30 * seconds and not until(report):
                await one(client, url, rng, report)

    await asyncio.gather(*(stay(i) for i in range(clients)))
    for prompt, params, tokens in report.answers:
        if alone(prompt, params) != tokens:
            report.wrong.append((prompt, params, tokens))
    return report
