"""A run from its config to an adapter: what is refused before weights are loaded, and what is left at the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from rich.console import Console
from typer.testing import CliRunner

import agentmem
from agentmem.delta.adapter import load_adapter
from agentmem.errors import AgentMemError, ConfigError, DataError, TrainingError
from agentmem.prompt.transcript import Transcript
from agentmem.training import run as training
from agentmem.training.__main__ import app
from agentmem.training.command import accelerate_path
from agentmem.training.config import TrainConfig
from agentmem.training.run import dry_run, train
from agentmem.training.step import MemoryStep

pytestmark = pytest.mark.usefixtures("one_thread")
MICRO: dict[str, Any] = {
    "model": "nano",
    "data": ("facts",),
    "device": "cpu",
    "memory": {"rank": 4},
    "facts": {"facts": (1, 2), "fillers": (0, 0)},
    "max_steps": 4,
    "batch_size": 2,
    "held_out": 4,
    "evaluate_every": 2,
    "save_every": 2,
    "probes": 3,
    "probe_tokens": 4,
}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(training, "load", refuse)


def config(out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**MICRO, "out": str(out), **changes})


def talk(number: int) -> list[dict[str, Any]]:
    """Three turns; the last reply says again what the first one told."""
    return [
        {"role": "user", "content": f"My editor is helix {number}."},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is my editor?"},
        {"role": "assistant", "content": f"Your editor is helix {number}."},
    ]


def chats(path: Path, *, count: int = 30, **extra: Any) -> str:
    rows = [json.dumps({"messages": talk(number), **extra}) for number in range(count)]
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return str(path)


def test_a_run_leaves_an_adapter_that_loads_and_its_evidence(tmp_path: Path) -> None:
    seen: list[Any] = []
    result = train(config(tmp_path / "out"), on_progress=seen.append)
    assert (result.finished, result.steps) == (True, 4)
    assert [now.step for now in seen] == [1, 2, 3, 4]
    assert set(result.arms) == {"memory", "zero", "foreign", "bare", "whole"}
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "arms" in line] == [2, 4]
    assert (tmp_path / "out/predictions.jsonl").exists()
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert "base_model: nano" in card
    assert "4 steps in" in card
    assert "| its own memory |" in card
    assert not list((tmp_path / "out").glob(".*"))
    with agentmem.load("nano", tmp_path / "out", device="cpu") as engine:
        assert engine.steered is not None
        assert engine.steered.config.rank == 4
        # Trained: the copier's weights would be tied still.
        tensors = engine.steered.adapter.tensors
        assert not torch.equal(*(tensors[f"model.layers.0.self_attn.memory_{head}_proj"] for head in "qk"))


def test_a_file_of_conversations_is_measured_by_its_losses(tmp_path: Path) -> None:
    changes = {"data": (chats(tmp_path / "chats.jsonl"),), "max_steps": 2, "memory": {"write_strategy": "message"}}
    train(config(tmp_path / "out", **changes), on_progress=lambda _: None)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text("utf-8").splitlines()]
    (arms,) = [line["arms"] for line in lines if "arms" in line]
    assert set(arms) == {"memory_loss", "zero_loss", "foreign_loss"}


@pytest.mark.usefixtures("no_weights")
def test_a_template_without_tools_trains_without_tools(tmp_path: Path) -> None:
    model = tmp_path / "model"
    without = shutil.ignore_patterns("adapter", "*.safetensors", "agentmem_sha256.json")
    shutil.copytree(Path(agentmem.__file__).parent / "nano/weights", model, ignore=without)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (model / "chat_template.jinja").write_text(template, "utf-8")
    shown = StringIO()
    dry_run(
        config(tmp_path / "out", model=str(model), facts={"acts": {"ask": 0.5, "tool_call": 0.5}}), Console(file=shown)
    )
    assert "pass 1" in shown.getvalue()
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    data = (chats(tmp_path / "chats.jsonl", tools=[tool]),)
    with pytest.raises(ConfigError, match="template does not show them"):
        dry_run(config(tmp_path / "out", model=str(model), data=data))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": ""}, "needs model"),
        ({"data": ("fact",)}, "did you mean 'facts'"),
        ({"memory": {"rnk": 4}}, "did you mean 'rank'"),
        ({"memory": {"target_layers": [9]}}, "9"),
        ({"facts": {"changs": 0.1}}, "did you mean 'changes'"),
        ({"facts": {"facts": 3}}, "facts: facts must be 2 values; found 3"),
        ({"facts": {"changes": "often"}}, "facts: changes must be a number"),
        ({"memory": {"alpha": "4e1", "write_strategy": "sentences"}}, "did you mean 'sentence'"),
        ({"report_to": ("trackio",)}, "not installed"),
        ({"push": "nobody/nothing"}, "no token"),
        ({"push": "nobody"}, "ORG/NAME"),
        ({"push": "https://hub/nobody/nothing"}, "ORG/NAME"),
        ({"data": ("personas",)}, "data_dir"),
        ({"device": "cuda"}, "device: auto takes"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(
    tmp_path: Path, changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(training, "find_spec", lambda _: None)
    with pytest.raises(AgentMemError, match=says):
        train(config(tmp_path / "out", **changes), on_progress=lambda _: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_weights")
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="needs out"):
        train(TrainConfig(model="nano", data=("facts",)))
    with pytest.raises(ConfigError, match="file is a file"):
        train(config(tmp_path / "file"), on_progress=lambda _: None)
    with pytest.raises(ConfigError, match="cannot be written to"):
        train(config(tmp_path / "file/out"), on_progress=lambda _: None)
    assert (tmp_path / "file").read_text() == "mine"


def test_few_held_out_conversations_are_measured_against_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The foreign memory is that of another conversation, however many there are; alone there is no control."""
    counts, losses = list[int](), MemoryStep.losses

    def watched(step: MemoryStep, batch: Any, *rest: Any) -> Any:
        counts.append(batch["count"])
        return losses(step, batch, *rest)

    monkeypatch.setattr(MemoryStep, "losses", watched)
    few = {"data": (chats(tmp_path / "chats.jsonl", count=60),), "max_steps": 1, "evaluate_every": 1, "facts": {}}
    train(config(tmp_path / "three", held_out=3, **few), on_progress=lambda _: None)
    assert counts == [3, 3, 3]
    counts.clear()
    train(config(tmp_path / "one", held_out=1, **few), on_progress=lambda _: None)
    assert not counts
    assert "Not measured." in (tmp_path / "one/README.md").read_text("utf-8")


