"""Answers of the target from an OpenAI-compatible server of it, as the tokens that it sampled.

Text is not enough: special tokens are usually stripped from it, and tokenizing it again gives other tokens than were said.
So token ids are asked for (`return_token_ids`, which vLLM, SGLang and this project's server know); a server that does not
give them is told so once, and its text is tokenized.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from dflash_train.target import TargetFiles
from modeling.dialogue_tokens import end_token
from recipes.schema import Regenerate

ATTEMPTS = 5
KEY_VARIABLE = "OPENAI_API_KEY"
NAME = "dflash.regenerate.endpoint"


class Endpoint:
    """One server. Safe to use from several threads."""

    def __init__(self, settings: Regenerate, target: TargetFiles, say: Callable[[str], None] = print):
        """
        Raises:
            OSError: the server does not answer, refuses, or serves several models and `endpoint_model` names none.
        """
        self.url, self.target, self.say = settings.endpoint.rstrip("/"), target, say
        self.model = settings.endpoint_model or self._only_model()
        say(f"{NAME}: {self.url} serves {self.model}; that its weights are the target's is not checked here "
            "(runtime_ref/validate.py --endpoint does)")
        self._warned = False

    def answer(self, prompt: list[int], temperature: float, limit: int, seed: int) -> list[int]:
        """Token ids of one answer of at most `limit` tokens.

        Raises:
            OSError: no usable answer after several attempts; what was answered before is kept by the caller.
        """
        body = {"model": self.model, "prompt": prompt, "temperature": temperature, "max_tokens": limit, "seed": seed,
                "return_token_ids": True, "skip_special_tokens": False}
        return self._repeated("/completions", body, lambda reply: self._tokens(reply, limit))

    def _only_model(self) -> str:
        names = self._repeated("/models", None, lambda reply: [str(entry["id"]) for entry in reply["data"]])
        if len(names) != 1:
            raise OSError(f"{NAME}: {self.url} serves {', '.join(names) or 'no model'}; expected one of them as "
                          "dflash.regenerate.endpoint_model")
        return names[0]

    def _tokens(self, reply: dict, limit: int) -> list[int]:
        choice = reply["choices"][0]
        ids, ends = choice.get("token_ids"), self.target.end_ids
        if ids is None:
            if not self._warned:
                self._warned = True
                self.say(f"{NAME}: {self.url} gives no token ids: its text is tokenized again, which may differ from what was "
                         "sampled")
            ids = self.target.tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
        vocabulary = self.target.vocabulary
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
            raise ValueError(f"token ids outside of the model's 0 to {vocabulary - 1}: another model's server?")
        ids = ids[:limit]
        if choice.get("finish_reason") == "stop" and (not ids or ids[-1] not in ends):
            reason = choice.get("stop_reason")
            ids = [*ids, reason if reason in ends else end_token(self.target.tokenizer, ends)]
        if not ids:
            raise ValueError("an answer without tokens")
        return ids

    def _repeated(self, path: str, body: dict | None, read: Callable):
        """What `read` makes of the reply; replies that are none (no JSON, no choices, an error object) are tried again."""
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        data = None if body is None else json.dumps(body).encode()
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                request = urllib.request.Request(self.url + path, data, headers)
                with urllib.request.urlopen(request, timeout=600) as reply:
                    return read(json.load(reply))
            except urllib.error.HTTPError as error:
                detail = error.read(300).decode("utf-8", "replace").replace("\n", " ")
                if error.code < 500 and error.code != 429:
                    hint = f" (a key is read from {KEY_VARIABLE})" if error.code in (401, 403) else ""
                    raise OSError(f"{NAME}: {self.url}{path}: HTTP {error.code}: {detail}{hint}") from None
                reason = f"HTTP {error.code}"
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                reason = f"no usable reply ({type(error).__name__}: {str(error)[:120]})"
            if attempt < ATTEMPTS - 1:
                time.sleep(2**attempt)
        raise OSError(f"{NAME}: {self.url}{path}: {reason} ({ATTEMPTS} attempts); what was answered is kept, run again to "
                      "continue")
