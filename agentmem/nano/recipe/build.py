"""Builds nano from scratch: language, tokenizer, base, adapter, and the directory that ships.

    <out>/config.json generation_config.json model.safetensors (bfloat16)
          tokenizer.json tokenizer_config.json chat_template.jinja
          adapter/delta_mem_config.json adapter/adapter.safetensors
          recipe.json

Everything follows from the seed. An interrupted build continues from its last checkpoint (in `<out>/.build`); finished
parts are not made again. Before the adapter is trained, the base is frozen as it will ship, rounded to bfloat16.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from agentmem import __version__
from agentmem.delta.adapter import SAFETENSORS_FILE
from agentmem.delta.config import MemoryConfig
from agentmem.delta.model import SteeredModel
from agentmem.errors import ConfigError
from agentmem.nano.recipe.batches import BaseBatches
from agentmem.nano.recipe.memory_batches import MemoryBatches
from agentmem.nano.recipe.model import fresh_model, nano_config, tie_twins
from agentmem.nano.recipe.tokenizer import train_tokenizer, twins
from agentmem.training.adapter import start_as_copier, train_adapter
from agentmem.training.loop import PARTS, TrainingLog, TrainingPlan, keep_memory
from agentmem.training.pretrain import pretrain

_OnStep = Callable[[int, TrainingLog], None]


@dataclass(frozen=True)
class Recipe:
    """Sizes and training lengths.

    The base is trained in three stages, each with a cosine schedule: the first on everything, in a curriculum; the
    other two mostly on tools and facts.
    """

    tokenizer_episodes: int = 4000
    width: int = 128
    layers: int = 4
    base_steps: int = 1600
    base_rate: float = 3e-3
    skill_steps: int = 2400
    skill_rate: float = 1.5e-3
    again_steps: int = 1600
    again_rate: float = 1.2e-3
    skill_share: float = 0.75
    base_episodes: int = 12
    skill_episodes: int = 9
    rank: int = 32
    memory_steps: int = 1400
    memory_rate: float = 3e-3

    @property
    def memory(self) -> MemoryConfig:
        """The memory's options: uncoupled retention, since with retention 1 - beta every write also forgets."""
        return MemoryConfig(rank=self.rank, alpha=2.0 * self.rank, couple_lambda=False)


def build(
    out_dir: str | Path,
    *,
    seed: int = 0,
    recipe: Recipe | None = None,
    processes: int = PARTS,
    console: Console | None = None,
) -> Path:
    """Build nano in `out_dir` and return that directory.

    Args:
        out_dir: created if missing; a finished build in it is replaced only once the new one is complete.
        seed: seed of the tokenizer's corpus, of the initial weights and of every batch.
        recipe: sizes or lengths other than the shipped model's.
        processes: number of processes that share the work, with one thread each; the weights are the same to the bit.
        console: where progress is shown; None = standard output.

    Raises:
        ConfigError: `<out>/.build` holds checkpoints of another seed or recipe.
    """
    recipe = recipe or Recipe()
    out = Path(out_dir)
    work = out / ".build"
    work.mkdir(parents=True, exist_ok=True)
    _claim(work, seed, recipe)
    keep_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    try:
        with Progress(*columns, console=console) as progress:
            tokenizer = _tokenizer(work, seed, recipe)
            pairs = twins(tokenizer)
            model = fresh_model(nano_config(tokenizer, width=recipe.width, layers=recipe.layers), seed, pairs)
            tie_twins(model, pairs)
            logs = {}
            for number, (name, plan) in enumerate(_plans(recipe).items()):
                shower = _shower(progress, name, plan.steps)
                logs[name] = _base(work, name, model, tokenizer, seed + number, recipe, plan, processes, shower)
            _round(model)
            steered = SteeredModel.attach(model, config=recipe.memory, seed=seed)
            logs["adapter"] = _memory(
                work, steered, tokenizer, seed, recipe, processes, _shower(progress, "adapter", recipe.memory_steps)
            )
    finally:
        torch.set_num_threads(threads)
    _ship(out, tokenizer, model, steered)
    text = json.dumps(_report(out, model, steered, seed, recipe, logs) | {"processes": processes}, indent=2) + "\n"
    (out / "recipe.json").write_text(text, "utf-8")
    shutil.rmtree(work)
    return out


