"""A training run, from its config to an adapter with its evidence: `train`, and `dry_run`, which shows one example.

Everything that can be wrong with the options, the files, the data or the chat template is found before the weights are
loaded. Then the memory is attached in float32 beside the frozen model, trained, and measured on held-out conversations
as it goes. What is left in the output directory:

    adapter.safetensors delta_mem_config.json    the best adapter; `agentmem.load(model, adapter=out)`
    README.md                                    its card
    predictions.jsonl                            what it replied to each question, and what the controls did
    log.jsonl train.json                         every step and measurement; the config
    start checkpoint-N best-N                    what a resumed run goes on from
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, get_type_hints

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from transformers import TrainingArguments

from agentmem.delta.adapter import Adapter, load_adapter, save_adapter
from agentmem.delta.attach import find_sites, targeted
from agentmem.delta.config import CONFIG_FILE, MemoryConfig
from agentmem.delta.model import SteeredModel
from agentmem.engine import Engine
from agentmem.errors import AgentMemError, ConfigError, DataError
from agentmem.loading import load, load_skeleton, load_tokenizer
from agentmem.prompt.transcript import Transcript, Window
from agentmem.text import parse_json
from agentmem.training.arms import measure, probes_of
from agentmem.training.card import CardFacts, write_card
from agentmem.training.checkpoints import best_adapters, last_checkpoint, written_aside
from agentmem.training.config import RUN_FILE, TrainConfig, of_type, suggestion
from agentmem.training.contexts import BASIC, CONTROLLED
from agentmem.training.conversations import Ask, Conversation
from agentmem.training.episodes import EpisodeConfig
from agentmem.training.examples import Example, ExampleMaker, collate
from agentmem.training.facts.values import Vocabulary
from agentmem.training.fitted import refit_addresses, start_as_copier, start_fitted
from agentmem.training.frozen import FrozenFeatures
from agentmem.training.logit_lens import freeze, train_by_lens
from agentmem.training.loop import ExampleDataset, TrainingLoop, TrainProgress, training_arguments
from agentmem.training.predictions import ArmResults, Probe
from agentmem.training.progress import show_data, show_example, shown_progress
from agentmem.training.publish import check_push, push
from agentmem.training.shortage import explained_shortage, explained_shortage_of_weights
from agentmem.training.sources import ENDLESS, MixedSource, Source, SourceOptions, open_sources
from agentmem.training.static import StaticStep, attach_static
from agentmem.training.step import MemoryStep, Start, total_weight
from agentmem.training.trainer import Measurement, MemoryTrainer

_CHECKED = 1000  # conversations that are made into examples before the weights are loaded
_START = "start"  # in the output directory: new weights as they were before the first step
_PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        out: its directory.
        steps: how many steps were trained.
        finished: False if the run was stopped and can be resumed; there is then no adapter in `out` itself yet.
        score: the kept adapter's, memory minus the larger of zero and foreign; None where nothing was measured.
        arms: the share of right replies of each arm, or its loss where replies cannot be judged by their text.
        seconds: how long it took, in all sittings.
    """

    out: Path
    steps: int
    finished: bool
    score: float | None
    arms: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class PreparedRun:
    """What a run needs beside the weights: all checked.

    `shape` is the config of the language model, `parameters` how many the whole model has.
    """

    config: TrainConfig
    tokenizer: Any
    memory: MemoryConfig
    adapter: Adapter | None
    source: Source
    held_out: tuple[Conversation, ...]
    maker: ExampleMaker
    window: Window
    shape: Any
    parameters: int

    def example(self, number: int, rng: Random) -> Example:
        """The example of training conversation `number`."""
        return self.maker(self.source.conversation(number), rng)

    @property
    def probes(self) -> tuple[Probe, ...]:
        """Held-out questions whose replies are judged by their text; none where all are about one conversation."""
        probes = probes_of(self.held_out)
        return probes if len({probe.conversation for probe in probes}) > 1 else ()

    @property
    def questions(self) -> list[Conversation]:
        """Held-out conversations that end in a reply whose loss can be measured; none where there is only one."""
        questions = [question for question in map(as_question, self.held_out) if question.asks]
        return questions if len(questions) > 1 else []  # another one's memory is needed

    @property
    def measured(self) -> str:
        """What is measured while the run goes on, in words."""
        if self.config.static or not self.config.evaluate_every:
            return f"nothing is measured ({'static' if self.config.static else 'evaluate_every: 0'})"
        if self.probes:
            return f"{len(self.probes)} questions about them, judged by the reply's text"
        if self.questions:
            return f"{len(self.questions)} replies in them, of which the losses are measured"
        return "too few to measure (two with a reply after the first turn are needed), so the last adapter is kept"

    @property
    def pad(self) -> int:
        """The token of padding; where a tokenizer has none any will do, since padding is masked."""
        return self.tokenizer.pad_token_id or 0

    def batch(self, examples: Sequence[Example], *, joined: bool) -> dict[str, Any]:
        """Examples as tensors."""
        return collate(examples, self.pad, joined=joined, steered_tokens=self.memory.steered_tokens)


