"""A static LoRA: as many parameters as the memory, the same loop and examples, and the arms that use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import agentmem
from agentmem import MemoryConfig, SteeredModel
from agentmem.errors import AdapterError, ConfigError
from agentmem.training.config import TrainConfig
from agentmem.training.run import train
from agentmem.training.static import StaticAdapter, attach_static, static_parameters
from agentmem_cli.app import app

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # of peft
]

MICRO: dict[str, Any] = {
    "model": "nano",
    "data": ("facts",),
    "device": "cpu",
    "facts": {"facts": (1, 2), "fillers": (0, 0)},
    "max_steps": 6,
    "warmup": 1,
    "batch_size": 4,
    "held_out": 4,
    "save_every": 3,
    "static": True,
}


def bare() -> Any:
    with agentmem.load("nano", adapter=False, device="cpu") as engine:
        return engine.model


@pytest.mark.parametrize(
    "options", [{"rank": 8}, {"rank": 4, "num_state_heads": 4}, {"rank": 8, "delta_heads": ("o",)}]
)
def test_it_has_about_as_many_parameters_as_the_memory(options: dict[str, Any]) -> None:
    model, memory = bare(), MemoryConfig(**options)
    steered = SteeredModel.attach(model, config=memory)
    wanted = sum(parameter.numel() for parameter in steered.memory.parameters())
    steered.detach()
    static = attach_static(model, memory, seed=0)
    names = [name for name, parameter in static.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in names)
    assert {f"{head}_proj" for head in memory.delta_heads} == {name.split(".")[-4] for name in names}
    each = static_parameters(static) / static.peft_config["default"].r
    assert abs(static_parameters(static) - wanted) <= each / 2 + 1, "no other rank comes nearer"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("static")
    result = train(TrainConfig(**MICRO, out=str(out)), on_progress=lambda _: None)
    assert (result.finished, result.steps) == (True, 6)
    return out


def test_it_is_trained_in_the_same_loop(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert min(losses[3:]) < losses[0]
    assert json.loads((trained / "adapter_config.json").read_text("utf-8"))["peft_type"] == "LORA"
    with agentmem.load("nano", adapter=False, device="cpu") as plain:
        ids = torch.tensor([plain.tokenizer.encode("My editor is helix.")])
        with torch.no_grad():
            before = plain.model(ids).logits
        with StaticAdapter.find(trained).into(plain) as engine, torch.no_grad():
            assert not torch.allclose(engine.model(ids).logits, before)


def test_it_is_an_arm(trained: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "My cat is Mia."}], "question": "My cat?", "answers": ["Mia"]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    command = ["evaluate", "--task", "own", "--data", tmp_path / "mine.jsonl", "--out", tmp_path / "out"]
    command += ["--arms", "bare,static,static_whole", "--max-tokens", 4]
    finished = CliRunner().invoke(app, [*map(str, command), "--static", str(trained)])
    assert finished.exit_code == 0, finished.output
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    arms = results["tasks"][0]["arms"]
    assert list(arms) == ["bare", "static", "static_whole"]
    assert arms["static"]["prompt_tokens"] == arms["bare"]["prompt_tokens"] < arms["static_whole"]["prompt_tokens"]
    assert results["static_fingerprint"] == StaticAdapter.find(trained).fingerprint
    refused = CliRunner().invoke(app, [str(part) for part in command])
    assert isinstance(refused.exception, ConfigError)
    assert "train one (agentmem train --static)" in str(refused.exception)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="a static LoRA is a directory with"):
        StaticAdapter.find(tmp_path)
    with pytest.raises(ConfigError, match="a static LoRA starts anew"):
        TrainConfig(static=True, adapter="somewhere")
