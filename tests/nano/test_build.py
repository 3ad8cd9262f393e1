"""The recipe end to end, with a model far too small and short to know anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from threading import current_thread, main_thread

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentmem import SteeredModel
from agentmem.errors import ConfigError
from agentmem.nano.recipe.build import Recipe, build

MICRO = Recipe(
    tokenizer_episodes=20,
    width=32,
    layers=2,
    base_steps=3,
    skill_steps=2,
    again_steps=2,
    base_episodes=1,
    rank=4,
    memory_steps=2,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = torch.get_num_threads()
    yield build(tmp_path_factory.mktemp("nano"), seed=1, recipe=MICRO, threads=1, console=Console(file=StringIO()))
    assert torch.get_num_threads() == before


def test_a_build_loads_with_auto_classes_and_its_adapter_attaches(built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built)
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert model.dtype == torch.bfloat16
    steered = SteeredModel.attach(model, adapter=built / "adapter")
    assert steered.state_shape == (2, 1, 4, 4)
    ids = torch.tensor([tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}])["input_ids"]])
    assert torch.isfinite(steered(ids).state).all()


def test_nothing_but_the_shipped_files_is_left_and_the_recipe_tells_them(built: Path) -> None:
    assert not (built / ".build").exists()
    recipe = json.loads((built / "recipe.json").read_text("utf-8"))
    assert recipe["seed"] == 1
    assert recipe["recipe"]["rank"] == 4
    assert [recipe["training"][name]["steps"] for name in ("base", "skills", "adapter")] == [3, 2, 2]
    for name, size in recipe["bytes"].items():
        assert (built / name).stat().st_size == size


def test_the_same_seed_makes_the_same_weights_even_when_stopped(built: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Breaking(StringIO):
        """A terminal that is closed once the adapter is being trained."""

        def write(self, text: str) -> int:
            # Not where the thread writes that draws the bars meanwhile: nobody would catch it there.
            if "adapter" in text and current_thread() is main_thread():
                raise Stop
            return super().write(text)

    with pytest.raises(Stop):
        build(tmp_path, seed=1, recipe=MICRO, threads=1, console=Console(file=Breaking(), force_terminal=True))
    assert (tmp_path / ".build/skills/checkpoint-2").exists()
    build(tmp_path, seed=1, recipe=MICRO, threads=1, console=Console(file=StringIO()))
    for name in ("model.safetensors", "adapter/adapter.safetensors"):
        first, second = load_file(built / name), load_file(tmp_path / name)
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_an_unfinished_build_of_another_seed_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".build").mkdir()
    (tmp_path / ".build" / "run.json").write_text('{"seed": 0}')
    with pytest.raises(ConfigError, match="unfinished build"):
        build(tmp_path, seed=1, recipe=MICRO, threads=1, console=Console(file=StringIO()))
