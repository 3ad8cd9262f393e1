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
from agentmem.delta.fingerprint import write_digests
from agentmem.delta.model import SteeredModel
from agentmem.errors import ConfigError
from agentmem.nano.recipe.batches import BaseBatches
from agentmem.nano.recipe.memory_batches import WRITE_WEIGHT, MemoryBatches
from agentmem.nano.recipe.model import fresh_model, nano_config, tie_twins
from agentmem.nano.recipe.tokenizer import train_tokenizer, twins
from agentmem.training.checkpoints import LOG_FILE, logged
from agentmem.training.config import TrainConfig
from agentmem.training.examples import collate
from agentmem.training.fitted import start_as_copier
from agentmem.training.loop import ExampleDataset, TrainProgress, training_arguments
from agentmem.training.pretrain import pretrain
from agentmem.training.sources import ENDLESS
from agentmem.training.step import MemoryStep, total_weight
from agentmem.training.trainer import MemoryTrainer

_OnProgress = Callable[[TrainProgress], None]


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
    threads: int | None = None,
    console: Console | None = None,
) -> Path:
    """Build nano in `out_dir` and return that directory.

    Args:
        out_dir: created if missing; a finished build in it is replaced only once the new one is complete.
        seed: seed of the tokenizer's corpus, of the initial weights and of every batch.
        recipe: sizes or lengths other than the shipped model's.
        threads: CPU threads; None = torch's own number. With the same number the weights are the same to the bit.
        console: where progress is shown; None = standard output.

    Raises:
        ConfigError: `<out>/.build` holds checkpoints of another seed or recipe.
    """
    recipe = recipe or Recipe()
    out = Path(out_dir)
    work = out / ".build"
    work.mkdir(parents=True, exist_ok=True)
    _claim(work, seed, recipe)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    try:
        with Progress(*columns, console=console) as progress:
            tokenizer = _tokenizer(work, seed, recipe)
            pairs = twins(tokenizer)
            model = fresh_model(nano_config(tokenizer, width=recipe.width, layers=recipe.layers), seed, pairs)
            tie_twins(model, pairs)
            for number, (name, (steps, rate)) in enumerate(_stages(recipe).items()):
                config = _config(work / name, seed + number, steps, rate, weight_decay=0.01, warmup=30)
                pretrain(
                    model,
                    _base_batches(name, tokenizer, config, recipe),
                    config,
                    on_progress=_shower(progress, name, steps),
                )
            _round(model)
            steered = SteeredModel.attach(model, config=recipe.memory, seed=seed)
            _memory(work, steered, tokenizer, seed, recipe, _shower(progress, "adapter", recipe.memory_steps))
    finally:
        torch.set_num_threads(threads_before)
    logs = {name: logged(work / name / LOG_FILE) for name in (*_stages(recipe), "adapter")}
    _ship(out, tokenizer, model, steered)
    text = json.dumps(_report(out, model, steered, seed, recipe, logs), indent=2) + "\n"
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


def _stages(recipe: Recipe) -> dict[str, tuple[int, float]]:
    """The training stages of the base: steps and highest rate."""
    return {
        "base": (recipe.base_steps, recipe.base_rate),
        "skills": (recipe.skill_steps, recipe.skill_rate),
        "again": (recipe.again_steps, recipe.again_rate),
    }


def _config(out: Path, seed: int, steps: int, rate: float, **more: Any) -> TrainConfig:
    options: dict[str, Any] = {"model": "nano", "device": "cpu", "batch_size": 1, "evaluate_every": 0, "keep": 1} | more
    return TrainConfig(out=str(out), seed=seed, max_steps=steps, learning_rate=rate, **options)


def _base_batches(name: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, recipe: Recipe) -> BaseBatches:
    """The batches of one stage of the base: the first in a curriculum, the others mostly on tools and facts."""
    first = name == "base"
    return BaseBatches(
        tokenizer,
        seed=config.seed,
        episodes=recipe.base_episodes if first else recipe.skill_episodes,
        steps=config.max_steps,
        skills=None if first else recipe.skill_share,
    )


def _memory(
    work: Path,
    steered: SteeredModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    recipe: Recipe,
    on_progress: _OnProgress,
) -> None:
    """Train the adapter."""
    start_as_copier(steered)
    # The loss is a mean over the weights of questions (1) and written turns (a half). The norm is clipped where that of
    # their sum would be clipped at 1.
    clip = 1 / (1 + WRITE_WEIGHT)
    config = _config(work / "adapter", seed, recipe.memory_steps, recipe.memory_rate, warmup=50, clip=clip)
    batches = MemoryBatches(tokenizer, seed=seed, steps=recipe.memory_steps)
    pad, step = tokenizer.convert_tokens_to_ids("<|endoftext|>"), MemoryStep(steered)
    dataset = ExampleDataset(ENDLESS, lambda number, _: batches(number), seed=seed, length=recipe.memory_steps)
    MemoryTrainer(
        step,
        steered,
        dataset,
        lambda examples: collate(examples[0], pad, joined=step.joined),
        total_weight,
        config,
        training_arguments(config),
        on_progress=on_progress,
    ).run()


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
    write_digests(out)


def _report(
    out: Path,
    model: Qwen3ForCausalLM,
    steered: SteeredModel,
    seed: int,
    recipe: Recipe,
    logs: dict[str, tuple[list[float], float]],
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
                "steps": len(losses),
                "seconds": round(seconds, 1),
                "loss_every_100_steps": [round(loss, 4) for loss in losses[99::100]],
                "final_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4),
            }
            for name, (losses, seconds) in logs.items()
        },
        "versions": {
            "agentmem": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "bytes": {str(p.relative_to(out)): p.stat().st_size for p in sorted(shipped)},
    }


def _shower(progress: Progress, name: str, steps: int) -> _OnProgress:
    task = progress.add_task(name, total=steps, loss="-")
    return lambda now: progress.update(task, completed=now.step, loss=f"{now.loss:.3f}")
