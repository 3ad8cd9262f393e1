"""Examples are what an engine runs; a step's loss and gradients are those of its passes, however they are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import agentmem
from agentmem import Engine, MemoryConfig, Message, SteeredModel
from agentmem.errors import ConfigError, DataError
from agentmem.generation.sampling import Sampling
from agentmem.prompt.transcript import Transcript, Window
from agentmem.training.conversations import Ask, Conversation
from agentmem.training.examples import Example, ExampleMaker, Pass, collate
from agentmem.training.fitted import refit_addresses, start_as_copier, start_fitted
from agentmem.training.frozen import FrozenFeatures
from agentmem.training.logit_lens import freeze, train_by_lens
from agentmem.training.loop import TrainProgress
from agentmem.training.step import MemoryStep, Start
from tests.helpers.core_models import TERMS, attach_lively, build, tiny
from tests.helpers.numeric import assert_close

TEXTS = ("The dog is Otto.", "How are you? Fine, I hope.", "The port is 8080.")
STRATEGIES = ("token", "message", "sentence")


@pytest.fixture(scope="module")
def nano() -> Engine:
    return agentmem.load("nano", adapter=False)


def steered_nano(nano: Engine, strategy: str) -> SteeredModel:
    """Memory that writes at random and corrects nothing, so that replies are nano's own."""
    steered = SteeredModel.attach(nano.model, config=MemoryConfig(rank=4, write_strategy=strategy), seed=1)  # type: ignore[arg-type]
    steered.memory.requires_grad_(True)
    return steered


def maker(engine: Engine, strategy: str, **options: Any) -> ExampleMaker:
    transcript = Transcript(engine.tokenizer)
    return ExampleMaker(transcript, engine.tokenizer, strategy, engine.max_tokens_limit, **options)  # type: ignore[arg-type]


