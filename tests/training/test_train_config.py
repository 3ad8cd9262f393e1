"""The keys of a run: defined once, checked with a word of help, the same in file, command and docs."""

from __future__ import annotations

import re
import runpy
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from agentmem.errors import ConfigError, DataError
from agentmem.training import command
from agentmem.training.__main__ import app
from agentmem.training.command import accelerate_path, from_options
from agentmem.training.config import TrainConfig

PAGE = Path(__file__).parents[2] / "docs/reference/train.md"


def default(field: Any) -> Any:
    return {} if field.default is MISSING else field.default


def test_every_key_is_an_option_of_the_command() -> None:
    own = {"config", "dry_run", "accelerate_config", "help"}
    names = {parameter.name for parameter in get_command(app).params}
    assert names - own == {field.name for field in fields(TrainConfig)}


def test_an_error_is_one_line_that_commands_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise DataError("talks\x1b[2J.jsonl:1 is\nno JSON")

    monkeypatch.setattr(command, "train_command", refused)
    monkeypatch.setattr(sys, "argv", ["agentmem.training"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(command.__file__).with_name("__main__.py")), run_name="__main__")
    assert ended.value.code == 3
    assert capsys.readouterr().err == "DataError: talks\\x1b[2J.jsonl:1 is no JSON\n"


def test_the_page_has_every_key_with_its_default_and_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    shown = {name: (value, text) for name, value, text in rows}
    for field in fields(TrainConfig):
        value = yaml.safe_dump(default(field), default_flow_style=True).splitlines()[0]
        value = value.replace("!!python/tuple ", "")
        assert shown.pop(field.name) == (f"`{value}`", field.metadata["help"]), field.name
    assert not shown


def test_options_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("max_steps: 7\nlearning_rate: 3e-3\nmemory: {rank: 4, alpha: 8}\nbetas: [0.8, 0.9]\n", "utf-8")
    given = {"max_steps": 9, "memory": ["rank=16", "couple_lambda=false"], "data": ["a.jsonl", "facts"], "seed": None}
    config = from_options(file, given)
    assert (config.max_steps, config.learning_rate, config.betas, config.seed) == (9, 0.003, (0.8, 0.9), 0)
    assert config.memory == {"rank": 16, "alpha": 8, "couple_lambda": False}
    assert config.data == ("a.jsonl", "facts")
    assert TrainConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lerning_rate": 1}, "did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"max_steps": 1.5}, "max_steps must be a whole number"),
        ({"resume": "yes"}, "resume must be true or false"),
        ({"start": "copy"}, "did you mean 'copier'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"betas": [0.9]}, "betas must be 2 values"),
        ({"memory": "rank"}, "memory must hold keys and values"),
        ({"data": ["a", "b"], "data_shares": [1]}, "a number for each source"),
        ({"patience": 2, "evaluate_every": 0}, "patience counts measurements"),
        ({"adapter": "dir", "memory": {"rank": 4}}, "an adapter has memory options of its own"),
        ({"report_to": ["wandb"]}, "tensorboard, trackio"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_word_of_help(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        TrainConfig.from_mapping(values)


def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    for text in ("- a\n- b\n", "a: [1\n"):
        file.write_text(text, "utf-8")
        with pytest.raises(ConfigError, match=r"train\.yaml"):
            TrainConfig.read(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainConfig.read(tmp_path / "missing.yaml")


def test_a_resumed_run_may_be_divided_otherwise_but_not_learn_otherwise() -> None:
    run = TrainConfig(model="m", batch_size=8)
    assert not TrainConfig(model="m", batch_size=2, accumulate=4, save_every=3).differences(run.to_mapping(), 8, 8)
    assert TrainConfig(model="m", batch_size=4).differences(run.to_mapping(), 4, 8) == [
        "a step had 8 conversations, now 4 (batch_size x accumulate x devices)"
    ]
    assert TrainConfig(model="m", seed=1).differences(run.to_mapping(), 8, 8) == ["seed was 0, now 1"]


def test_an_accelerate_config_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="ddp, fsdp, zero2"):
        accelerate_path("zero9")
