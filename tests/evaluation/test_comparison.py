"""Tasks by arms through the command: what is measured, kept, continued, required, and refused before a model loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from agentmem import Engine, MemoryConfig, load
from agentmem.errors import ConfigError, DataError, MissingAdapterError
from agentmem.evaluation.comparison import prepare_comparison, report
from agentmem.training.contexts import ARMS, COMPRESSED
from agentmem.training.static import attach_static
from agentmem_cli.app import app
from tests.helpers.chatterer import save_chatterer
from tests.helpers.task_data import BOOKINGS, save_bfcl, save_hotpotqa, save_ifeval, save_sgd, write_lines

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft

MEASURED = [arm for arm in ARMS if arm not in COMPRESSED]  # which need weights: test_llmlingua


@pytest.fixture(scope="module")
def chatterer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It reads 192 tokens."""
    return save_chatterer(tmp_path_factory.mktemp("chatterer"), max_position_embeddings=192)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for save in (save_sgd, save_bfcl, save_ifeval):
        save(directory)
    return directory


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def done(chatterer: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path, list[str]]:
    out = tmp_path_factory.mktemp("out")
    with load(chatterer, adapter=False) as engine:
        attach_static(engine.model, MemoryConfig(rank=2), seed=0).save_pretrained(out / "static")
    command = ["--model", chatterer, "--task", "sgd,bfcl-memory", "--arms", ",".join(MEASURED), "--data-dir", data]
    command += ["--out", out, "--context-tokens", "48", "--require", "memory-foreign>-2", "--plot", out / "plot.png"]
    command += ["--static", out / "static"]
    return run(*command), out, [str(part) for part in command]


def test_every_arm_is_reported(done: tuple[Result, Path, list[str]]) -> None:
    finished, out, _ = done
    assert finished.exit_code == 0, finished.output
    results = json.loads((out / "results.json").read_text())
    sgd, bfcl = results["tasks"]
    assert (sgd["task"], bfcl["task"]) == ("sgd", "bfcl-memory")
    assert list(sgd["arms"]) == list(MEASURED)
    assert {row["questions"] for row in sgd["arms"].values()} == {4}
    assert {row["questions"] for row in bfcl["arms"].values()} == {5}
    tokens = {arm: row["prompt_tokens"] for arm, row in sgd["arms"].items()}
    assert tokens["constant"] == 0
    assert tokens["memory"] == tokens["zero"] == tokens["foreign"] == tokens["bare"]
    assert tokens["bare"] < tokens["window"] <= tokens["bare"] + 48
    assert tokens["bare"] < tokens["retrieval"] <= tokens["bare"] + 48
    assert tokens["memory"] <= tokens["hybrid"] <= tokens["retrieval"]
    assert tokens["bare"] < tokens["dense"] <= tokens["bare"] + 48
    assert tokens["memory"] <= tokens["dense_hybrid"] <= tokens["dense"]
    assert tokens["whole_memory"] == tokens["whole_foreign"] == tokens["whole"]
    assert tokens["bare"] < tokens["memory_bank"] <= tokens["bare"] + 48
    assert tokens["window_memory"] == tokens["window"]
    assert tokens["whole"] >= tokens["window"]
    kept = {arm: row["kept_bytes"] for arm, row in sgd["arms"].items()}
    text = [sum(len(part) for part in booking[:4]) for booking in (BOOKINGS[0], *BOOKINGS)]  # two items of the first
    assert kept["retrieval"] == kept["whole"] == round(sum(text) / 4)
    assert kept["zero"] == kept["bare"] == kept["constant"] == 0
    assert 0 < kept["window"] <= kept["whole"]
    assert kept["hybrid"] == kept["memory"] + kept["retrieval"]
    assert kept["memory"] > 100
    assert kept["memory_bank"] > kept["retrieval"], "summaries too"
    assert bfcl["arms"]["constant"]["share"] == 0.8  # the best of the two answers in customer, and one each elsewhere
    assert list(bfcl["kinds"]) == ["customer", "finance", "healthcare", "student"]
    compared = {(row["arm"], *row["over"]) for row in sgd["differences"]}
    assert {("memory", "zero", "foreign"), ("hybrid", "retrieval"), ("window_memory", "window")} <= compared
    text = (out / "report.md").read_text()
    assert text == report(results) + "\n"
    assert "| hybrid - max(memory, retrieval) |" in text
    assert "- met: `memory-foreign>-2`" in text
    assert "(`constant`) | 0." in text
    assert "| memory - max(zero, foreign) (interval) | p, by Holm |" in text
    assert list(bfcl["by_kind"]["kinds"]) == list(bfcl["kinds"])
    assert all(row["holm"] >= row["p"] for row in bfcl["by_kind"]["kinds"].values())
    assert (out / "plot.png").stat().st_size > 5000