def conversation(messages: Sequence[Message], *, train: bool = False, **options: Any) -> Conversation:
    return Conversation(
        tuple(messages), tuple(train and message.role == "assistant" for message in messages), **options
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("history", ["turns", "exchanges", "whole"])
def test_an_example_writes_what_the_engine_writes(nano: Engine, strategy: str, history: str) -> None:
    steered = steered_nano(nano, strategy)
    engine = Engine(nano.model, nano.tokenizer, steered)
    window, state, messages = Window(messages=3), engine.zero_state(), list[Message]()
    for text in TEXTS:
        messages.append(Message("user", text))
        turn = engine.turn(messages, state, window=window, sampling=Sampling(max_tokens=24))
        assert turn.state is not None
        assert tuple(engine.tokenizer.encode(turn.message.content)) == turn.token_ids
        messages.append(turn.message)
        if history == "turns":
            state = turn.state
        elif history == "exchanges":
            state = engine.remember(messages, state).state
    if history == "whole":
        state = engine.remember(messages, state).state
    asked = conversation(messages, asks=(Ask((Message("user", "Who?"),), Message("assistant", "Otto.")),))
    example = maker(engine, strategy, window=window, history=history)(asked, Random(0))
    step = MemoryStep(steered)
    joined = {step.joined, False}
    for way in joined:
        found = step.states(collate([example], 0, joined=way))
        assert_close(found[0], torch.tensor(state.matrices), TERMS)
    engine.close()


@pytest.mark.parametrize("field", ["values", "decisive"])
def test_values_and_what_ends_them_count_most_and_then_the_opening(nano: Engine, field: str) -> None:
    full_weight: dict[str, Any] = {field: ("8080",)}
    ask = Ask((Message("user", "Which port?"),), Message("assistant", "The port is 8080."), **full_weight)
    told = conversation([Message("user", "The port is 8080."), Message("assistant", "OK.")], asks=(ask,))
    example = maker(nano, "token", history="exchanges", other_weight=0.25)(told, Random(0))
    (asked,) = example.asks
    full = [token for token, weight in zip(asked.ids, asked.weights, strict=True) if weight == 1.0]
    rest = [token for token, weight in zip(asked.ids, asked.weights, strict=True) if 0 < weight < 1.0]
    assert nano.tokenizer.decode(full).strip() == "8080."
    assert nano.tokenizer.decode(rest).startswith("The port is")
    # What a reply opens with decides whether there is an answer at all.
    opening, *others = [weight for weight in asked.weights if 0 < weight < 1.0]
    assert opening == 0.5
    assert set(others) == {0.25}
    assert not any(each.counts for each in example.passes)


def test_the_reply_that_counts_is_read_with_what_its_window_shows(nano: Engine) -> None:
    messages = [Message(role, text) for text in TEXTS for role in ("user", "assistant")]
    example = maker(nano, "token", window=Window(messages=1), history="turns")(
        conversation(messages, train=True), Random(0)
    )
    assert not example.asks
    assert len(example.passes) == 3
    assert all(each.counts for each in example.passes)
    shown = nano.tokenizer.decode(example.passes[2].ids)
    assert "8080" in shown
    assert "Otto" not in shown
    with pytest.raises(DataError, match="no reply counts"):
        maker(nano, "token")(conversation(messages), Random(0))
    with pytest.raises(ConfigError, match="history must be one of turns, exchanges, whole, mixed"):
        maker(nano, "token", history="all")


# What follows needs no text: passes of random tokens, with recalled values.


def passes(seed: int, *, strategy: str = "token") -> Example:
    """Three written passes and two questions; every question's last two tokens count."""
    rng = Random(seed)

    def one(length: int, counted: int) -> Pass:
        ids = [rng.randrange(3, 61) for _ in range(length)]
        segments = [n // 4 for n in range(length)]
        split = length if strategy == "token" or not counted else length - 4
        return Pass(ids, segments, [0.0] * (length - counted) + [1.0] * counted, split)

    return Example(tuple(one(rng.randrange(5, 12), 0) for _ in range(3)), tuple(one(9, 2) for _ in range(2)))


def asking(seed: int) -> Example:
    """Three questions with the same first tokens, of which some are written and some only read."""
    rng = Random(seed)
    shared = [rng.randrange(3, 61) for _ in range(rng.randrange(3, 6))]
    told, asks = passes(seed).passes, []
    for _ in range(3):
        rest = [rng.randrange(3, 61) for _ in range(rng.randrange(4, 8))]
        ids = [*shared, *rest]
        asks.append(Pass(ids, [-1, -1, *range(len(ids) - 2)], [0.0] * (len(ids) - 2) + [1.0] * 2, len(ids)))
    return Example(told, tuple(asks))


def lively(strategy: str = "token", architecture: str = "llama") -> SteeredModel:
    steered = attach_lively(tiny(architecture), write_strategy=strategy, couple_lambda=False, num_state_heads=2)
    steered.memory.requires_grad_(True)
    return steered


def gradients(step: MemoryStep, examples: Sequence[Example], *, joined: bool | None = None) -> tuple[Tensor, Tensor]:
    """The loss, and the gradients of all trained parameters in one vector."""
    batch = collate(examples, 0, joined=step.joined if joined is None else joined)
    loss = step(batch)["loss"]
    trained = [p for p in step.memory.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([x.flatten() for x in found])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_row_of_a_batch_is_as_it_is_alone(strategy: str) -> None:
    step = MemoryStep(lively(strategy))
    examples = [passes(seed, strategy=strategy) for seed in range(3)]
    together = step.losses(collate(examples, 0, joined=step.joined))[0]
    alone = [step.losses(collate([each], 0, joined=False))[0] for each in examples]
    assert_close(together, torch.cat(alone), 4 * TERMS)


def test_joined_rows_change_no_gradient() -> None:
    step, examples = MemoryStep(lively()), [passes(seed) for seed in range(3)]
    assert step.joined
    assert not MemoryStep(lively(architecture="gemma3")).joined
    for found, expected in zip(gradients(step, examples), gradients(step, examples, joined=False), strict=True):
        assert_close(found, expected, 20 * TERMS)


def test_what_questions_share_is_run_once_and_changes_no_gradient() -> None:
    together = [asking(1), asking(2)]
    alone = [Example(each.passes, (ask,)) for each in together for ask in each.asks]
    layout = collate(together, 0, joined=True)["asks"]
    assert len(layout["first"]) == 2
    assert sorted(layout["of"].tolist()) == [0, 0, 0, 1, 1, 1]
    assert "first" not in collate(alone, 0, joined=True)["asks"]
    for gradient in ("full", "first_order"):
        step = MemoryStep(lively(), gradient=gradient)  # type: ignore[arg-type]
        for found, expected in zip(gradients(step, together), gradients(step, alone), strict=True):
            assert_close(found, expected, 20 * TERMS)
        quiet = MemoryStep(lively(), read_penalty=0.5)
        batch = collate(together, 0, joined=False)
        penalty = quiet(batch)["penalty"]
        for name in ("first", "of"):
            batch["asks"].pop(name)
        assert_close(penalty, quiet(batch)["penalty"], 20 * TERMS)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_questions_of_like_length_run_together_and_change_no_gradient(architecture: str) -> None:
    examples = [replying(seed) for seed in range(12)]
    (short, *_) = examples[1].asks
    longer = Pass(
        [*range(3, 23), *short.ids], [*[0] * 20, *short.segments], [*[0.0] * 20, *short.weights], 20 + len(short.ids)
    )
    examples[1] = replace(examples[1], asks=(replace(longer, reply_from=short.reply_from + 20),) * 12)
    step = MemoryStep(lively(architecture=architecture), gradient="first_order")
    together = collate(examples, 0, joined=step.joined, steered_tokens="reply")
    apart = collate(examples, 0, joined=step.joined, steered_tokens="reply")
    assert len(together["asks"]["groups"]) > 1
    del apart["asks"]["groups"]
    trained = [p for p in step.memory.parameters() if p.requires_grad]
    losses = [step(batch)["loss"] for batch in (together, apart)]
    found, expected = (
        torch.cat([x.flatten() for x in torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)])
        for loss in losses
    )
    assert_close(losses[0], losses[1], 20 * TERMS)
    assert_close(found, expected, 20 * TERMS)


def replying(seed: int) -> Example:
    """As `asking`, and each question's last three tokens, of which two are predicted, are steered."""
    example = asking(seed)
    asks = tuple(replace(ask, reply_from=len(ask.ids) - 3) for ask in example.asks)
    told = tuple(replace(each, reply_from=len(each.ids) - number) for number, each in enumerate(example.passes))
    return replace(example, passes=told, asks=asks)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("shares", [True, False])
def test_where_only_replies_are_steered_gradients_are_those_of_calls_that_say_so(
    architecture: str, shares: bool
) -> None:
    steered = lively(architecture=architecture)
    step, examples = MemoryStep(steered), [replying(seed) for seed in range(3)]
    if not shares:
        examples = [Example(each.passes, each.asks[:1]) for each in examples]
    batch = collate(examples, 0, joined=step.joined, steered_tokens="reply")
    assert len(batch["asks"]["cuts"]) > 1
    trained = [p for p in step.memory.parameters() if p.requires_grad]
    losses = []
    for example in examples:
        state = steered.zeros(1)
        for each in example.passes:
            state = _called(steered, each, state).state
        for ask in example.asks:
            logits = _called(steered, ask, state).logits
            losses.append(F.cross_entropy(logits[0, -3:-1], torch.tensor(ask.ids[-2:]), reduction="sum"))
    expected = torch.stack(losses).sum() / sum(each.weight for each in examples)
    found = step(batch)["loss"]
    assert_close(found, expected, 20 * TERMS)
    gradients = [
        torch.cat([x.flatten() for x in torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)])
        for loss in (found, expected)
    ]
    assert_close(gradients[0], gradients[1], 20 * TERMS)


def _called(steered: SteeredModel, each: Pass, state: Tensor) -> Any:
    steer = torch.arange(len(each.ids))[None] >= each.reply_from
    return steered(torch.tensor([each.ids]), state, segments=torch.tensor([each.segments]), steer=steer)


@pytest.mark.parametrize(
    ("architecture", "strategy"), [("llama", "token"), ("qwen3", "message"), ("gemma3", "token"), ("llama", "sentence")]
)
@pytest.mark.parametrize("limit", [1 << 20, 0])
def test_frozen_features_of_texts_that_come_back_change_no_gradient(
    architecture: str, strategy: str, limit: int
) -> None:
    steered = attach_lively(
        tiny(architecture), write_strategy=strategy, couple_lambda=False, num_state_heads=2, target_layers=[1]
    )
    steered.memory.requires_grad_(True)
    examples = [asking(seed) if strategy == "token" else passes(seed, strategy=strategy) for seed in range(3)]
    features = FrozenFeatures(steered.model, 1, limit)
    plain, quick = MemoryStep(steered), MemoryStep(steered, features=features)
    for _ in range(2):
        for found, expected in zip(gradients(quick, examples), gradients(plain, examples), strict=True):
            assert_close(found, expected, 20 * TERMS)
    tokens = sum(len(each.ids) for example in examples for each in (*example.passes, *example.asks))
    assert (features.computed, features.found) == ((tokens, tokens) if limit else (2 * tokens, 0))
    checkpointed = MemoryStep(steered, features=features, gradient_checkpointing=True)
    assert_close(gradients(checkpointed, examples)[1], gradients(plain, examples)[1], 20 * TERMS)


def test_checkpointing_changes_no_gradient_and_truncation_cuts_it() -> None:
    examples = [passes(seed) for seed in range(2)]
    loss, full = gradients(MemoryStep(lively()), examples, joined=False)
    for options, same in (
        ({"gradient_checkpointing": True}, True),
        ({"truncate": 4}, True),
        ({"truncate": 1}, False),
        ({"gradient": "first_order"}, False),
    ):
        found_loss, found = gradients(MemoryStep(lively(), **options), examples, joined=False)
        assert_close(found_loss, loss, 4 * TERMS)
        if same:
            assert_close(found, full, 20 * TERMS)
        else:
            assert (found - full).norm() > 0.01 * full.norm(), options


def test_first_order_gradients_are_exact_where_nothing_is_corrected() -> None:
    def step(gradient: str) -> MemoryStep:
        steered = SteeredModel.attach(tiny("llama"), config=MemoryConfig(rank=4, couple_lambda=False), seed=1)
        return MemoryStep(steered, gradient=gradient)  # type: ignore[arg-type]

    found, expected = (gradients(step(kind), [passes(3)]) for kind in ("first_order", "full"))
    assert found[1].abs().max() > 0
    assert_close(found[1], expected[1], 20 * TERMS)


def test_memory_is_only_read_where_it_should_be() -> None:
    """With `reading` at 0 only tokens that predict a target are corrected, so what is written is the bare model's."""
    steered, bare = lively(), lively()
    with torch.no_grad():
        for name, parameter in bare.memory.named_parameters():
            if "delta_" in name:
                parameter.zero_()
    batch = collate([passes(1)], 0, joined=True)
    quiet = MemoryStep(steered, read_penalty=0.5)
    assert not torch.allclose(quiet.states(batch), MemoryStep(bare).states(batch))
    quiet.reading = 0.0
    assert_close(quiet.states(batch), MemoryStep(bare).states(batch), TERMS)
    result = quiet(batch)
    assert result["penalty"] > 0
    assert_close(result["loss"], result["sum"] / result["weight"] + result["penalty"], 10)
    assert quiet.losses(batch, "zero")[0].tolist() != quiet.losses(batch)[0].tolist()


def test_the_frozen_model_is_run_as_an_engine_runs_it() -> None:
    step = MemoryStep(attach_lively(build("llama", attention_dropout=0.5), couple_lambda=False))
    step.train()
    assert not any(module.training for module in step.model.modules())
    batch = collate([passes(1)], 0, joined=False)
    assert_close(step(batch)["loss"].detach(), step(batch)["loss"].detach(), 1)


def recall(number: int) -> Example:
    """One of six names gets one of 40 values; the question names it, and its reply is the value."""
    rng = Random(number)
    facts = [(name, rng.randrange(20, 60)) for name in rng.sample(range(5, 11), 2)]
    told = tuple(Pass([3, name, name, value], [0] * 4, [0.0] * 4, 4, 4) for name, value in facts)
    asks = tuple(Pass([4, name, name, value, 2], [0] * 5, [0.0, 0.0, 0.0, 1.0, 1.0], 5, 2) for name, value in facts)
    return Example(told, asks)


def test_a_fitted_start_recalls_before_any_training() -> None:
    steered = SteeredModel.attach(
        build("llama", tie_word_embeddings=True), config=MemoryConfig(rank=8, couple_lambda=False, lambda_bias_init=7.0)
    )
    found = start_fitted(steered, [recall(number) for number in range(200)], 0)
    assert found == 400
    step = MemoryStep(steered)
    batch = collate([recall(number) for number in range(1000, 1040)], 0, joined=True)
    memory, zero, foreign = (step.losses(batch, start)[0].mean() for start in ("memory", "zero", "foreign"))
    assert memory < foreign - 0.1
    assert torch.isfinite(zero)
    with pytest.raises(DataError, match="at least 16 values"):
        start_fitted(steered, [recall(0)], 0)


def test_keys_and_queries_that_have_strayed_are_fitted_anew() -> None:
    steered = SteeredModel.attach(
        build("llama", tie_word_embeddings=True), config=MemoryConfig(rank=8, couple_lambda=False, lambda_bias_init=7.0)
    )
    examples = [recall(number) for number in range(600)]
    start_fitted(steered, examples, 0)
    step = MemoryStep(steered)
    batch = collate([recall(number) for number in range(1000, 1040)], 0, joined=True)

    def lead() -> float:
        memory, foreign = (float(step.losses(batch, start)[0].mean()) for start in ("memory", "foreign"))
        return foreign - memory

    fitted, generator = lead(), torch.Generator().manual_seed(0)
    others = {}
    with torch.no_grad():
        for name, parameter in steered.memory.named_parameters():
            if name.endswith(("memory_k_proj", "memory_q_proj")):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(3.0 * parameter.square().mean().sqrt() * noise)
            else:
                others[name] = parameter.clone()
    strayed = lead()
    assert strayed < 0.5 * fitted
    assert refit_addresses(steered, examples, 0) == 1200
    assert lead() > strayed + 0.25 * (fitted - strayed)
    for name, parameter in steered.memory.named_parameters():
        assert name not in others or torch.equal(parameter, others[name]), name
    with pytest.raises(DataError, match="found none in 1 conversations"):
        refit_addresses(steered, [Example(recall(0).passes, ())], 0)


def test_steps_through_a_logit_lens_teach_what_the_model_then_does() -> None:
    options: dict[str, Any] = {"steered_tokens": "reply", "target_layers": (2,)}
    config = MemoryConfig(rank=8, couple_lambda=False, lambda_bias_init=7.0, **options)
    steered = SteeredModel.attach(build("llama", tie_word_embeddings=True), config=config)
    examples = [recall(number) for number in range(150)]
    start_fitted(steered, examples, 0)
    step = MemoryStep(steered)
    batch = collate([recall(number) for number in range(1000, 1040)], 0, joined=True, steered_tokens="reply")

    def losses() -> list[float]:
        starts: tuple[Start, ...] = ("memory", "zero", "foreign")
        return [float(step.losses(batch, start)[0].mean()) for start in starts]

    (before, *_), seen = losses(), list[TrainProgress]()
    train_by_lens(steered, freeze(steered, examples, 0), steps=100, on_progress=seen.append)
    memory, *controls = losses()
    assert memory < before - 2.0
    assert memory < min(controls) - 0.2
    assert [now.step for now in seen] == list(range(1, 101))
    assert {now.stage for now in seen} == {"logit lens"}
    assert freeze(steered, [Example(recall(0).passes, ())], 0) == [], "nothing is asked"


def test_a_copier_reads_what_it_wrote() -> None:
    steered = SteeredModel.attach(tiny("llama"), config=MemoryConfig(rank=4), seed=1)
    start_as_copier(steered, gain=0.5)
    for module in steered.memory:
        parameters = dict(module.named_parameters())
        assert torch.equal(parameters["memory_k_proj"], parameters["memory_q_proj"])
        assert torch.equal(parameters["delta_o_proj"], 0.5 * parameters["memory_v_proj"].T)