def _claim(work: Path, seed: int, recipe: Recipe) -> None:
    """Record which build `work` belongs to; refuse to continue another one's."""
    this_build = json.dumps({"seed": seed, "recipe": asdict(recipe)}, sort_keys=True)
    note = work / "run.json"
    noted_build = note.read_text("utf-8") if note.exists() else this_build
    if noted_build != this_build:
        raise ConfigError(
            f"{work} holds an unfinished build of {noted_build}; expected {this_build}; "
            "finish that one or remove the directory"
        )
    note.write_text(this_build, "utf-8")


def _tokenizer(work: Path, seed: int, recipe: Recipe) -> PreTrainedTokenizerBase:
    if not (work / "tokenizer" / "tokenizer_config.json").exists():
        train_tokenizer(seed, episodes=recipe.tokenizer_episodes).save_pretrained(work / "tokenizer")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(work / "tokenizer")
    return tokenizer


def _plans(recipe: Recipe) -> dict[str, TrainingPlan]:
    """The training stages of the base."""
    return {
        "base": TrainingPlan(recipe.base_steps, recipe.base_rate, warmup=30),
        "skills": TrainingPlan(recipe.skill_steps, recipe.skill_rate, warmup=30),
        "again": TrainingPlan(recipe.again_steps, recipe.again_rate, warmup=30),
    }


def _base(
    work: Path,
    name: str,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    recipe: Recipe,
    plan: TrainingPlan,
    processes: int,
    on_step: _OnStep,
) -> TrainingLog:
    """Train one stage of the base: the first in a curriculum, the others mostly on tools and facts."""
    first = name == "base"
    batches = BaseBatches(
        tokenizer,
        seed=seed,
        episodes=recipe.base_episodes if first else recipe.skill_episodes,
        steps=plan.steps,
        skills=None if first else recipe.skill_share,
    )
    checkpoint = work / f"{name}.safetensors"
    return pretrain(model, batches, plan, seed=seed, processes=processes, checkpoint=checkpoint, on_step=on_step)


def _memory(
    work: Path,
    steered: SteeredModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    recipe: Recipe,
    processes: int,
    on_step: _OnStep,
) -> TrainingLog:
    start_as_copier(steered)
    return train_adapter(
        steered,
        MemoryBatches(tokenizer, seed=seed, steps=recipe.memory_steps),
        TrainingPlan(recipe.memory_steps, recipe.memory_rate, weight_decay=0.0),
        processes=processes,
        checkpoint=work / "adapter.safetensors",
        on_step=on_step,
    )


def _round(model: Qwen3ForCausalLM) -> None:
    """Round the base to bfloat16 and convert it back: the numbers that ship, at the speed of float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))


def _ship(out: Path, tokenizer: PreTrainedTokenizerBase, model: Qwen3ForCausalLM, steered: SteeredModel) -> None:
    steered.detach()
    with torch.no_grad():
        steered.memory.to(torch.bfloat16)
    steered.save(out / "adapter")
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Weight files are created readable by their owner only; these must be readable by whoever installs the package.
    for file in (out / "model.safetensors", out / "adapter" / SAFETENSORS_FILE):
        file.chmod(0o644)


def _report(
    out: Path, model: Qwen3ForCausalLM, steered: SteeredModel, seed: int, recipe: Recipe, logs: dict[str, TrainingLog]
) -> dict[str, Any]:
    shipped = [p for p in out.rglob("*") if p.is_file() and ".build" not in p.parts and p.name != "recipe.json"]
    return {
        "seed": seed,
        "recipe": asdict(recipe),
        "parameters": {
            "base": sum(p.numel() for p in model.parameters()),
            "adapter": sum(p.numel() for p in steered.memory.parameters()),
            "vocabulary": model.config.vocab_size,
        },
        "training": {
            name: {
                "steps": len(log.losses),
                "seconds": round(log.seconds, 1),
                "loss_every_100_steps": [round(loss, 4) for loss in log.losses[99::100]],
                "final_loss": round(log.recent(), 4),
            }
            for name, log in logs.items()
        },
        "versions": {
            "agentmem": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "bytes": {str(p.relative_to(out)): p.stat().st_size for p in sorted(shipped)},
    }


def _shower(progress: Progress, name: str, steps: int) -> Callable[[int, TrainingLog], None]:
    task = progress.add_task(name, total=steps, loss="-")

    def show(step: int, log: TrainingLog) -> None:
        progress.update(task, completed=step, loss=f"{log.recent():.3f}")

    return show
