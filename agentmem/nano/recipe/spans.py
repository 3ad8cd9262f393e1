"""Quoted names: sequences of characters of any script, and invented Latin words.

Characters are drawn uniformly from their script, so the weights cannot contain the names: they must be copied byte by
byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from agentmem.nano.recipe.pools import FIRMS, SYLLABLES, WORDS

_SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "han": ((0x4E00, 0x9FA5),),
    "kana": ((0x3041, 0x3093), (0x30A1, 0x30F6)),
    "hangul": ((0xAC00, 0xD7A3),),
    "cyrillic": ((0x0410, 0x044F),),
    "greek": ((0x0391, 0x03A1), (0x03A3, 0x03A9), (0x03B1, 0x03C9)),
    "arabic": ((0x0627, 0x063A), (0x0641, 0x064A)),
    "devanagari": ((0x0905, 0x0939),),
    "latin": ((0x00C0, 0x00D6), (0x00D8, 0x00F6), (0x00F8, 0x017E)),
    "emoji": ((0x1F300, 0x1F320), (0x1F400, 0x1F43E), (0x1F600, 0x1F64F)),
}
# Scripts whose characters take three bytes are drawn most often: they are the hardest to copy.
_WEIGHTS = {"han": 6, "kana": 5, "hangul": 3, "cyrillic": 2, "greek": 2, "arabic": 2, "devanagari": 1, "latin": 2}
_QUOTES = (("'", "'"),) * 4 + (('"', '"'),) * 2 + (("「", "」"), ("“", "”"), ("‘", "’"), ("«", "»"))
# Names from other people's tests: nano is never trained on them.
_WITHHELD = ("你好", "こんにちは", "株式会社", "集团")


def characters() -> Iterator[str]:
    """Every character that names are made of, except plain Latin letters."""
    for ranges in _SCRIPTS.values():
        for first, last in ranges:
            yield from map(chr, range(first, last + 1))


def script_run(rng: Random, script: str, length: int) -> str:
    """`length` characters of a script, each drawn uniformly."""
    ranges = _SCRIPTS[script]
    characters = range(sum(last - first + 1 for first, last in ranges))
    return "".join(_nth(ranges, rng.choice(characters)) for _ in range(length))


def _nth(ranges: Sequence[tuple[int, int]], index: int) -> str:
    for first, last in ranges:
        if index <= last - first:
            return chr(first + index)
        index -= last - first + 1
    raise IndexError(index)


def _latin(rng: Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3)))).capitalize()


def draw_span(rng: Random) -> str:
    """A name: six in ten from other scripts (2 to 8 characters, few of them emoji), the rest Latin words."""
    kind = rng.random()
    if kind < 0.58:
        while True:
            script = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
            name = script_run(rng, script, rng.randint(2, 8))
            if script == "latin":
                name = "".join(rng.choice((c, rng.choice("aeinorst"))) for c in name)
            elif script in ("han", "kana") and rng.random() < 0.3:
                name = name[:4] + script_run(rng, rng.choice(("han", "kana")), rng.randint(1, 4))
            if not any(withheld in name for withheld in _WITHHELD):
                return name
    if kind < 0.62:
        return script_run(rng, "emoji", rng.randint(1, 2))
    if kind < 0.75:
        return _latin(rng)
    if kind < 0.85:
        return f"{_latin(rng)} {_latin(rng)}"
    other = rng.choice((*WORDS, *FIRMS)).capitalize()
    return f"{_latin(rng)} {other}" if kind < 0.95 else f"{rng.choice(WORDS).capitalize()} {other}"


def quoted(rng: Random, span: str) -> str:
    """The name between quotes of one kind."""
    left, right = rng.choice(_QUOTES)
    return f"{left}{span}{right}"
