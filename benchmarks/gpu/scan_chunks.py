"""Part 5: which chunks are fastest for the Triton scan, by length and rank, written as the table that it reads."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from conditions import hardware, versions
from scan import Form, blocked, with_gradients
from scan import measure as timed

from agentmem import kernels
from agentmem.kernels.recurrence import block_length
from agentmem.kernels.scan_blocks import Block, BlockTable, estimated, read_table
from gpu.parts import Setting
from gpu.results import Recorder

RANKS = (8, 32, 16, 64)
"""The paper's, that of SmolLM2 and nano, and two more; what is first is there when time is over."""
LENGTHS = (1024, 4096, 32_768, 2048, 8192, 16_384)
CHUNKS = (32, 64, 128, 256, 512)
_REPEATS = 9
_LONGEST = 4096  # tokens that plain torch is timed with; a loop over chunks takes tenths of a second beyond
_RESERVE = 5.0  # seconds before the end at which no further cell is begun


def measure(recorder: Recorder, setting: Setting) -> None:
    """Every rank and length, as far as time goes; the table holds what was measured."""
    device = torch.device(setting.device)
    path = setting.out / "scan_blocks.json"
    path.unlink(missing_ok=True)
    ranks, lengths, chunks = ((4,), (8, 4), (2, 4)) if setting.tiny else (RANKS, LENGTHS, CHUNKS)
    blocks: list[Block] = []
    for rank in ranks:
        for length in lengths:
            what = f"scan, rank {rank}, {length:,} tokens"
            if recorder.seconds_left < _RESERVE:
                recorder.tell(what, "no time was left")
                continue
            recorder.attempt(what, partial(_cell, recorder, what, rank, length, chunks, device, blocks))
            if blocks:
                BlockTable(hardware(device), versions(), tuple(blocks)).write(path)
    recorder.attempt("the table", partial(_read_back, recorder, path, blocks), exact=True)


def _chunked(chunk: int) -> Form:
    return lambda arguments: kernels.scan(arguments, chunk=chunk)


def _cell(
    recorder: Recorder,
    what: str,
    rank: int,
    length: int,
    chunks: tuple[int, ...],
    device: torch.device,
    blocks: list[Block],
) -> None:
    """One row and head: alone and with gradients, each chunk; beside it the blocked form in plain torch."""
    kinds = {"forward": _chunked, "gradients": lambda chunk: with_gradients(_chunked(chunk))}
    # A chunk as long as the scan leaves nothing to do at once.
    suited = [chunk for chunk in chunks if chunk <= length // 2] or [chunks[0]]
    forms: dict[str, Form] = {f"{kind} {c}": made(c) for kind, made in kinds.items() for c in suited}
    if length <= _LONGEST:
        forms["torch"] = blocked(block_length(1, length, rank) or 16)
    cell = timed(1, length, rank, forms, 1 if device.type == "cpu" else _REPEATS, device, calls=1)
    forward = {chunk: cell.best(f"forward {chunk}") for chunk in suited}
    # A gradient alone: what both take together, without the scan before it.
    backward = {chunk: cell.best(f"gradients {chunk}") - forward[chunk] for chunk in suited}
    best = {name: min(times, key=lambda chunk: times[chunk]) for name, times in
            (("forward", forward), ("backward", backward))}  # fmt: skip
    blocks.append(Block(rank, length, best["forward"], best["backward"]))
    guess = estimated(length, rank)
    said = f"{1e3 * forward[best['forward']]:.3f} ms in chunks of {best['forward']}"
    said += f", gradients {1e3 * backward[best['backward']]:.3f} ms in {best['backward']}"
    if "torch" in forms:
        said += f"; plain torch {1e3 * cell.best('torch'):.3f} ms"
    if guess in forward:
        said += f"; the estimate, {guess}, takes {forward[guess] / forward[best['forward']]:.2f} times that"
    recorder.tell(what, said, forward=forward, backward=backward)


def _read_back(recorder: Recorder, path: Path, blocks: list[Block]) -> None:
    """The scan's own reader gives for every cell what won in it."""
    table = read_table(path)
    right = sum(
        table.chunk(b.tokens, b.rank, backward=False) == b.forward
        and table.chunk(b.tokens, b.rank, backward=True) == b.backward
        for b in blocks
    )
    said = f"{right} of {len(blocks)} cells are read back from scan_blocks.json as they were measured"
    recorder.judge("the table of chunks", right, len(blocks), said, exact=True)