def train(config: TrainConfig, *, on_progress: Callable[[TrainProgress], None] | None = None) -> TrainResult:
    """Train a memory.

    Args:
        config: what to train, on what, and how.
        on_progress: called after every step; None = progress is shown on standard error.

    Raises:
        ConfigError: an option, or what it names, cannot be used; or `out` holds another run.
        DataError, TranscriptError, WindowError: the data, or the model's chat template, cannot be used.
        ModelNotFoundError, UnsupportedModelError, AdapterError: see `agentmem.load` and `SteeredModel.attach`.
        TrainingError: the loss is not finite, or memory ran out; the last checkpoint is whole.
    """
    first = _first()
    _need(config, "model", "data", "out")
    out = Path(config.out)
    with _threads(config.threads):
        if first:
            _check_out(config, out)
        run = prepare(config)
        if first and on_progress is None:
            show_data(run.source, run.held_out, run.measured, Console(stderr=True))
        if first:
            _claim(config, out)
        shown = shown_progress() if on_progress is None and first else nullcontext(on_progress)
        some = [run.example(number, Random(number)) for number in range(min(8, len(run.source)))]
        with explained_shortage(config, run.memory, run.shape, some), shown as progress:
            if config.static:
                return _train_static(run, progress)
            trainer = _trainer(run, progress)
            trainer.run()
            return _finish(run, trainer)


def dry_run(config: TrainConfig, console: Console | None = None) -> None:
    """Check everything that needs no weights, and print the first example as it is written and read.

    Raises:
        What `train` raises before it loads weights.
    """
    _need(config, "model", "data")
    run = prepare(config)
    console = console or Console()
    show_example(run.example(0, Random(f"{config.seed}/0")), run.tokenizer, console)
    show_data(run.source, run.held_out, run.measured, console)


def prepare(config: TrainConfig) -> PreparedRun:
    """Check a config and all that it names, and open the data. Loads no weights; see `train` for the errors."""
    for package in config.report_to:
        if find_spec(package) is None:
            raise ConfigError(f"report_to names {package}, which is not installed: pip install {package}")
    if config.push is not None and _first():
        check_push(config.push)
    device = config.device
    if (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    ):
        raise ConfigError(
            f"device: {device}, but torch finds no such device here; device: auto takes the best there is"
        )
    adapter = None if config.adapter is None else load_adapter(config.adapter)
    memory = _options(MemoryConfig, "memory", config.memory) if adapter is None else adapter.config
    if config.lens_steps and (memory.write_strategy != "token" or "o" not in memory.delta_heads):
        raise ConfigError(
            f"lens_steps need write_strategy: token and o in delta_heads; found {memory.write_strategy} and "
            f"{', '.join(memory.delta_heads)}"
        )
    facts = _options(EpisodeConfig, "facts", config.facts)
    window = Window(tokens=config.window_tokens, messages=config.window_messages)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    transcript = Transcript(tokenizer)
    tools = transcript.takes_tools()
    source = open_sources(
        config.data,
        shares=config.data_shares or None,
        data_dir=None if config.data_dir is None else Path(config.data_dir),
        seed=config.seed,
        options=SourceOptions(facts, Vocabulary.from_tokenizer(tokenizer), max_bad=config.max_bad, tools=tools),
    )
    skeleton = load_skeleton(config.model, trust_remote_code=config.trust_remote_code)
    shape, parameters = skeleton.config.get_text_config(), sum(p.numel() for p in skeleton.parameters())
    targeted(find_sites(skeleton), memory)  # refuses an architecture, or a layer that is not there
    maker = ExampleMaker(
        transcript,
        tokenizer,
        memory.write_strategy,
        shape.max_position_embeddings,
        window=window,
        history=config.history,
        other_weight=config.other_weight,
    )
    held_out = source.held_out(config.held_out) if config.evaluate_every else ()
    run = PreparedRun(config, tokenizer, memory, adapter, source, held_out, maker, window, shape, parameters)
    _check_examples(run, tools)
    return run