def test_every_reply_is_kept_with_its_prompt(done: tuple[Result, Path, list[str]]) -> None:
    _, out, _ = done
    lines = rows(out / "predictions" / "sgd.jsonl")
    assert len(lines) == 4 * len(MEASURED)
    for row in lines:
        assert row["task"] == "sgd"
        assert row["seed"]
        assert row["model_fingerprint"]
        assert row["adapter_fingerprint"]
        assert row["prompt"] in [[["user", booking[4]]] for booking in BOOKINGS]
        if "hybrid" not in row["arm"]:  # which quotes where the memory's reply does not stand
            assert bool(row["context"]) == (row["arm"] in ("retrieval", "dense", "memory_bank"))
    assert any("user: At Rokko." in row["context"] for row in lines)


def test_an_interrupted_run_goes_on_and_a_missed_requirement_fails(done: tuple[Result, Path, list[str]]) -> None:
    _, out, command = done
    path = out / "predictions" / "sgd.jsonl"
    before = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(before[:-3]), "utf-8")
    again = run(*command, "--require", "sgd:memory-max(zero,foreign)>0.5")
    assert again.exit_code == 1, again.output
    assert "falls short: sgd: sgd:memory-max(zero,foreign)>0.5, found" in again.output
    after = path.read_text("utf-8").splitlines()
    assert after[: len(before) - 3] == [line.rstrip("\n") for line in before[:-3]]
    assert sorted(json.loads(line)["key"] for line in after) == sorted(json.loads(line)["key"] for line in before)
    assert "falls short: `sgd:memory-max(zero,foreign)>0.5`" in (out / "report.md").read_text()


def test_harm_is_measured_with_a_memory_full_of_other_talk(chatterer: Path, data: Path, tmp_path: Path) -> None:
    finished = run(
        *("--model", chatterer, "--task", "ifeval", "--data-dir", data, "--limit", 2, "--out", tmp_path),
        *("--arms", "bare,zero,memory,retrieval", "--max-tokens", 8),
    )
    assert finished.exit_code == 0, finished.output
    (task,) = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert list(task["arms"]) == ["memory", "zero", "bare"]
    assert task["max_tokens"] == 8
    assert {(row["arm"], *row["over"]) for row in task["differences"]} == {("memory", "bare"), ("zero", "bare")}


