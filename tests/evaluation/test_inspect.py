"""inspect_ai runs our tasks with our provider: arms, what a log keeps, and what is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import ConfigError
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

    with pytest.raises(ConfigError, match=r"arm is one of memory, .*found 'llmlingua' .only `agentmem evaluate`"):
        AgentmemAPI("nano", arm="llmlingua")
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
