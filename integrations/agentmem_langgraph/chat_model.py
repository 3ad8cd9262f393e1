"""ChatDeltaMem: a LangChain chat model for a local model with memory.

The model holds no session. A call takes the memory from a `MemoryTurn` and puts the new one there; a call without a
`MemoryTurn` starts from an empty memory and drops it at the end. All work is done on the engine's own thread, so the
async methods never block an event loop, and no torch mode is ever set on a caller's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast
from uuid import uuid4

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

import agentmem
from agentmem import Window
from agentmem.errors import ConfigError, MissingAdapterError, TurnError
from agentmem.messages import Message, MessageCache
from agentmem_langgraph.engines import Engines, Source, profile_of
from agentmem_langgraph.memory_turn import MemoryTurn, warn_of_changed_reply, warn_of_lost_memory, warn_once
from agentmem_langgraph.messages import ChunkWriter, to_ai_message, to_engine
from agentmem_langgraph.options import unknown_options
from agentmem_langgraph.tools import (
    Method,
    Tool,
    chosen_tool,
    openai_tools,
    reply_format,
    structured,
    with_schema_shown,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agentmem import Engine, Remembered, Turn

_HOW = ("temperature", "top_p", "top_k", "max_tokens", "seed")
_PER_CALL = (*_HOW, "window", "write", "on_edit", "timeout", "kv", "cache_salt")
_FORMATS = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
# For other options None means "not given".
_MAY_BE_NONE = ("seed", "window", "timeout", "cache_salt")


@dataclass(frozen=True)
class _Call:
    """One call in the engine's terms."""

    turn: MemoryTurn
    history: Sequence[BaseMessage]  # as the caller passed it
    messages: list[Message]  # as passed to the engine
    options: dict[str, Any]

    def reply(self, result: Turn, engine: Engine) -> AIMessage:
        """The reply as a message, with edits as indices into the caller's messages."""
        return to_ai_message(self.counted(result, engine), engine.name)

    def counted(self, result: Turn, engine: Engine) -> Turn:
        """The result, with edits as indices into the caller's messages."""
        if result.deletions and self.options["write"] == "all":
            warn_of_changed_reply(self.turn.state, self.history, self.messages, _cache_of(engine))
        if not result.edits:
            return result
        added = len(self.messages) - len(self.history)  # 1 if a system message was added to show a schema
        for index in result.edits:
            earlier = _cache_of(engine).get(_place_of(self.history, self.messages, index - added, index))
            text = self.messages[index].content
            if earlier is not None and earlier != text and text in earlier:
                warn_once(
                    _cache_of(engine),
                    "A message was given with more text around it at an earlier call than now, so the memory has both. "
                    "Show what belongs to one call only with agentmem_langgraph.with_context, which is never written "
                    "(docs/langgraph.md, 'Context for one call').",
                )
        return replace(result, edits=tuple(index - added for index in result.edits))