class _Hub:
    """In place of the hub's client: what was asked of it."""

    calls: ClassVar[list[Any]] = []
    role = "write"
    fails: ClassVar[Exception | None] = None

    def whoami(self) -> dict[str, Any]:
        return {"name": "me", "auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, name: str, *, exist_ok: bool) -> None:
        self.calls.append(("create", name, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
        if self.fails is not None:
            raise self.fails
        files = filter_repo_objects((path.name for path in folder_path.iterdir()), allow_patterns=allow_patterns)
        self.calls.append(("upload", repo_id, sorted(files)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = type("_FreshHub", (_Hub,), {"calls": []})
    monkeypatch.setattr("huggingface_hub.HfApi", made)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    return made


def test_a_finished_adapter_is_uploaded_with_its_card_in_the_half_size_that_was_measured(
    tmp_path: Path, hub: Any
) -> None:
    out, push = tmp_path / "out", {"max_steps": 2, "push": "me/memory", "store": "bfloat16"}
    hub.fails = httpx.ConnectError("no route")
    with pytest.raises(TrainingError, match=r"could not be uploaded to me/memory: no route.*--resume"):
        train(config(out, **push), on_progress=lambda _: None)
    hub.fails = None
    hub.calls.clear()
    seen = list[Any]()
    assert train(config(out, resume=True, **push), on_progress=seen.append).finished
    assert not seen
    files = ["README.md", "adapter.safetensors", "delta_mem_config.json", "predictions.jsonl"]
    assert hub.calls == [("create", "me/memory", True), ("upload", "me/memory", files)]
    assert 'adapter="me/memory"' in (out / "README.md").read_text("utf-8")
    stored = load_adapter(out)
    assert {tensor.dtype for tensor in stored.tensors.values()} == {torch.bfloat16}
    lines = (out / "predictions.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["adapter_fingerprint"] for line in lines} == {stored.fingerprint}
    with agentmem.load("nano", out, device="cpu") as engine:
        assert engine.steered is not None
        assert next(engine.steered.memory.parameters()).dtype == torch.float32


@pytest.mark.usefixtures("no_weights")
def test_a_token_that_cannot_upload_is_found_before_training(tmp_path: Path, hub: Any) -> None:
    hub.role = "read"
    with pytest.raises(ConfigError, match="that of me only reads"):
        train(config(tmp_path / "out", push="me/memory"), on_progress=lambda _: None)

    def refused(_: Any) -> None:
        raise httpx.HTTPError("401 Unauthorized")

    hub.whoami = refused
    with pytest.raises(ConfigError, match="401 Unauthorized"):
        train(config(tmp_path / "out", push="me/memory"), on_progress=lambda _: None)
    assert not hub.calls


@pytest.mark.usefixtures("no_weights")
def test_data_that_the_model_cannot_show_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = {"type": "function", "function": {"name": "open", "parameters": {"type": "object", "properties": {}}}}
    monkeypatch.setattr(Transcript, "takes_tools", lambda _: False)
    with pytest.raises(ConfigError, match="does not show them"):
        train(config(tmp_path / "out", data=(chats(tmp_path / "chats.jsonl", tools=[tool]),)))
    (tmp_path / "empty.jsonl").write_text('{"messages": []}\n', "utf-8")
    with pytest.raises(DataError):
        train(config(tmp_path / "out", data=(str(tmp_path / "empty.jsonl"),)))


def test_a_directory_that_holds_another_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(config(out, max_steps=2, evaluate_every=0), on_progress=lambda _: None)
    with pytest.raises(ConfigError, match="--resume to go on"):
        train(config(out, max_steps=2, evaluate_every=0))
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        train(config(out, max_steps=2, evaluate_every=0, seed=1, resume=True))
    again = train(config(out, max_steps=2, evaluate_every=0, resume=True), on_progress=lambda _: None)
    assert again.steps == 2
    agentmem.load("nano", device="cpu", adapter=out).close()
    (out / "train.json").unlink()
    with pytest.raises(ConfigError, match="holds an adapter"):
        train(config(out, resume=True))


def test_out_of_memory_names_what_helps_with_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(training, "_trainer", full)
    with pytest.raises(
        TrainingError, match=r"batch_size: 1 needs .* MB .*gradient_checkpointing.* MB.*truncate: \d .* MB"
    ):
        train(config(tmp_path / "out"), on_progress=lambda _: None)
    small = {"batch_size": 1, "gradient_checkpointing": True, "truncate": 1}
    with pytest.raises(TrainingError, match="What helps: shorter conversations"):  # all three are in use
        train(config(tmp_path / "small", **small), on_progress=lambda _: None)


def test_weights_that_do_not_fit_are_told_apart_from_steps_that_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(training, "load", full)
    with pytest.raises(
        TrainingError, match=r"weights were loaded: [\d,]+ parameters .*dtype: bfloat16 .*quantize: 4bit"
    ):
        train(config(tmp_path / "out", dtype="float32"), on_progress=lambda _: None)


@pytest.mark.usefixtures("no_weights")
def test_a_dry_run_marks_what_each_token_is_for(tmp_path: Path) -> None:
    shown = StringIO()
    changes = {"data": (chats(tmp_path / "chats.jsonl"),), "history": "turns", "window_messages": 3, "out": ""}
    with (tmp_path / "chats.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"messages": [}\n')
    dry_run(TrainConfig(**{**MICRO, **changes}), Console(file=shown, width=200))
    text = shown.getvalue()
    # The earlier reply is in the window of the last turn: read again, not written again.
    assert "read               '<|im_start|>user" in text
    assert "written, loss 1" in text
    assert "chats.jsonl: 2" in text
    assert "left out: 1 with a bad line" in text
    assert "chats.jsonl:31: not JSON" in text
    assert "of which the losses are measured" in text


def test_the_command_takes_a_file_and_options(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("model: nano\ndata: facts\ndevice: cpu\nout: nowhere\n", "utf-8")
    result = CliRunner().invoke(
        app, ["--config", str(file), "--dry-run", "--held-out", "4", "--memory", "write_strategy=sentence"]
    )
    assert result.exit_code == 0, result.output
    assert "written, loss 1" in result.output
    assert "are written before the others read" in result.output


def test_ctrl_c_before_the_first_step_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    result = CliRunner().invoke(app, ["--model", "nano", "--data", "facts", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "--resume goes on" in result.output


@pytest.mark.slow
def test_accelerate_launches_two_processes_that_learn_what_one_learns(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(json.dumps({**MICRO, "evaluate_every": 4, "history": "turns"}), "utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_path("ddp"))]
    launch += ["--num_processes", "2", "-m", "agentmem.training", "--config", str(file)]
    done = subprocess.run(
        [*launch, "--out", str(tmp_path / "two"), "--batch-size", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    train(config(tmp_path / "one", evaluate_every=4, history="turns"), on_progress=lambda _: None)
    logs = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "log.jsonl").read_text("utf-8").splitlines()
            if "loss" in line
        ]
        for name in ("one", "two")
    ]
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


def test_reading_and_gradients_change_with_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, str]] = []
    forward = MemoryStep.forward

    def watched(step: MemoryStep, batch: Any) -> Any:
        seen.append((step.reading, step.gradient))
        return forward(step, batch)

    monkeypatch.setattr(MemoryStep, "forward", watched)
    course = {"read_warmup": 0.5, "gradient": "first_order", "full_gradient_from": 0.5, "evaluate_every": 0}
    train(config(tmp_path / "out", **course), on_progress=lambda _: None)
    assert seen == [(0.0, "first_order"), (0.5, "first_order"), (1.0, "full"), (1.0, "full")]
