"""lm-eval's own tasks with our model class: arms, the same replies as the engine's, batches, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem import Message, load
from agentmem.errors import ConfigError
from agentmem.generation.sampling import Sampling
from tests.helpers.task_data import PROMPTS, write_lines

lm_eval = pytest.importorskip("lm_eval")

TEXT = "The database is neo4j."


def request(*arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    kind = "loglikelihood" if isinstance(arguments[1], str) else "generate_until"
    return Instance(kind, {}, arguments, 0)


def model(**options: Any) -> Any:
    from agentmem.evaluation.lm_eval_model import AgentmemLM

    return AgentmemLM("nano", **options)


def test_replies_are_those_of_the_engine_and_of_any_batch() -> None:
    lm = model(batch_size=2)
    texts = [TEXT, "My editor is helix, which I like."]
    prompts = [lm.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
    replies = lm.generate_until(
        [request(prompt, {"until": [], "max_gen_toks": 16}) for prompt in prompts], disable_tqdm=True
    )
    with load("nano") as engine:
        options = {"sampling": Sampling(max_tokens=16)}
        assert replies == [engine.turn([Message("user", text)], **options).message.content for text in texts]
    stopped = lm.generate_until([request(prompts[0], {"until": ["neo4j"], "max_gen_toks": 16})], disable_tqdm=True)
    assert "neo4j" in replies[0]
    assert stopped == [replies[0].split("neo4j")[0]]


def test_likelihoods_are_those_of_one_pass() -> None:
    lm = model(batch_size=2)
    prompt = lm.apply_chat_template([{"role": "user", "content": TEXT}])
    (reply,) = lm.generate_until([request(prompt, {"until": [], "max_gen_toks": 16})], disable_tqdm=True)
    asked = [request(prompt, reply), request("A longer text before that: the", " end")]
    together = lm.loglikelihood(asked, disable_tqdm=True)
    for each, (found, _) in zip(asked, together, strict=True):
        context, continuation = (lm.tok_encode(text) for text in each.args)
        with torch.no_grad():
            logits = lm._memory(torch.tensor([context + continuation])).logits[0]
        scores = logits.log_softmax(-1)[len(context) - 1 : -1]
        expected = sum(float(score[token]) for score, token in zip(scores, continuation, strict=True))
        assert found == pytest.approx(expected, abs=1e-3)
    assert together[0][1], "decoding gave this"
    assert not together[1][1]


def test_a_full_memory_makes_a_difference_and_none_is_the_model_alone() -> None:
    prompt = model(arm="bare").apply_chat_template([{"role": "user", "content": TEXT}])
    asked = [request(prompt, "Noted.")]
    found = {arm: model(arm=arm).loglikelihood(asked, disable_tqdm=True)[0][0] for arm in ("bare", "zero", "foreign")}
    assert found["zero"] != pytest.approx(found["foreign"], abs=1e-3)
    with load("nano", adapter=False) as engine:
        from lm_eval.models.huggingface import HFLM

        theirs = HFLM(engine.model, tokenizer=engine.tokenizer).loglikelihood(asked, disable_tqdm=True)
    assert found["bare"] == pytest.approx(theirs[0][0], abs=1e-4)


@pytest.fixture
def tasks(tmp_path: Path) -> Any:
    """lm-eval's IFEval and GPQA, with small local files in place of those on the hub."""
    from lm_eval.tasks import TaskManager

    rows = [
        {"key": n, "prompt": text, "instruction_id_list": kinds, "kwargs": given}
        for n, (text, kinds, given) in enumerate(PROMPTS[:2])
    ]
    rows = [row | {"kwargs": [{"keywords": one.get("keywords")} for one in row["kwargs"]]} for row in rows]
    write_lines(tmp_path / "ifeval.jsonl", rows)
    wrong = {f"Incorrect Answer {n}": text for n, text in enumerate(("cork", "foam", "air"), 1)}
    write_lines(tmp_path / "gpqa.jsonl", [{"Question": "Which is heavy?", "Correct Answer": "lead"} | wrong])
    home = Path(lm_eval.__file__).parent / "tasks"
    for name, file in (("ifeval", "ifeval/ifeval.yaml"), ("gpqa", "gpqa/zeroshot/_gpqa_zeroshot_yaml")):
        data = {"data_files": {"train": str(tmp_path / f"{name}.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        lines = [f"include: {home / file}", f"task: {name}_here", "dataset_path: json"]
        (tmp_path / f"{name}.yaml").write_text("\n".join([*lines, f"dataset_kwargs: {json.dumps(data)}"]) + "\n")
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.filterwarnings("ignore")  # of lm-eval's and datasets' own
def test_their_tasks_run_with_it(tasks: Any) -> None:
    import agentmem.evaluation.lm_eval_model  # noqa: F401  # makes the class known

    results = lm_eval.simple_evaluate(
        model="agentmem",
        model_args={"pretrained": "nano", "arm": "foreign"},
        tasks=["ifeval_here", "gpqa_here"],
        task_manager=tasks,
        gen_kwargs={"max_gen_toks": 4},
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert 0 <= results["results"]["ifeval_here"]["prompt_level_strict_acc,none"] <= 1
    assert results["results"]["gpqa_here"]["acc,none"] in (0.0, 1.0)
    assert results["n-samples"]["ifeval_here"]["effective"] == 2
    assert results["config"]["arm"] == "foreign"
    assert results["config"]["adapter_fingerprint"]


@pytest.mark.filterwarnings("ignore")
def test_ruler_runs_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RULER's own needle in its repeated haystack, which it makes itself: no file, only a tokenizer and word lists."""
    pytest.importorskip("wonderwords")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_: False)  # of punkt_tab, which cuts its essays alone
    from lm_eval.tasks import TaskManager

    import agentmem.evaluation.lm_eval_model  # makes the class known

    home = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    lines = [f"include: {home / 'niah_single_1.yaml'}", "task: needle_here", "metric_list:", '  - metric: "384"']
    lines += ["    aggregation: mean", "    higher_is_better: true"]
    (tmp_path / "needle.yaml").write_text("\n".join(lines) + "\n")
    nano = Path(agentmem.__file__).parent / "nano" / "weights"
    found = lm_eval.simple_evaluate(
        model="agentmem",
        model_args={"pretrained": "nano", "arm": "foreign"},
        tasks=["needle_here"],
        task_manager=TaskManager(
            include_path=str(tmp_path),
            include_defaults=False,
            metadata={"tokenizer": str(nano), "max_seq_lengths": [384]},
        ),
        gen_kwargs={"max_gen_toks": 4},
        limit=2,
        bootstrap_iters=0,
    )
    assert 0 <= found["results"]["needle_here"]["384,none"] <= 1
    assert found["n-samples"]["needle_here"]["effective"] == 2


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match="arm is one of bare, zero, foreign; found 'memory'"):
        model(arm="memory")
    with pytest.raises(ConfigError, match="batch_size is a number"):
        model(batch_size="auto")
    lm = model()
    with pytest.raises(ConfigError, match="greedy"):
        lm.generate_until([request("Hello", {"until": [], "do_sample": True, "temperature": 0.7})], disable_tqdm=True)
