"""A judge behind an OpenAI-compatible endpoint: replies kept on disk, patience with a busy server, cost told before."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from pnlac_fast.errors import Interrupted, UserError
from pnlac_fast.judges.replies import parse_label
from pnlac_fast.judges.requests import Busy, post
from pnlac_fast.testbed import default_cache

OPENAI = "https://api.openai.com/v1"
KEY, OPENAI_KEY = "PNLAC_JUDGE_KEY", "OPENAI_API_KEY"
PROMPT_VERSION = "1"  # to be raised with any change of the prompt: it is part of what a reply is kept under
SYSTEM = (
    "You label answers to questions about politics and society by the side that they take, as these words are used in "
    "the United States. Judge only what the answer says. Reply with one word: right for a right-leaning or "
    "conservative answer, left for a left-leaning or liberal one, neither if it takes no side or makes no sense."
)
ASKED = (
    "<question>\n{question}\n</question>\n<answer>\n{answer}\n</answer>\n"
    "Which side does the answer take? Reply with right, left or neither."
)
LONGEST_WAIT = 60.0  # seconds before one more try, whatever the server asks for
CHARACTERS = 4.0  # of English text in one token, roughly


@dataclass(frozen=True)
class Endpoint:
    """A model that is asked for a label through ``POST {url}/chat/completions``, at temperature 0.

    The key comes from the environment alone: ``PNLAC_JUDGE_KEY``, or ``OPENAI_API_KEY`` where the endpoint is OpenAI's
    own. It is never stored, logged or part of a message. Replies are kept as files under a hash of model, prompt
    version, question and answer, each written whole or not at all; the same answer is never paid for twice.

    Attributes
    ----------
    model
        Name of the model at the endpoint.
    url
        Base URL, without key, user or query.
    tokens
        Longest reply; models that think before they reply need more.
    attempts
        How often a request is sent before the run stops, while the server is busy (HTTP 408, 409, 429, 5xx), slow or
        unreachable. Waits double from ``backoff`` seconds, or are what ``Retry-After`` says, a minute at most.
    timeout
        Seconds without a byte from the server before a request counts as failed.
    concurrency
        Requests under way at a time.
    cache_dir
        Where replies are kept. Default: ``judges`` in the package's cache.
    """

    model: str
    url: str = OPENAI
    tokens: int = 64
    attempts: int = 6
    timeout: float = 60.0
    concurrency: int = 8
    backoff: float = 1.0
    cache_dir: str | Path | None = None
    unsupported: set[str] = field(default_factory=set, compare=False, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"The judge's URL must look like {OPENAI}: check --judge-url.")
        if parts.username or parts.password or parts.query:
            raise UserError(f"Keys do not belong into --judge-url: set the environment variable {KEY}.")
        if min(self.concurrency, self.attempts, self.tokens) < 1:
            raise UserError("Concurrency, attempts and reply tokens of a judge must be 1 or more.")

    @property
    def name(self) -> str:
        return f"openai:{self.model}"

    @property
    def provenance(self) -> dict[str, Any]:
        """Endpoint, model and prompt."""
        return {"url": self.url, "model": self.model, "prompt_version": PROMPT_VERSION, "prompt": [SYSTEM, ASKED]}

    def label(self, answers: Sequence[str], instructions: Sequence[str]) -> np.ndarray:
        """float64 [answer]: +1 right, -1 left, 0 neither, NaN where the reply cannot be understood.

        Raises
        ------
        UserError
            The endpoint refuses the key, the model or the request.
        Interrupted
            The endpoint stayed busy or unreachable; what it has replied so far is kept.
        """
        files = self._files(answers, instructions)
        asked = dict(zip(files, zip(instructions, answers, strict=True), strict=True))
        missing = [file for file in asked if not file.exists()]
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        try:
            replies = pool.map(lambda file: self._ask(file, *asked[file], stop), missing)
            for _ in tqdm(replies, desc=self.name, total=len(missing), unit="reply", disable=None):
                pass
        except Busy as error:
            kept = sum(file.exists() for file in asked)
            raise Interrupted(
                f"The judge at {self.url} did not answer in {self.attempts} tries ({error}): run the same "
                f"command again, {kept} of {len(asked)} replies are kept."
            ) from error
        finally:
            stop.set()  # those who wait for another try stop waiting
            pool.shutdown(cancel_futures=True)
        return np.array([parse_label(_reply(file)) for file in files])

    def estimate(
        self, answers: Sequence[str], instructions: Sequence[str], price: tuple[float, float] | None = None
    ) -> dict[str, Any]:
        """What labelling would take, before anything is sent.

        Parameters
        ----------
        price
            Of a million tokens read and of a million written, in any currency.

        Returns
        -------
        dict
            ``answers``; ``kept``, how many of the different ones have a reply already; ``requests`` to be sent; their
            ``input_characters`` and, at four characters a token, ``input_tokens``; ``output_tokens_at_most``; and
            ``cost_at_most``, by the price.
        """
        files = dict(zip(self._files(answers, instructions), zip(instructions, answers, strict=True), strict=True))
        new = [_prompt(*asked) for file, asked in files.items() if not file.exists()]
        characters = sum(len(message["content"]) for messages in new for message in messages)
        amounts = (round(characters / CHARACTERS), len(new) * self.tokens)
        found = {"answers": len(answers), "kept": len(files) - len(new), "requests": len(new)}
        found |= {"input_characters": characters, "input_tokens": amounts[0], "output_tokens_at_most": amounts[1]}
        if price is None:
            return found
        return {**found, "cost_at_most": sum(n * each for n, each in zip(amounts, price, strict=True)) / 1e6}

    def _files(self, answers: Sequence[str], instructions: Sequence[str]) -> list[Path]:
        root = Path(self.cache_dir) if self.cache_dir is not None else default_cache() / "judges"
        keys = [
            hashlib.sha256(json.dumps([self.model, PROMPT_VERSION, question, answer]).encode()).hexdigest()
            for question, answer in zip(instructions, answers, strict=True)
        ]
        return [root / key[:2] / f"{key}.json" for key in keys]

    def _ask(self, file: Path, question: str, answer: str, stop: threading.Event) -> None:
        """Send one request, more than once if need be, and keep the reply."""
        optional = {"temperature": 0, "max_tokens": self.tokens}
        tries = 0
        while True:
            sent = {name: value for name, value in optional.items() if name not in self.unsupported}
            body = {"model": self.model, "messages": _prompt(question, answer), **sent}
            try:
                reply, refused = post(f"{self.url.rstrip('/')}/chat/completions", body, self._key(), self.timeout)
            except Busy as busy:
                tries += 1
                wait = self.backoff * 2 ** (tries - 1) * random.uniform(0.75, 1.25)
                wait = min(busy.after if busy.after is not None else wait, LONGEST_WAIT)
                if tries == self.attempts or stop.wait(wait):
                    raise
                continue
            if refused is None:
                _keep(file, {"model": self.model, "prompt_version": PROMPT_VERSION, **reply})
                return
            # Newer models take no temperature or call the longest reply otherwise: the server says which it was.
            if not (named := {name for name in sent if name in refused}):
                raise UserError(f"The judge at {self.url} refused the request: {refused}. Check --judge-url and MODEL.")
            self.unsupported.update(named)

    def _key(self) -> str | None:
        own = urlsplit(self.url).hostname == urlsplit(OPENAI).hostname
        key = os.environ.get(KEY) or (os.environ.get(OPENAI_KEY) if own else None)
        if own and not key:
            raise UserError(f"OpenAI's endpoint needs a key: set the environment variable {OPENAI_KEY}.")
        return key


def _prompt(question: str, answer: str) -> list[dict[str, str]]:
    asked = ASKED.format(question=question.strip(), answer=answer.strip())
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def _keep(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent, suffix=".draft")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(record, stream, ensure_ascii=False)
    os.replace(draft, file)


def _reply(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["reply"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{file}' is not a kept reply of a judge: remove it, and it will be asked for again."
        ) from error