def _check_examples(run: PreparedRun, tools: bool) -> None:
    """Make examples of the first conversations, and of what is held out: whatever is wrong with them shows here."""
    count = len(run.source)
    if not count:
        raise DataError(f"{run.source.name} has no training conversation; hold out less of it, or give more")
    conversations = [
        run.source.conversation(number) for number in range(min(count, _CHECKED if count < ENDLESS else 64))
    ]
    for number, conversation in enumerate([*conversations, *run.held_out]):
        if conversation.tools and not tools:
            raise ConfigError(
                f"{conversation.origin} has tools, and the model's chat template does not show them; use another "
                "model, or leave such conversations out"
            )
        try:
            run.maker(conversation, Random(number))
        except AgentMemError as error:
            raise type(error)(f"{conversation.origin}: {error}") from error


def _options(kind: Any, name: str, values: Mapping[str, Any]) -> Any:
    """A config dataclass from the keys of `memory` or `facts`."""
    names = [each.name for each in fields(kind)]
    for key in values:
        if key not in names:
            raise ConfigError(
                f"unknown option {key!r} of {name}{suggestion(str(key), names)}; known: {', '.join(names)}"
            )
    hints = get_type_hints(kind)
    plain = {key: list(value.items()) if isinstance(value, dict) else value for key, value in values.items()}
    return kind(**{key: of_type(f"{name}: {key}", hints[key], value) for key, value in plain.items()})


def _need(config: TrainConfig, *names: str) -> None:
    """Refuse a config that lacks one of these keys."""
    for name in names:
        if not getattr(config, name):
            raise ConfigError(f"a run needs {name}; give --{name}, or {name}: in the YAML file")


def _first() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def _conversations_a_step(config: TrainConfig) -> int:
    return config.batch_size * config.accumulate * int(os.environ.get("WORLD_SIZE", "1"))