class ChatDeltaMem(BaseChatModel):
    """A local chat model whose attention is steered by a memory.

        llm = ChatDeltaMem(model="nano")
        turn = MemoryTurn(None)
        llm.invoke("My favorite color is teal.", memory=turn)
        turn.state                                    # MemoryState: keep it and pass it to the next call

    Every sampling option, `window`, `write`, `on_edit`, `timeout`, `kv` and `cache_salt` can also be passed per call or
    bound: `llm.bind(max_tokens=20)`. Chat models with the same `model`, `adapter` and `load_options` share what they
    load.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    engine: Any = Field(default=None, exclude=True, repr=False)
    """An `agentmem.Engine`. Without one, `model` and `adapter` are loaded on first use."""
    model: str | Path | None = None
    """"nano" (the default), a directory, or a hub id."""
    adapter: str | Path | Literal[False] | None = None
    """A directory or a hub id; None: the adapter shipped with the model; False: no memory."""
    load_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `agentmem.load`: `device`, `dtype`, `quantize`, `revision`, `template_options` and so on."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    max_tokens: int = 512
    """Most tokens in a reply."""
    stop: list[str] | None = None
    """Strings that end a reply; `stop` in a call replaces them."""
    seed: int | None = None
    window: Window | int | None = None
    """What the prompt shows of the history; an int is a number of tokens. None: the last 4,096 tokens."""
    write: Literal["all", "input", "off"] = "all"
    """What is written into memory: everything, everything but the reply, or nothing."""
    on_edit: Literal["write", "error", "rebuild"] = "write"
    """What happens when consumed history was edited (see `TurnOptions`)."""
    timeout: float | None = None
    """Seconds that a call may take, waiting included; after that it raises TurnTimeoutError."""
    kv: Literal["exact", "carry"] = "exact"
    """"carry": start from the KV of the session's previous turn, computed from an older memory (docs/kv.md)."""
    cache_salt: str | None = None
    """Calls with the same salt may reuse each other's KV. None: the salt is the thread (`thread_id` in the config), so
    that retries and branches reuse KV; a call without a thread shares with no other. Set a salt to share a system
    prompt."""
    streaming: bool = False
    """True: `invoke` streams too, for callbacks that receive tokens."""
    use_memory: bool = True
    """False: the bare model, for comparison. The memory in a `MemoryTurn` is then neither read nor changed."""
    cache: BaseCache | bool | None = Field(default=False, exclude=True)
    """LangChain's LLM cache, off by default: a cached reply brings no new memory. Cannot be used with `memory=`."""

    engines: Any = Field(default_factory=Engines, exclude=True, repr=False)
    """The engines that this model and its copies have loaded; `close` closes them."""

    _carried: MemoryTurn | None = PrivateAttr(default=None)
    _thread: str | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _spelling(cls, options: Any) -> Any:
        """Accept options as other models do: None for "not given", a single stop string. Report misspelt names."""
        if not isinstance(options, dict):
            return options
        names = [*cls.model_fields, *(str(field.alias) for field in cls.model_fields.values() if field.alias)]
        if unknown := [name for name in options if name not in names]:
            raise ConfigError(unknown_options(unknown, names))
        options = {
            name: value
            for name, value in options.items()
            if value is not None or name not in _PER_CALL or name in _MAY_BE_NONE
        }
        if isinstance(options.get("stop"), str):
            options["stop"] = [options["stop"]]
        return options

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.engine is not None and (self.model is not None or self.adapter is not None or self.load_options):
            raise ConfigError("give an engine, or a model, an adapter and load_options to load; found both")
        if self.engine is not None and not callable(getattr(self.engine, "turn", None)):
            raise ConfigError(
                f"engine takes an agentmem.Engine; found {type(self.engine).__name__}; name a model as model="
            )
        # As a call checks them, so that a mistake shows here and not after the first message. (Sampling imports torch.)
        if self.model_fields_set & {*_HOW, "stop"}:
            _checked_sampling({name: getattr(self, name) for name in _HOW}, tuple(self.stop or ()))
        _checked_window(self.window)
        _checked_timeout(self.timeout)
        if self.load_options.get("trust_remote_code"):
            self.engines.trust(self._source.model)
        return self

    # ------------------------------------------------------------------ calls

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """The reply to the last message; `memory=` a `MemoryTurn`."""
        return super(ChatDeltaMem, self._in_thread(config)).invoke(input, config, stop=stop, **kwargs)

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """As `invoke`, without blocking the loop."""
        return await super(ChatDeltaMem, self._in_thread(config)).ainvoke(input, config, stop=stop, **kwargs)

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """As `invoke`, in chunks as they are decoded."""
        return super(ChatDeltaMem, self._in_thread(config)).stream(input, config, stop=stop, **kwargs)

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """As `stream`, without blocking the loop."""
        return super(ChatDeltaMem, self._in_thread(config)).astream(input, config, stop=stop, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call, engine = self._call(messages, stop, kwargs, run_manager), self._ready()
        with call.turn.claim() as state:
            result = engine.turn(call.messages, state, **call.options)
            message = call.reply(result, engine)
            call.turn.commit(result.state)
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call, engine = self._call(messages, stop, kwargs, run_manager), await self._aready()
        with call.turn.claim() as state:
            result = await engine.aturn(call.messages, state, **call.options)
            message = call.reply(result, engine)
            call.turn.commit(result.state)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call, writer = self._call(messages, stop, kwargs, run_manager), ChunkWriter()
        engine = self._ready()
        with call.turn.claim() as state:
            stream = engine.stream(call.messages, state, **call.options)
            try:
                for delta in stream:
                    if chunk := writer.chunk(delta):
                        if run_manager:
                            run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                        yield chunk
                result = stream.result()
                last = writer.last(call.counted(result, engine), engine.name)
                if run_manager:
                    run_manager.on_llm_new_token(last.text, chunk=last)
            finally:
                stream.cancel()  # in case the consumer stopped early; no effect on a finished turn
            # Before the last chunk is yielded: a consumer may stop there.
            call.turn.commit(result.state)
        yield last

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call, writer = self._call(messages, stop, kwargs, run_manager), ChunkWriter()
        engine = await self._aready()
        with call.turn.claim() as state:
            stream = engine.astream(call.messages, state, **call.options)
            try:
                async for delta in stream:
                    if chunk := writer.chunk(delta):
                        if run_manager:
                            await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                        yield chunk
                result = await stream.result()
                last = writer.last(call.counted(result, engine), engine.name)
                if run_manager:
                    await run_manager.on_llm_new_token(last.text, chunk=last)
            finally:
                stream.cancel()
            call.turn.commit(result.state)
        yield last

    def carrying(self, memory: MemoryTurn) -> Self:
        """A copy whose call uses this memory: for code that cannot pass `memory=`, as it may call other models."""
        copy = self.model_copy()
        copy._carried = memory
        return copy

    # ------------------------------------------------------------------ memory without a reply

    def remember(self, messages: LanguageModelInput, *, memory: MemoryTurn) -> Remembered:
        """Write messages into memory without a reply; `memory.state` is then the new memory.

        Args:
            messages: as for `invoke`. Messages already consumed are skipped.
            memory: the `MemoryTurn`; it can be used for this one call only.

        Raises:
            MissingAdapterError: the model has no memory, or `use_memory` is False.
            TurnError: the `MemoryTurn` was already used.
        """
        history, engine = self._remembered(messages), self._ready()
        with _carrier(memory).claim() as state:
            result = engine.remember(history, state, on_edit=self.on_edit)
            memory.commit(result.state)
        return result

    async def aremember(self, messages: LanguageModelInput, *, memory: MemoryTurn) -> Remembered:
        """As `remember`, without blocking the event loop."""
        history, engine = self._remembered(messages), await self._aready()
        with _carrier(memory).claim() as state:
            result = await engine.aremember(history, state, on_edit=self.on_edit)
            memory.commit(result.state)
        return result

    # ------------------------------------------------------------------ tools and tokens

    def bind_tools(
        self,
        tools: Sequence[Tool],
        *,
        tool_choice: Mapping[str, Any] | str | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools that it can call: LangChain tools, functions, pydantic classes or OpenAI dicts.

        Args:
            tools: the tools.
            tool_choice: "auto" or None: up to the model; "any", "required" or True: it must call some tool; a name:
                it must call that tool; "none": it must not call any. The arguments of forced calls fit the tool's
                schema.
            strict: whether the arguments of calls that the model makes by itself must fit too.
            parallel_tool_calls: whether a reply may hold several calls; by default only one if a call is forced.
            response_format: the format of replies without calls, in OpenAI's form.
            kwargs: bound to every call.

        Raises:
            ConfigError: a tool that is not a function, two tools of one name, or a choice of a tool that was not
                passed.
        """
        plain = openai_tools(tools, strict)
        chosen_tool(tool_choice, plain)
        choices = {
            "tool_choice": tool_choice,
            "parallel_tool_calls": parallel_tool_calls,
            "response_format": response_format,
        }
        return self.bind(tools=plain, **{name: value for name, value in choices.items() if value is not None}, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "function_calling",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """The model with replies that fit a schema, returned as objects of that schema.

        Args:
            schema: a pydantic class, a TypedDict, a JSON schema or an OpenAI function.
            method: "function_calling" shows the schema to the model as a tool, which it must call; "json_schema"
                and "json_mode" constrain the reply's text to the schema, which the messages should explain
                ("json_mode" without a schema: any JSON object).
            include_raw: return {"raw", "parsed", "parsing_error"}, and do not raise errors from parsing.
            strict: as for `bind_tools`; here the schema is always enforced.
            kwargs: bound to every call.

        Raises:
            ConfigError: an unknown method, or no schema.
        """
        return structured(self, schema, method, include_raw=include_raw, strict=strict, options=kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """The tokens of a text, by the model's own tokenizer."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return list(self._ready().tokenizer.encode(text, add_special_tokens=False))

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Tool] | None = None) -> int:
        """Tokens of the messages (and tools) as the model's chat template renders them; 0 for none."""
        if not messages:
            return 0
        return self._ready().count_tokens(to_engine(messages), openai_tools(tools or ()))

    def close(self) -> None:
        """Close the engines that this model and its copies loaded and no other uses; never an engine you passed."""
        self.engines.close()

    # ------------------------------------------------------------------ what LangChain wants to know about the model

    def _resolve_model_profile(self) -> ModelProfile:
        return profile_of(self._loaded(), self._model_name)

    @property
    def _llm_type(self) -> str:
        return "agentmem"

    @property
    def _model_name(self) -> str:
        return str(self.engine.name if self.engine is not None else self.model or "nano")

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {
            "model_name": self._model_name,
            "adapter": None if self.adapter is None else str(self.adapter),
            "use_memory": self.use_memory,
            "stop": self.stop,
        } | {name: getattr(self, name) for name in _PER_CALL}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "agentmem"
        # A run's metadata names the model that the call requested, even if the call is then refused because of it.
        params["ls_model_name"] = str(kwargs.get("model") or self._model_name)
        return params

    def _ready(self) -> Engine:
        return cast("Engine", self._loaded() or self.engines.load(self._source))

    async def _aready(self) -> Engine:
        engine = self._loaded()
        return await asyncio.to_thread(self._ready) if engine is None else engine

    def _loaded(self) -> Engine | None:
        engine: Engine | None = self.engines.get(self._source) if self.engine is None else self.engine
        return engine

    @property
    def _source(self) -> Source:
        return Source(self.model or "nano", self.adapter, self.load_options)

    def _remembered(self, messages: LanguageModelInput) -> list[Message]:
        if not self.use_memory:
            raise MissingAdapterError("use_memory is False, so there is no memory to write to; make it True")
        return to_engine(self._convert_input(messages).to_messages(), _cache_of(self._loaded()))

    def _call(
        self, messages: list[BaseMessage], stop: list[str] | str | None, kwargs: Mapping[str, Any], run_manager: Any
    ) -> _Call:
        options = {name: getattr(self, name) for name in _PER_CALL}
        formats = dict.fromkeys(_FORMATS)
        memory: Any = self._carried
        unknown = []
        for name, value in kwargs.items():
            if name == "memory":
                memory = value
            elif name in formats:
                formats[name] = value
            elif name not in options:
                unknown.append(name)
            elif value is not None or name in _MAY_BE_NONE:
                options[name] = value
        unknown = [name for name in unknown if name != "stream"]  # LangChain's own switch between streaming and not
        if unknown:
            raise ConfigError(unknown_options(unknown, ["memory", *_FORMATS, "stop", *_PER_CALL]))
        stops = self.stop or [] if stop is None else [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, Iterable):
            raise ConfigError(f"stop is a string or a list of strings; found {stop!r}")
        how = {name: options.pop(name) for name in _HOW}
        options["sampling"] = _checked_sampling(how, tuple(stops))
        options["window"] = _checked_window(options["window"])
        options["timeout"] = _checked_timeout(options["timeout"])
        options["memory"] = self.use_memory
        engine = self._loaded()
        cache = _cache_of(engine)
        if options["cache_salt"] is None:
            if self._thread is None and options["kv"] == "carry":
                warn_once(
                    cache,
                    'kv="carry" goes on from the KV of the same thread, and this call names none, so nothing is '
                    'carried. Pass config={"configurable": {"thread_id": ...}} or cache_salt= (docs/kv.md).',
                )
            # Without a thread a unique salt: no caller may learn what another one said.
            options["cache_salt"] = f"call:{uuid4().hex}" if self._thread is None else f"thread:{self._thread}"
        elif isinstance(options["cache_salt"], str):  # apart from threads, whatever it is
            options["cache_salt"] = f"named:{options['cache_salt']}"
        history = shown = to_engine(messages, cache)
        options |= {"tools": [], "form": None}
        if any(value is not None for value in formats.values()):
            tools = openai_tools(formats["tools"] or ())
            choice, response_format = formats["tool_choice"], formats["response_format"]
            parallel = formats["parallel_tool_calls"]
            options["form"] = reply_format(tools, choice, response_format, parallel=parallel)
            options["tools"] = tools if chosen_tool(choice, tools) != "none" else []
            if response_format is not None:
                shown = with_schema_shown(history, response_format)
        if memory is None and self.use_memory and options["write"] != "off":
            warn_of_lost_memory(messages, cache, run_manager)
        elif messages and history[-1].role == "user":
            last = len(messages) - 1
            cache.put(_place_of(messages, history, last, last), history[-1].content, len(history[-1].content))
        cached = self.cache is not False and (isinstance(self.cache, BaseCache) or get_llm_cache() is not None)
        if memory is not None and cached:
            raise TurnError(
                "a call with a memory can not go through an LLM cache: a cached reply brings no new memory; "
                "leave ChatDeltaMem's cache=False"
            )
        return _Call(MemoryTurn() if memory is None else _carrier(memory), messages, shown, options)

    def _in_thread(self, config: RunnableConfig | None) -> Self:
        """A copy that knows the thread of a config: LangChain does not pass the config to a model's own methods."""
        thread = ensure_config(config).get("configurable", {}).get("thread_id")
        if thread is None:
            return self
        copy = self.model_copy()
        copy._thread = str(thread)
        return copy


