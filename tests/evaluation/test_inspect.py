"""inspect_ai runs our tasks with our provider: arms, what a log keeps, and what is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem import MemoryConfig, load
from agentmem.errors import ConfigError
from agentmem.training.static import attach_static
from tests.helpers.task_data import save_hotpotqa, write_lines

inspect_ai = pytest.importorskip("inspect_ai")

pytestmark = [  # of inspect_ai's own calls and streams; its newest release still has them
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]


TOLD = (
    ("The database is neo4j.", "Noted, the database is neo4j."),
    ("My editor is helix.", "Noted, your editor is helix."),
)
ASKED = (("What is the database?", "neo4j"), ("What is my editor?", "helix"))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """Runs a task, by default two questions in nano's language."""
    from agentmem.evaluation.inspect_provider import own

    rows = [
        {
            "messages": [{"role": "user", "content": said}, {"role": "assistant", "content": noted}],
            "question": question,
            "answers": [answer],
        }
        for (said, noted), (question, answer) in zip(TOLD, ASKED, strict=True)
    ]
    write_lines(tmp_path / "mine.jsonl", rows)

    def evaluated(task: Any = None, **options: object) -> Any:
        task = task or own(data=str(tmp_path / "mine.jsonl"))
        model = inspect_ai.model.get_model("agentmem/nano", memoize=False, **options)
        (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path / "logs"), display="none")
        gc.collect()  # while the filters hold
        return log

    return evaluated


@pytest.mark.parametrize(("arm", "accuracy"), [("memory", 1.0), ("foreign", 0.0)])
def test_an_arm_knows_what_it_may(run: Callable[..., Any], arm: str, accuracy: float) -> None:
    log = run(arm=arm)
    assert log.status == "success", log.error
    (score,) = log.results.scores
    assert set(score.metrics) == {"accuracy", "stderr"}
    assert score.metrics["accuracy"].value == accuracy
    kept = inspect_ai.log.read_eval_log(log.location)
    assert [sample.input[-1].text for sample in kept.samples] == [question for question, _ in ASKED]
    for sample in kept.samples:
        assert sample.output.metadata["arm"] == arm
        assert sample.output.metadata["prompt_tokens"] > 0
        assert sample.output.metadata["kept_bytes"] > 1000
        assert set(sample.metadata) == {"conversation", "kind"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
def test_a_static_lora_replies_in_place_of_the_memory(run: Callable[..., Any], tmp_path: Path) -> None:
    with load("nano", adapter=False) as engine:
        lora = attach_static(engine.model, MemoryConfig(rank=2), seed=0)
        for name, weights in lora.named_parameters():
            if "lora_B" in name:
                weights.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        lora.save_pretrained(tmp_path / "lora")
    said = {}
    for arm, options in (("bare", {}), ("static", {"static": str(tmp_path / "lora")})):
        log = run(arm=arm, **options)
        assert log.status == "success", log.error
        said[arm] = [sample.output.completion for sample in log.samples]
        assert all(sample.output.metadata["kept_bytes"] == 0 for sample in log.samples)
    assert said["static"] != said["bare"]


def test_public_tasks_are_tasks_of_theirs(run: Callable[..., Any], tmp_path: Path) -> None:
    from agentmem.evaluation.inspect_provider import INSPECT_TASKS

    save_hotpotqa(tmp_path)
    log = run(INSPECT_TASKS["hotpotqa"](data_dir=str(tmp_path), questions=2), arm="memory_bank", context_tokens=64)
    assert log.status == "success", log.error
    assert len(log.samples) == 2
    assert log.eval.metadata["licence"] == "CC-BY-SA-4.0"
    assert all("Rokko" in sample.output.metadata["context"] for sample in log.samples)


async def test_what_cannot_be_compared_is_refused() -> None:
    from agentmem.evaluation.inspect_provider import AgentmemAPI

    for arm, options, message in (
        ("memories", {}, r"arm is one of memory, .*found 'memories'"),
        ("dense", {}, r"cannot run under inspect_ai \(passages .*Chroma.*`agentmem evaluate --arms dense`"),
        ("constant", {}, "no model replies"),
        ("static", {}, r"name its directory \(-M static=DIR\)"),
        ("llmlingua", {}, r"name them \(-M llmlingua=MODEL\)"),
        ("llmlingua", {"llmlingua": "mine"}, "llmlingua tells its models by their names"),
    ):
        with pytest.raises(ConfigError, match=message):
            AgentmemAPI("nano", arm=arm, **options)
    api = AgentmemAPI("nano", arm="foreign")
    hello = [inspect_ai.model.ChatMessageUser(content=text) for text in ("Hello.", "How are you?")]
    config = inspect_ai.model.GenerateConfig()
    with pytest.raises(ConfigError, match="needs a task of agentmem"):
        await api.generate(hello, [], "none", config)
    with pytest.raises(ConfigError, match="greedy decoding"):
        await api.generate(hello, [], "none", config.merge(inspect_ai.model.GenerateConfig(temperature=0.7)))
    api.close()


def test_the_provider_is_found_by_its_entry_point() -> None:
    (ours,) = (point for point in entry_points(group="inspect_ai") if point.name == "agentmem")
    assert ours.load().INSPECT_TASKS
