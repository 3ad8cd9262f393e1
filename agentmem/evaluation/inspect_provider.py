"""agentmem for inspect_ai, found by its entry point: a model provider, and the tasks as tasks of theirs.

    inspect eval agentmem/longmemeval -T data_dir=data --limit 50 --model agentmem/smollm2 -M arm=memory

The last message that the model is given is the question. What comes before it is told: it is written into a memory, or
shown, as the arm says (`-M arm=`, see `agentmem.training.contexts`). So any task whose samples are conversations can be
run with it. Decoding is greedy. The metadata of an output has what the prompt showed, what was kept, and the time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from anyio.to_thread import run_sync
from inspect_ai import Task as InspectTask
from inspect_ai import task as inspect_task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    modelapi,
)
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState, generate

from agentmem.engine import Engine
from agentmem.errors import ConfigError
from agentmem.evaluation.facts import SEED
from agentmem.evaluation.task import SHORT_REPLY, Task
from agentmem.evaluation.tasks import FOLDERS, OWN, open_task
from agentmem.loading import load
from agentmem.messages import Message
from agentmem.prompt.transcript import Window
from agentmem.training.arms import CONTEXT_TOKENS, ArmMeasurement, digests, partners
from agentmem.training.compression import LLMLingua2
from agentmem.training.contexts import COMPRESSED, NEAREST, SETUPS, STATIC, Arm
from agentmem.training.conversations import Ask
from agentmem.training.judging import judge
from agentmem.training.predictions import ArmQuestion, ArmReply, Probe
from agentmem.training.static import StaticAdapter

ASKED_AT_ONCE = 32
"""Samples that are asked at once, unless --max-connections says otherwise; the engine decodes them in one batch."""

_ELSEWHERE: dict[str, str] = {
    "constant": "no model replies: it is chosen from the answers of all questions of a task",
    **dict.fromkeys(NEAREST, "passages are ranked through a fact store in Chroma, which is no part of this provider"),
}
"""The arms that cannot run here, and why."""
_ARMS: dict[str, Arm] = {str(arm): arm for arm in SETUPS if arm not in _ELSEWHERE}
_CLASSES: dict[str, Callable[..., ChatMessage]] = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}
_foreign: dict[str, tuple[Message, ...]] = {}  # for the digest of a conversation of a task, another one of its length
T = TypeVar("T")


class AgentmemAPI(ModelAPI):  # type: ignore[misc]
    """Replies as an arm.

    Args:
        model_name: what `agentmem.load` takes; "bare" arms need no adapter.
        base_url, api_key, config: inspect_ai's own; there is no server, so the first two mean nothing here.
        adapter: as for `agentmem.load`; "none": no memory.
        arm: who replies.
        context_tokens: most tokens that arms with some of the conversation show of it.
        device, dtype: as for `agentmem.load`.
        static: the directory of a LoRA of `agentmem train --static`, for the arms that have one.
        llmlingua: the weights of LLMLingua-2, for the arm `llmlingua`: a directory or a hub id.

    Raises:
        AdapterError: there is no LoRA in the directory.
        ConfigError: there is no such arm, it cannot run here, or what it needs is not named.
        MissingExtraError: an arm needs a package that is not installed.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        adapter: str | None = None,
        arm: str = "memory",
        context_tokens: int = CONTEXT_TOKENS,
        device: str = "auto",
        dtype: str = "auto",
        static: str | None = None,
        llmlingua: str | None = None,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        if arm in _ELSEWHERE:
            raise ConfigError(
                f"the arm {arm} cannot run under inspect_ai ({_ELSEWHERE[arm]}); measure it with `agentmem evaluate "
                f"--arms {arm}`, or take another arm"
            )
        if arm not in _ARMS:
            raise ConfigError(f"arm is one of {', '.join(_ARMS)}; found {arm!r}")
        self._arm, self._context_tokens = _ARMS[arm], context_tokens
        self._static, self._compress = None, None
        if self._arm in STATIC:
            if static is None:
                raise ConfigError(
                    f"the arm {arm} needs a static LoRA: train one (agentmem train --static), and name its directory "
                    "(-M static=DIR)"
                )
            self._static = StaticAdapter.find(Path(static))
        if self._arm in COMPRESSED:
            if llmlingua is None:
                raise ConfigError(
                    f"the arm {arm} compresses with the weights of LLMLingua-2, which are not at hand; name them "
                    "(-M llmlingua=MODEL)"
                )
            self._compress = LLMLingua2(llmlingua, device)
        self._load = partial(load, model_name, False if adapter == "none" else adapter, device, dtype)
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self._made: dict[tuple[str, str], Future[Any]] = {}

    def max_connections(self) -> int:
        """See `ASKED_AT_ONCE`."""
        return ASKED_AT_ONCE

    def close(self) -> None:
        """End the engine; it is loaded again where the model is used again."""
        with self._lock:
            engine, self._engine = self._engine, None
            self._made.clear()
        if engine is not None:
            engine.close()

    async def generate(
        self, input: list[ChatMessage], tools: list[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """The reply to the last message.

        Raises:
            ConfigError: tools or a temperature are wanted, or the foreign arm meets a conversation of no task of ours.
        """
        if tools or config.temperature:
            raise ConfigError("arms are compared with greedy decoding and without tools; leave the options out")
        reply = await run_sync(partial(self._reply, _told(input), config.max_tokens or SHORT_REPLY))
        output = ModelOutput.from_content(self.model_name, reply.message.content)
        output.metadata = {
            "arm": self._arm,
            "prompt_tokens": reply.prompt_tokens,
            "kept_bytes": reply.kept_bytes,
            "seconds": round(reply.seconds, 4),
            "cut": reply.cut,
            "context": reply.context,
        }
        return output

    def _reply(self, messages: tuple[Message, ...], max_tokens: int) -> ArmReply:
        with self._lock:
            if self._engine is None:
                self._engine = self._load() if self._static is None else self._static.into(self._load())
            engine = self._engine
        ask = Ask(messages[-1:], Message("assistant", ""))
        probes = [Probe(messages[:-1], ask, 0)]
        if self._arm == "foreign":
            other = _foreign.get(digests(messages[:-1]))
            if other is None:
                raise ConfigError(
                    "the foreign arm needs a task of agentmem, which knows another conversation of the same kind; run "
                    "one of them, or take another arm"
                )
            probes.append(Probe(other, ask, 1))
        run = ArmMeasurement(
            engine,
            tuple(probes),
            "remember",
            Window(messages=1),
            self._context_tokens,
            max_tokens,
            concurrency=1,
            compress=self._compress,
            static="" if self._static is None else self._static.fingerprint,
        )
        run.check([self._arm])
        question = ArmQuestion(probes[0], self._arm, "")
        states = {
            number: self._once("state", run.told[number], lambda number=number: run.write([number])[number])  # type: ignore[misc]
            for number in run.sources(question)
        }
        banks = {}
        if SETUPS[self._arm].shows == "bank":
            banks[0] = self._once("bank", run.told[0], lambda: run.fill_banks([0])[0])
        return run.ask(engine, question, states, banks)

    def _once(self, kind: str, told: Iterable[Message], make: Callable[[], T]) -> T:
        """What is made of a conversation; questions about the same one share it."""
        key = (kind, digests(tuple(told)))
        with self._lock:
            mine = key not in self._made
            made: Future[T] = self._made.setdefault(key, Future())
        if mine:
            try:
                made.set_result(make())
            except BaseException as error:
                made.set_exception(error)
                raise
        return made.result()


@modelapi(name="agentmem")
def agentmem() -> type[ModelAPI]:
    """The provider."""
    return AgentmemAPI


def _told(messages: Iterable[ChatMessage]) -> tuple[Message, ...]:
    for message in (messages := list(messages)):
        if message.role not in _CLASSES:
            raise ConfigError(f"conversations have messages of system, user and assistant; found one of {message.role}")
    return tuple(Message(message.role, message.text) for message in messages)


# The tasks.


@lru_cache(maxsize=8)
def _opened(name: str, place: str, limit: int | None, seed: int) -> Task:
    own = Path(place) if name == OWN else None
    opened = open_task(name, [Path(part) for part in place.split(",")], limit, seed, own_file=own)
    told = {probe.conversation: probe.told for probe in opened.probes}
    _foreign.update({digests(told[number]): told[other] for number, other in partners(told).items()})
    return opened


@scorer(metrics=[accuracy(), stderr(cluster="conversation")])
def right(name: str, place: str, limit: int | None, seed: int) -> Scorer:
    """Whether a reply is right, as `agentmem evaluate` decides it; errors are those of whole conversations."""
    opened = _opened(name, place, limit, seed)

    async def score(state: TaskState, target: Target) -> Score:
        reply = Message("assistant", state.output.completion)
        verdict = judge(opened.probes[int(state.sample_id)].ask, reply, max_words=opened.max_words)
        return Score(value=CORRECT if verdict.right else INCORRECT, answer=reply.content)

    return score


def _make(name: str, place: str, limit: int | None, seed: int) -> InspectTask:
    opened = _opened(name, place, limit, seed)
    samples = [
        Sample(
            id=number,
            input=[_CLASSES[m.role](content=m.content) for m in (*probe.told, *probe.ask.messages)],
            target=list(probe.ask.values) or "",
            metadata={
                "conversation": probe.conversation if probe.cluster is None else probe.cluster,
                "kind": probe.ask.kind,
            },
        )
        for number, probe in enumerate(opened.probes)
    ]
    return InspectTask(
        dataset=MemoryDataset(samples, name=name),
        solver=generate(),
        scorer=right(name, place, limit, seed),
        config=GenerateConfig(max_tokens=opened.max_tokens),
        metadata={"title": opened.title, "licence": opened.licence, "skipped": dict(opened.skipped)},
    )


def _define(name: str) -> Any:
    @inspect_task(name=name.replace("-", "_"))
    def made(data_dir: str, questions: int | None = None, seed: int = SEED) -> InspectTask:
        return _make(name, data_dir, questions, seed)

    made.__doc__ = f"The task {name} of `agentmem evaluate`, from a data directory (several with commas between)."
    return made


INSPECT_TASKS: dict[str, Any] = {name: _define(name) for name in FOLDERS if name != "longmemeval-judge"}
"""inspect_ai's form of each task, by our name; theirs has _ for -."""


@inspect_task(name=OWN)
def own(data: str, questions: int | None = None) -> InspectTask:
    """The task `own` of `agentmem evaluate`, from a JSONL file."""
    return _make(OWN, data, questions, SEED)