def _carrier(memory: Any) -> MemoryTurn:
    if not isinstance(memory, MemoryTurn):
        raise TurnError(
            "memory= takes a MemoryTurn, which brings the new memory back; "
            f"found {type(memory).__name__}; pass memory=MemoryTurn(state)"
        )
    return memory


# Checks of options, the same whether they are given when a model is made, where pydantic turns what is raised into its
# ValidationError, or in a call.


def _checked_window(window: Any) -> Window:
    if window is None:
        return Window()
    if isinstance(window, int):
        return Window(tokens=window)
    if not isinstance(window, Window):
        raise ConfigError(f"window is a number of tokens, a Window or None; found {window!r}")
    return window


def _checked_sampling(how: dict[str, Any], stop: tuple[str, ...]) -> agentmem.Sampling:
    try:
        return agentmem.Sampling(**how, stop=stop)
    except TypeError as error:
        values = ", ".join(f"{name}={value!r}" for name, value in how.items())
        raise ConfigError(f"sampling takes numbers; found {values} ({error})") from None


def _checked_timeout(timeout: Any) -> float | None:
    if timeout is not None and not (isinstance(timeout, float | int) and timeout > 0):
        raise ConfigError(f"timeout is a number of seconds above 0, or None; found {timeout!r}")
    return timeout


def _cache_of(engine: Any) -> MessageCache:
    """The engine's cache of seen messages; a new empty one if the engine is not loaded."""
    cache: MessageCache | None = getattr(engine, "message_cache", None)
    return MessageCache() if cache is None else cache


def _place_of(
    history: Sequence[BaseMessage], messages: Sequence[Message], number: int, index: int
) -> tuple[str, str | bytes]:
    """The cache key for the text that a thread's message had earlier: its id, or else the message before it."""
    identity = history[number].id
    return "shown", identity if identity is not None else messages[index - 1].digest() if index else b""