def _check_out(config: TrainConfig, out: Path) -> None:
    """Refuse a directory that holds something else than the run to resume."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out is a directory; {out} is a file; give another out")
    file = out / RUN_FILE
    if not file.exists():
        if (out / CONFIG_FILE).exists():
            raise ConfigError(f"{out} holds an adapter that no run in it made; give another out")
        return
    try:
        stored = parse_json(file.read_text("utf-8"))
        keys, conversations = stored["config"], stored["conversations_a_step"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); give another out, or remove that directory") from error
    last = last_checkpoint(out)
    if not config.resume:
        raise ConfigError(
            f"{out} holds a run ({'no checkpoint yet' if last is None else last.name}); give --resume to go on with "
            "it, or another out to start anew"
        )
    different = config.differences(keys, _conversations_a_step(config), conversations)
    if different:
        raise ConfigError(
            f"{out} holds a run with other options, so it cannot be resumed with these: {'; '.join(different)}. "
            "Set them as they were, or give another out"
        )


def _claim(config: TrainConfig, out: Path) -> None:
    body = {"config": config.to_mapping(), "conversations_a_step": _conversations_a_step(config)}
    aside = out / f".{RUN_FILE}.partial"
    try:
        out.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(body, indent=2) + "\n", "utf-8")
        os.replace(aside, out / RUN_FILE)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written to ({error.strerror}); give another out") from error


def _trainer(run: PreparedRun, on_progress: Callable[[TrainProgress], None] | None) -> MemoryTrainer:
    """Load the weights, attach the memory, and set up the loop."""
    config = run.config
    arguments = training_arguments(config)
    model = _weights(run, arguments)
    if run.adapter is None:
        steered = SteeredModel.attach(model, config=run.memory, dtype=torch.float32, seed=config.seed)
    else:
        steered = SteeredModel.attach(model, adapter=run.adapter, dtype=torch.float32)
    out = Path(config.out)
    if (run.adapter is None or config.refit_conversations) and last_checkpoint(out) is None:
        if not (out / _START / CONFIG_FILE).exists():
            _start(run, steered, on_progress)
            if arguments.should_save:
                with written_aside(out / _START) as directory:
                    steered.save(directory)
        else:  # the run was killed after its start
            steered = SteeredModel.attach(model, adapter=load_adapter(out / _START), dtype=torch.float32)
    lowest, features = min(steered.layers), None
    if config.frozen_cache and lowest and len(run.source) < ENDLESS:  # what never comes back needs no place
        features = FrozenFeatures(model, lowest, int(config.frozen_cache * 1e9))
    step = MemoryStep(
        steered,
        gradient=config.gradient,
        truncate=config.truncate,
        read_penalty=config.read_penalty,
        gradient_checkpointing=config.gradient_checkpointing,
        features=features,
    )
    measured = _measurement(run, model) if run.probes or run.questions else None
    joined = step.joined
    return MemoryTrainer(
        step,
        steered,
        _dataset(run, arguments),
        lambda examples: run.batch(examples, joined=joined),
        total_weight,
        config,
        arguments,
        measure=measured,
        on_progress=on_progress,
    )


def _weights(run: PreparedRun, arguments: TrainingArguments) -> Any:
    """The frozen model."""
    config = run.config
    with explained_shortage_of_weights(config, run.parameters):
        engine = load(
            config.model,
            False,
            str(arguments.device),
            config.dtype,
            config.attn_implementation,
            quantize=config.quantize,
            trust_remote_code=config.trust_remote_code,
        )
    engine.close()
    return engine.model


def _dataset(run: PreparedRun, arguments: TrainingArguments) -> ExampleDataset:
    config = run.config
    length = config.max_steps * config.batch_size * config.accumulate * arguments.world_size
    return ExampleDataset(len(run.source), run.example, seed=config.seed, length=length)


def _train_static(run: PreparedRun, on_progress: Callable[[TrainProgress], None] | None) -> TrainResult:
    """Train a static LoRA on the same examples, and leave it as peft saves it. Nothing is measured on the way."""
    config, out = run.config, Path(run.config.out)
    arguments = training_arguments(config)
    model = attach_static(_weights(run, arguments), run.memory, config.seed)
    loop = TrainingLoop(
        StaticStep(model),
        _dataset(run, arguments),
        lambda examples: run.batch(examples, joined=False),
        total_weight,
        config,
        arguments,
        on_progress=on_progress,
    )
    loop.run()
    if not loop.stopped and loop.is_world_process_zero():
        model.save_pretrained(str(out))
    return TrainResult(out, loop.state.global_step, not loop.stopped, None, {}, loop.seconds())


def _start(run: PreparedRun, steered: SteeredModel, on_progress: Callable[[TrainProgress], None] | None = None) -> None:
    """Initialise new weights, or fit an adapter's keys and queries anew."""
    config = run.config

    def examples_of(most: int) -> list[Example]:
        count = len(run.source)
        # Of an endless source conversations that training does not reach, which a course (`grow`) has not thinned out.
        first = ENDLESS // 2 if count >= ENDLESS else 0
        return [run.example(n, Random(n)) for n in range(first, first + min(most, count))]

    if run.adapter is not None:
        refit_addresses(steered, examples_of(config.refit_conversations), run.pad, seed=config.seed)
    elif config.start == "copier":
        start_as_copier(steered)
    elif config.start == "fitted":
        examples = examples_of(config.start_conversations)
        start_fitted(steered, examples, run.pad, seed=config.seed)
        if config.lens_steps:
            train_by_lens(
                steered,
                freeze(steered, examples, run.pad),
                steps=config.lens_steps,
                batch=_conversations_a_step(config),
                seed=config.seed,
                on_progress=on_progress,
            )


