"""Compares memories by rank, heads, write strategy and coupling: the same short training for each, on SmolLM2.

    python -m benchmarks.memory_shapes                        # all of them, two at once: two hours on two cores
    python -m benchmarks.memory_shapes token-2x8 token-2x32   # these
    python -m benchmarks.memory_shapes --steps 20 --limit 8 --out runs/try --no-page    # a try

A shape is a line of `SHAPES`. Each is trained from a fitted start by `agentmem train`, with everything else as in the
recipe of the adapter that ships but for fewer facts and smaller steps, is measured on held-out questions half-way
and at the end, and then on cells of `agentmem evaluate --task facts`. What was interrupted goes on where it was. The
page, docs/results/memory_shapes.md, is written anew from what lies below `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agentmem.evaluation.report import put_into

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "memory_shapes.md"

SHAPES: Mapping[str, Mapping[str, object]] = {
    # alpha grows with the rank, so that a read is worth the same.
    "token-2x32": {},
    "token-2x16": {"rank": 16, "alpha": 128},
    "token-2x8": {"rank": 8, "alpha": 64},
    "token-1x32": {"num_state_heads": 1},
    "token-4x16": {"num_state_heads": 4, "rank": 16, "alpha": 128},
    "token-2x32-coupled": {"couple_lambda": True},
    "message-1x32": {"num_state_heads": 1, "write_strategy": "message"},
    "message-4x16": {"num_state_heads": 4, "rank": 16, "alpha": 128, "write_strategy": "message"},
}
"""What is different from the memory of the recipe, by name: writes, heads x rank, and whether the gates are coupled."""

CELLS = ("known-4", "word-1", "word-2", "word-4", "number-2")
_MISSED = 1  # the exit code of `agentmem evaluate` where a bar is missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure, and write the page. Returns 1 if a shape failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; left out, all")
    parser.add_argument("--steps", type=int, default=150, help="of training; measured half-way and at the end")
    parser.add_argument("--limit", type=int, default=60, help="questions of each cell")
    parser.add_argument("--out", type=Path, default=Path("runs/memory_shapes"))
    parser.add_argument("--jobs", type=int, default=2, help="shapes at once, each with one thread")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights; float32 is faster without AVX-512 BF16")
    parser.add_argument("--no-page", action="store_true", help="leave docs/results as it is")
    options = parser.parse_args(arguments)
    if unknown := [shape for shape in options.shapes if shape not in SHAPES]:
        parser.error(f"shapes are {', '.join(SHAPES)}; found {unknown[0]}")
    with ThreadPoolExecutor(options.jobs) as pool:
        done = list(pool.map(lambda shape: _run(shape, options), options.shapes or SHAPES))
    if not options.no_page:
        write_page(options.out)
    return int(not all(done))


def training(shape: str, out: Path, *, steps: int, dtype: str) -> list[str]:
    """The arguments of `agentmem` that train a shape."""
    words = ["train", "--config", str(ROOT / "recipes" / "smollm2-135m.yaml"), "--out", str(out), "--resume"]
    for name, value in SHAPES[shape].items():
        words += ["--memory", f"{name}={json.dumps(value)}"]
    # Four facts are enough to ask keys to tell facts apart; the lens needs token writes, so nobody has it.
    words += ["--start-conversations", "300", "--lens-steps", "0", "--facts", "facts=[1,4]", "--facts", "fillers=[0,1]"]
    words += ["--max-steps", str(steps), "--batch-size", "6", "--evaluate-every", str(max(1, steps // 2))]
    return [*words, "--dtype", dtype]


def _run(shape: str, options: argparse.Namespace) -> bool:
    out = options.out / shape
    out.mkdir(parents=True, exist_ok=True)
    measuring = ["evaluate", "--model", "smollm2", "--adapter", str(out / "adapter"), "--task", "facts"]
    measuring += ["--cells", ",".join(CELLS), "--limit", str(options.limit), "--dtype", options.dtype]
    commands = [
        training(shape, out / "adapter", steps=options.steps, dtype=options.dtype),
        [*measuring, "--out", str(out / "facts")],
    ]
    agentmem = str(Path(sys.executable).with_name("agentmem"))
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        for words in commands:
            code = subprocess.run(
                [agentmem, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=False,
            ).returncode
            if code not in (0, _MISSED):
                print(f"{shape}: failed, see {out / 'log.txt'}", flush=True)
                return False
    print(f"{shape}: done", flush=True)
    return True


def write_page(out: Path, page: Path = PAGE) -> None:
    """Put a row for each shape into the page.

    Raises:
        ValueError: the page has no result marks.
    """
    columns = ["memory", "numbers in a session", "file, MB", "half-way", "at the end", *CELLS, "foreign, at most"]
    lines = [f"| {' | '.join(columns)} |", f"|---{'|---:' * (len(columns) - 1)}|"]
    lines += [_row(shape, out / shape) for shape in SHAPES]
    put_into(page, "\n".join(lines))


def _row(shape: str, place: Path) -> str:
    results = place / "facts" / "results.json"
    if not results.is_file():
        return f"| `{shape}` | not run yet: `python -m benchmarks.memory_shapes {shape}` |{' |' * 9}"
    config = json.loads((place / "adapter" / "delta_mem_config.json").read_text("utf-8"))
    numbers = len(config["target_layers"]) * config["num_state_heads"] * config["rank"] ** 2
    size = sum(file.stat().st_size for file in (place / "adapter").glob("*.safetensors")) / 1e6
    cells = {row["cell"]: row["arms"] for row in json.loads(results.read_text("utf-8"))["cells"]}
    shown = [_share(cells[cell]["memory"]) for cell in CELLS]
    foreign = max(cells[cell]["foreign"]["share"] for cell in CELLS)
    words = [
        f"`{shape}`",
        f"{numbers:,}",
        f"{size:.1f}",
        *_measured(place / "adapter" / "log.jsonl"),
        *shown,
        f"{foreign:.2f}",
    ]
    return f"| {' | '.join(words)} |"


def _measured(log: Path) -> list[str]:
    """Memory's share of right replies to held-out questions of the training data, half-way and at the end."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    shares = {line["step"]: line["arms"]["memory"] for line in lines if "arms" in line}
    return [f"{shares[step]:.2f}" for step in sorted(shares)][-2:]


def _share(arm: Mapping[str, Any]) -> str:
    return f"{arm['share']:.2f} ({arm['low']:.2f}-{arm['high']:.2f})"


if __name__ == "__main__":
    raise SystemExit(main())
