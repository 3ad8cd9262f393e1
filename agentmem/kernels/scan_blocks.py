"""Tokens per chunk of the Triton scan: as a device was measured, or estimated where none was.

`python -m benchmarks.gpu` writes the table of a device as JSON. It is read from `scan_blocks.json` beside this module,
or from the file that `AGENTMEM_SCAN_BLOCKS` names:

    {"device": "...", "versions": "...", "blocks": [{"rank": 8, "tokens": 1024, "forward": 64, "backward": 32}, ...]}

`forward` and `backward` are powers of two. The table holds for every device: what won on one is a better guess for
another than a count of operations. Another chunk sums in another order and is otherwise the same scan.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from agentmem.errors import ConfigError
from agentmem.text import parse_json

TABLE = Path(__file__).with_name("scan_blocks.json")
VARIABLE = "AGENTMEM_SCAN_BLOCKS"


@dataclass(frozen=True)
class Block:
    """The chunks that were fastest for one rank and one length, without gradients and for them."""

    rank: int
    tokens: int
    forward: int
    backward: int


@dataclass(frozen=True)
class BlockTable:
    """What was measured on a device.

    Attributes:
        device, versions: where and with what.
        blocks: at least one; no two of the same rank and length.
    """

    device: str
    versions: str
    blocks: tuple[Block, ...]

    def chunk(self, length: int, rank: int, *, backward: bool) -> int | None:
        """The chunk for a length and rank: of the next larger rank that was measured, at its nearest length.

        None for ranks above all that were measured.
        """
        larger = [block.rank for block in self.blocks if block.rank >= rank]
        if not larger:
            return None
        of_rank = [block for block in self.blocks if block.rank == min(larger)]
        nearest = min(of_rank, key=lambda block: abs(math.log2(block.tokens / max(1, length))))
        return nearest.backward if backward else nearest.forward

    def write(self, path: Path) -> None:
        """Write the table as `read_table` reads it."""
        body = {"device": self.device, "versions": self.versions, "blocks": [asdict(block) for block in self.blocks]}
        path.write_text(json.dumps(body, indent=1) + "\n", "utf-8")


def read_table(path: Path) -> BlockTable:
    """Read a table.

    Raises:
        ConfigError: the file cannot be read, or is no such table.
    """
    try:
        body = parse_json(path.read_text("utf-8"))
        blocks = tuple(_block(values) for values in body["blocks"])
        table = BlockTable(str(body["device"]), str(body["versions"]), blocks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} must be a table of scan blocks as `python -m benchmarks.gpu` writes it; found "
            f"{type(error).__name__}: {error}. Measure it again, or remove it (and {VARIABLE}) to use the estimate"
        ) from error
    if not blocks or len({(block.rank, block.tokens) for block in blocks}) < len(blocks):
        raise ConfigError(f"{path} must hold one block for each rank and length, and at least one; found {blocks}")
    return table


def _block(values: Mapping[str, Any]) -> Block:
    block = Block(**values)
    numbers = {field.name: getattr(block, field.name) for field in fields(block)}
    if not all(type(number) is int and number >= 1 for number in numbers.values()):
        raise ValueError(f"whole numbers from 1 are expected, not {numbers}")
    if any(chunk & (chunk - 1) for chunk in (block.forward, block.backward)):
        raise ValueError(f"forward and backward are powers of two, not {block.forward} and {block.backward}")
    return block


@cache
def _table(named: str | None) -> BlockTable | None:
    """The table in the file that is named, else beside this module; None where nothing was measured."""
    if named:
        return read_table(Path(named))
    return read_table(TABLE) if TABLE.exists() else None


def chunk_length(length: int, rank: int, *, backward: bool = False) -> int:
    """Tokens per chunk of a scan, or of its gradient (`backward`).

    Raises:
        ConfigError: there is a table, and it cannot be used.
    """
    table = _table(os.environ.get(VARIABLE))
    measured = None if table is None else table.chunk(length, rank, backward=backward)
    return estimated(length, rank) if measured is None else measured


def estimated(length: int, rank: int) -> int:
    """Tokens per chunk from counts of operations.

    Few enough that many chunks run in parallel, and enough that their maps (rank^3 numbers per chunk and head) stay
    small next to the inputs.
    """
    if rank > 32:
        return 512
    if rank > 16:
        return 256
    return 64 if length <= 16_384 else 128