def _measurement(run: PreparedRun, model: Any) -> Callable[[Adapter], Measurement]:
    """The function that measures an adapter on held-out conversations while the run goes on.

    It measures a copy: an engine packs the weights that it uses, and a trained parameter must stay where its optimiser
    has it.
    """
    probes = run.probes[: run.config.probes]
    predictions = Path(run.config.out) / f".{_PREDICTIONS}.partial"
    questions = [run.maker(conversation, Random(0)) for conversation in run.questions[: run.config.probes]]

    def by_replies(adapter: Adapter) -> Measurement:
        predictions.unlink(missing_ok=True)
        results = _ask(run, model, adapter, probes, CONTROLLED, predictions)
        arms = {str(arm): results.share(arm).value for arm in results.arms}
        return Measurement(results.score, arms, lambda path: os.replace(predictions, path / _PREDICTIONS))

    def by_loss(adapter: Adapter) -> Measurement:
        step = MemoryStep(_copy(model, adapter))
        sums: dict[Start, float] = {"memory": 0.0, "zero": 0.0, "foreign": 0.0}
        # In batches of like size, so that each has another conversation, whose memory is the foreign one.
        parts = max(1, len(questions) // max(2, run.config.batch_size))
        places = [len(questions) * part // parts for part in range(parts + 1)]
        count = 0
        for begin, end in pairwise(places):
            batch = send_to_device(run.batch(questions[begin:end], joined=step.joined), model.device)
            states = step.states(batch)
            for arm in sums:
                losses, weights = step.losses(batch, arm, states)
                sums[arm] += float((losses / weights.clamp_min(1e-9)).sum())
            count += len(losses)
        arms = {f"{arm}_loss": value / max(1, count) for arm, value in sums.items()}
        return Measurement(min(arms["zero_loss"], arms["foreign_loss"]) - arms["memory_loss"], arms)

    return by_replies if len({probe.conversation for probe in probes}) > 1 else by_loss


def _ask(
    run: PreparedRun, model: Any, adapter: Adapter, probes: Sequence[Probe], arms: Sequence[Any], predictions: Path
) -> ArmResults:
    with Engine(model, run.tokenizer, _copy(model, adapter), name=run.config.model) as engine:
        return measure(
            engine,
            probes,
            arms,
            window=run.window,
            max_tokens=run.config.probe_tokens,
            predictions=predictions,
            labels={"seed": run.config.seed},
        )


def _copy(model: Any, adapter: Adapter) -> SteeredModel:
    steered = SteeredModel.attach(model, adapter=adapter, dtype=torch.float32)
    steered.memory.requires_grad_(False)
    return steered


def as_question(conversation: Conversation) -> Conversation:
    """A conversation whose last reply that counts, and what it replies to, are a question about what came before."""
    if conversation.asks:
        return conversation
    messages = conversation.messages
    places = [i for i, counts in enumerate(conversation.train) if counts and i >= 3 and messages[i - 1].role == "user"]
    if not places:
        return conversation
    last = places[-1]
    return replace(
        conversation,
        messages=messages[: last - 1],
        train=(False,) * (last - 1),
        asks=(Ask((messages[last - 1],), messages[last], tools=conversation.tools),),
    )


def _finish(run: PreparedRun, trainer: MemoryTrainer) -> TrainResult:
    """Leave the best adapter in the output directory, with its card."""
    config, out = run.config, Path(run.config.out)
    adapter = trainer.adapter()
    result = TrainResult(
        out, trainer.state.global_step, not trainer.stopped, trainer.state.best_metric, {}, trainer.seconds()
    )
    if trainer.stopped or not trainer.is_world_process_zero():
        return result
    best = best_adapters(out)
    if best:
        adapter = load_adapter(best[-1][1])
    adapter = adapter.rounded(getattr(torch, config.store))
    save_adapter(out, adapter, format="authors" if config.format == "authors" else "safetensors")
    results = None
    if run.probes:
        results = _ask(run, trainer.steered.model, adapter, run.probes, BASIC, out / _PREDICTIONS)
        result = replace(result, arms={str(arm): results.share(arm).value for arm in results.arms}, score=results.score)
    (out / f".{_PREDICTIONS}.partial").unlink(missing_ok=True)
    source = run.source
    left_out = ("out", "resume", "push", "data_dir")
    kept = {key: value for key, value in config.to_mapping().items() if key not in left_out}
    facts = CardFacts(
        name=config.push or out.name,
        base=config.model,
        sources=source.sources if isinstance(source, MixedSource) else [source],
        recipe=kept,
        steps=result.steps,
        seconds=result.seconds,
        machine=f"{trainer.args.world_size} x {_machine(trainer.args.device)}",
        results=results,
    )
    write_card(out, facts)
    if config.push is not None:
        push(config.push, out, _PREDICTIONS)
    return result


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
