"""A judge model: decides whether a reply is right where no comparison of words can.

    open_judge("gpt-4o-2024-08-06", "https://api.openai.com/v1")   an endpoint in OpenAI's form (vLLM, llama.cpp, ours)
    open_judge("path/to/model")                                    a model that is loaded here, without memory

What a judge says depends on the judge: name it beside every figure, and compare only what one judge has judged. Each
verdict is kept in a file, so that a run that goes on, and a table that is made again, ask for none twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentmem.engine import Engine
from agentmem.errors import ConfigError, MissingExtraError
from agentmem.generation.sampling import Sampling
from agentmem.loading import load
from agentmem.messages import Message
from agentmem.text import parse_json

JUDGE_KEYS = ("AGENTMEM_JUDGE_KEY", "OPENAI_API_KEY")
"""Environment variables of which the first that is set is the endpoint's key."""

_VERDICT_TOKENS = 10

_WHAT_COUNTS = {
    "temporal-reasoning": "A count of days, weeks or months that is off by one is still right.",
    "knowledge-update": "A reply that gives an older answer too is right, as long as it gives the updated one.",
    "single-session-preference": "The expected answer describes what a good reply takes into account. A reply that "
    "recalls and uses what the user told is right, even if it does not use all of it.",
}
_USUAL = (
    "A reply that says the same in other words, or with all the steps that lead there, is right; one that has only a "
    "part of it is wrong."
)
_NEVER_TOLD = (
    "The question cannot be answered from what was told, as explained below. A reply is right if it says that it does "
    "not know, or that this was not told."
)


class Judge:
    """Asks a model whether replies are right; greedy, and one at a time.

    Args:
        name: the model's, for reports.
        ask: gives the model's reply to a prompt.
        kept: a JSONL file of verdicts; None: they are kept in memory only.
        close: ends the model.
    """

    def __init__(
        self, name: str, ask: Callable[[str], str], kept: Path | None = None, close: Callable[[], None] = lambda: None
    ) -> None:
        self.name = name
        self._ask, self._kept, self._close = ask, kept, close
        self._verdicts: dict[str, bool] = {}
        self._lock = threading.Lock()
        lines = kept.read_text("utf-8").splitlines() if kept is not None and kept.is_file() else []
        for line in lines:
            try:
                row = parse_json(line)
                self._verdicts[row["key"]] = bool(row["right"])
            except (ValueError, TypeError, KeyError):  # of an interrupted run
                continue

    def __call__(self, kind: str, question: str, answer: str, reply: str, *, never_told: bool = False) -> bool:
        """Whether a reply is right.

        Args:
            kind: the type of the question in LongMemEval, which says what is forgiven.
            question: what was asked.
            answer: the expected answer, or with `never_told` why there is none.
            reply: what is judged.
            never_told: whether a right reply says that it does not know.

        Raises:
            ConfigError: the model cannot be asked.
        """
        prompt = judge_prompt(kind, question, answer, reply, never_told=never_told)
        key = hashlib.sha256(f"{self.name}\0{prompt}".encode()).hexdigest()[:32]
        with self._lock:
            if key not in self._verdicts:
                said = self._ask(prompt)
                right = self._verdicts[key] = "yes" in said.casefold()
                self._keep({"key": key, "judge": self.name, "right": right, "said": said, "asked": prompt})
            return self._verdicts[key]

    def close(self) -> None:
        """End the model, if one was loaded."""
        self._close()

    def _keep(self, row: dict[str, Any]) -> None:
        if self._kept is None:
            return
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        with self._kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def judge_prompt(kind: str, question: str, answer: str, reply: str, *, never_told: bool = False) -> str:
    """What a judge is asked; see `Judge`."""
    rule = _NEVER_TOLD if never_told else _WHAT_COUNTS.get(kind, _USUAL)
    expected = "Why it cannot be answered" if never_told else "Expected answer"
    return (
        f"Decide whether a reply to a question is right. {rule}\n\nQuestion: {question}\n\n{expected}: {answer}\n\n"
        f"Reply: {reply}\n\nIs the reply right? Answer yes or no only."
    )


def open_judge(model: str, url: str | None = None, kept: Path | None = None) -> Judge:
    """A judge that asks an endpoint, or a model that is loaded when it is first asked.

    Args:
        model: the endpoint's name for it, or what `agentmem.load` takes.
        url: of the endpoint, up to and with `/v1`; None: the model is loaded here.
        kept: see `Judge`.

    Raises:
        MissingExtraError: an endpoint is to be asked, and openai is not installed.
    """
    if url is not None:
        return Judge(f"{model} at {url}", _endpoint(model, url), kept)
    local = _Local(model)
    return Judge(model, local.ask, kept, local.close)


class _Local:
    """A model of one's own, loaded when it is first asked."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._engine: Engine | None = None

    def ask(self, prompt: str) -> str:
        if self._engine is None:
            self._engine = load(self._model, adapter=False)
        sampling = Sampling(max_tokens=_VERDICT_TOKENS)
        return self._engine.turn([Message("user", prompt)], memory=False, sampling=sampling).message.content

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def _endpoint(model: str, url: str) -> Callable[[str], str]:
    try:
        import openai
    except ImportError:
        raise MissingExtraError("openai", "eval") from None
    # The client wants a text for a key, even where the server wants none.
    key = next((value for name in JUDGE_KEYS if (value := os.environ.get(name))), "none")
    client = openai.OpenAI(base_url=url, api_key=key)

    def ask(prompt: str) -> str:
        try:
            completion = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=_VERDICT_TOKENS,
            )
        except openai.OpenAIError as error:
            raise ConfigError(
                f"the judge {model} at {url} could not be asked ({error}); check --judge, --judge-url and the key in "
                f"{' or '.join(JUDGE_KEYS)}, and run the same command again: it goes on"
            ) from error
        return completion.choices[0].message.content or ""

    return ask