def test_a_whole_conversation_that_does_not_fit_is_cut_and_said(chatterer: Path, data: Path, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    save_bfcl(directory)
    turns = [[{"role": "user", "content": f"It is day {n}, and it is raining here."}] for n in range(30)]
    (directory / "bfcl_memory" / "memory_customer.json").write_text(json.dumps({"question": turns}) + "\n")
    finished = run(
        *("--model", chatterer, "--adapter", "none", "--task", "bfcl-memory", "--data-dir", directory),
        *("--arms", "whole", "--out", tmp_path / "out"),
    )
    assert finished.exit_code == 0, finished.output
    (task,) = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert task["arms"]["whole"]["cut"] == 2  # the two questions about this conversation
    assert "the newest messages kept: `whole` 2." in (tmp_path / "out" / "report.md").read_text()


def test_own_questions_are_measured(chatterer: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "My cat is Mia."}], "question": "My cat?", "answers": ["Mia"]}
    write_lines(tmp_path / "mine.jsonl", [row, row | {"question": "Which cat?", "kind": "which"}])
    command = ("--model", chatterer, "--task", "own", "--data", tmp_path / "mine.jsonl", "--out", tmp_path / "out")
    finished = run(*command, "--arms", "memory,constant", "--require", "own:constant>0.9")
    assert finished.exit_code == 0, finished.output
    (task,) = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert (task["questions"], task["conversations"], list(task["kinds"])) == (2, 1, ["", "which"])
    assert task["files"][0]["name"] == "mine.jsonl"


def test_published_scores_stand_beside_the_share(chatterer: Path, tmp_path: Path) -> None:
    save_hotpotqa(tmp_path)
    command = ("--model", chatterer, "--task", "hotpotqa", "--data-dir", tmp_path, "--out", tmp_path / "out")
    finished = run(*command, "--adapter", "none", "--arms", "whole,constant")
    assert finished.exit_code == 0, finished.output
    (task,) = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert list(task["arms"]["whole"]["scores"]) == ["exact match", "HotpotQA F1"]
    # The one comparison question, and the better of the two answers to bridge questions.
    assert task["arms"]["constant"]["scores"]["exact match"]["value"] == pytest.approx(2 / 3)
    assert "| right (interval) | exact match | HotpotQA F1 |" in (tmp_path / "out" / "report.md").read_text()


def test_mistakes_are_found_before_a_model_is_loaded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> Engine:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("agentmem.load", loaded)
    good = ("--task", "sgd", "--data-dir", data, "--out", tmp_path / "out")
    for arguments, error, message in (
        ((*good, "--arms", "memory,zeroed"), ConfigError, "arms are memory, .*found 'zeroed'"),
        ((*good, "--arms", "memory,llmlingua"), ConfigError, "llmlingua compresses with .* not at hand; name them"),
        ((*good, "--require", "memory>>1"), ConfigError, "a requirement is like"),
        ((*good, "--require", "hybrid>0.1"), ConfigError, "names 'hybrid'; in the task sgd are measured"),
        ((*good, "--context-tokens", 3), ConfigError, "context_tokens"),
        ((*good, "--limit", 1), ConfigError, "raise the limit"),
        ((*good, "--adapter", "none", "--arms", "memory,bare"), MissingAdapterError, "memory need memory"),
        ((*good, "--data", "mine.jsonl"), ConfigError, "--data is no option of --task sgd"),
        (("--task", "own", *good[2:]), ConfigError, r"name it \(--data\)"),
        ((*good, "--cells", "known-1"), ConfigError, "--cells is no option of --task sgd"),
        (("--task", "sgd,bfcl", *good[2:]), ConfigError, "tasks are sgd, .*found 'bfcl'"),
        (("--task", "ifeval", *good[2:], "--arms", "whole"), ConfigError, "ifeval is measured by bare"),
        (("--task", "sgd", "--out", tmp_path / "out"), ConfigError, "--data-dir"),
        (("--task", "sgd", "--data-dir", tmp_path), DataError, "sgd reads"),
    ):
        finished = run(*arguments)
        assert isinstance(finished.exception, error), (arguments, finished.output, finished.exception)
        with pytest.raises(error, match=message):
            raise finished.exception
    assert not (tmp_path / "out").exists()


def test_the_bare_model_is_asked_alone_by_default(data: Path) -> None:
    comparison = prepare_comparison(["sgd"], [data], arms=["bare", "whole", "bare"], has_memory=False)
    ((_, arms),) = comparison.tasks
    assert arms == ("bare", "whole")
