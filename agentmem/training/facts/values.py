"""Values from open vocabularies (words, names, numbers, times, dates, versions, paths, codes, phrases) and from pools.

There must be values of every kind that training never sees. So every kind draws from more values than a run can use,
and a hash keeps a tenth of them out of training: a tenth of the words, a tenth of the names, and for other kinds a
tenth of the finished texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from agentmem.training.facts.splits import Split, part, split_of

POOLS: dict[str, tuple[str, ...]] = {
    kind: tuple(values.split(", "))
    for kind, values in {
        "city": (
            "Lisbon, Oslo, Kyoto, Denver, Porto, Vienna, Dublin, Prague, Boston, Naples, Geneva, Cairo, Lima, "
            "Toronto, Helsinki, Madrid, Bergen, Austin, Krakow, Nairobi, Seville, Tokyo, Berlin, Athens, "
            "Montreal, Brisbane, Chicago, Warsaw, Leeds, Utrecht, Havana, Jakarta"
        ),
        "food": (
            "pizza, sushi, ramen, curry, lasagna, tacos, falafel, paella, risotto, pancakes, dumplings, goulash, "
            "hummus, gnocchi, waffles, chili, couscous, pierogi, salmon, mushrooms, lentils, noodles, cheese, "
            "chocolate"
        ),
        "colour": (
            "red, blue, green, yellow, purple, orange, black, white, brown, pink, grey, turquoise, silver, gold, "
            "violet, crimson, indigo, beige, teal, maroon"
        ),
        "job": (
            "nurse, teacher, carpenter, lawyer, baker, pilot, plumber, architect, librarian, chemist, dentist, "
            "farmer, journalist, electrician, translator, designer, surgeon, gardener, accountant, geologist, "
            "firefighter, chef"
        ),
        "language": (
            "Spanish, French, Polish, Japanese, Greek, Turkish, Swahili, Korean, Italian, Dutch, Arabic, Finnish, "
            "Hindi, Portuguese, Czech, Danish, Hebrew, Thai, Welsh, Russian"
        ),
        "instrument": (
            "piano, guitar, violin, cello, flute, trumpet, drums, clarinet, harp, saxophone, banjo, accordion, "
            "viola, trombone, mandolin, oboe, ukulele, bassoon"
        ),
        "sport": (
            "tennis, rowing, football, climbing, swimming, chess, hockey, cycling, karate, golf, running, "
            "sailing, boxing, skiing, fencing, surfing, judo, badminton, volleyball, cricket"
        ),
        "programming": (
            "Python, Rust, Go, Java, Kotlin, Swift, Ruby, Scala, Julia, Haskell, Elixir, Perl, Fortran, Lua, Zig, "
            "TypeScript, Erlang, Dart"
        ),
        "database": (
            "Postgres, MySQL, SQLite, Redis, MongoDB, Cassandra, Oracle, MariaDB, Neo4j, Snowflake, DuckDB, BigQuery"
        ),
        "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
        "month": ("January, February, March, April, May, June, July, August, September, October, November, December"),
        "animal": (
            "cat, dog, parrot, rabbit, hamster, tortoise, horse, goat, ferret, canary, lizard, hedgehog, donkey"
        ),
        "status": "open, blocked, waiting, escalated, resolved, rejected, pending, approved, paused, closed",
    }.items()
}
"""Kinds with few values. An attribute of such a kind also takes open values, so that no closed list can be learned."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


OPEN_KINDS = (
    "word",
    "name",
    "pair",
    "full_name",
    "title",
    "phrase",
    "number",
    "amount",
    "time",
    "date",
    "version",
    "path",
    "code",
)
OPEN_KIND = {
    "city": "name",
    "food": "word",
    "colour": "word",
    "job": "word",
    "language": "name",
    "instrument": "word",
    "sport": "word",
    "programming": "name",
    "database": "name",
    "day": "date",
    "month": "date",
    "animal": "word",
    "status": "word",
}
"""The open kind from which an attribute with a closed pool can also take values."""

TWO_WORDS = {"word": "pair", "name": "full_name"}
"""The kind with two words from which an attribute with values of one word can also take values."""

_FIRST_NAMES = _split(
    "Anna Bruno Clara David Elena Felix Greta Hugo Irene Jonas Karin Leon Marta Nils Olga Pablo Rosa "
    "Simon Tessa Ulrich Vera Walter Yara Zoe Amir Bianca Cedric Daria Emil Farah Gustav Hana Ivan Jasmin "
    "Kofi Lena Milo Nadia Oscar Priya Quinn Ravi Sofia Tomas Uma Victor Wanda Xenia Yusuf Zara Alice Ben "
    "Carol Dennis Edith Frank Grace Henry Ida Jack Kate Luke Mary Noah Olive Peter Ruth Sam Tina Agnes "
    "Boris Cora Dmitri Esther Fritz Gloria Harvey Ingrid Jorge"
)
_WORDS = _split(
    "anchor apple arrow autumn badge basket beacon bell birch bishop blossom bottle branch bridge bronze "
    "bucket butter button cabin camel candle canyon carbon castle cedar chapel cherry cinder circle "
    "clover cobalt comet copper coral cotton crane crystal dagger dawn delta desert diamond dolphin "
    "dragon eagle ember engine falcon feather fern fiddle flame forest fossil fountain garden garnet "
    "ginger glacier granite hammer harbor hazel helmet heron honey horizon hunter iron island ivory "
    "jacket jasper jungle kettle kitten ladder lagoon lantern laurel lemon lily linen lion lotus magnet "
    "maple marble meadow mercury mirror mountain needle nickel nutmeg oasis olive onyx orbit orchid otter "
    "oyster paddle panther paper parcel pearl pebble pepper phoenix pigeon pilot planet plum pocket prism "
    "puma quartz rabbit raven ribbon river robin rocket saddle saffron salmon sapphire satchel shadow "
    "signal silver sparrow spiral spruce star stone storm summit sunset swallow tango temple thistle "
    "thunder tiger timber topaz torch tulip tundra turtle valley velvet violet walnut willow window "
    "winter wolf zephyr"
)
_ONSETS = _split("b br c d dr f g gr h j k kl l m n p r s st t tr v w z")
_NUCLEI = _split("a e i o u ai ei ia io")
_CODAS = ["", "", "l", "n", "r", "s", "x", "m", "nd", "rt", "sk", "ck"]
_FOLDERS = _split("src app lib docs data config scripts tests reports tools etc")
_SUFFIXES = _split("py md csv json toml txt sql log yaml rs")
_MONTHS = POOLS["month"]
_PLAIN_WORD = re.compile(r"[A-Za-z][a-z]{2,9}")


@dataclass(frozen=True)
class Vocabulary:
    """The words from which values are made.

    Attributes:
        words: lower-case words.
        names: capitalised words used as names of people, animals and places.
    """

    words: tuple[str, ...] = _WORDS
    names: tuple[str, ...] = _FIRST_NAMES

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """Every word that is a single token of a tokenizer: about twenty thousand, in addition to the built-in ones.

        A memory must be able to give back any of tens of thousands of tokens, so its training must cover them all.
        """
        count = len(tokenizer)
        texts = (tokenizer.decode([token]) for token in range(count))
        words = sorted({text[1:] for text in texts if text[:1] == " " and _PLAIN_WORD.fullmatch(text[1:])})
        lower = dict.fromkeys([*_WORDS, *(word for word in words if word.islower())])
        upper = dict.fromkeys([*_FIRST_NAMES, *(word for word in words if word[0].isupper())])
        return cls(tuple(lower), tuple(upper))


class Values:
    """Draws values of every kind from one part of a vocabulary.

    Args:
        split: the part. Held-out values share no word, name, number, time, version or path with training; only the
            digits and folders that they are written with occur in both.
        vocabulary: the source of words and names.
    """

    def __init__(self, split: Split, vocabulary: Vocabulary | None = None) -> None:
        self.split: Split = split
        vocabulary = vocabulary or Vocabulary()
        self._words = part(vocabulary.words, "value", split)
        self._names = part(vocabulary.names, "value", split)
        self._draw: dict[str, Callable[[Random], str]] = {
            "word": self._word,
            "name": self._name,
            "pair": lambda rng: " ".join(rng.sample(self._words, 2)),
            "full_name": lambda rng: " ".join(rng.sample(self._names, 2)),
            "title": lambda rng: " ".join(word.capitalize() for word in rng.sample(self._words, 2)),
            "phrase": lambda rng: " ".join(rng.sample(self._words, rng.choice((2, 2, 2, 3, 3, 4)))),
            "number": self._hashed(_number),
            "amount": self._hashed(lambda rng: f"{_number(rng)} {rng.choice(('euros', 'dollars', 'pounds'))}"),
            "time": self._hashed(_time),
            "date": self._hashed(lambda rng: f"{rng.choice(_MONTHS)} {rng.randint(1, 28)}"),
            "version": self._hashed(lambda rng: ".".join(str(rng.randint(0, 40)) for _ in range(rng.choice((2, 3))))),
            "path": self._path,
            "code": self._hashed(lambda rng: f"{_letters(rng)}-{rng.randint(100, 9999)}"),
        }

    def draw(self, rng: Random, kind: str) -> str:
        """A value of one of the `OPEN_KINDS` or `POOLS`."""
        if kind in POOLS:
            # Training sees these pools completely: only values of open vocabularies are held out.
            return rng.choice(POOLS[kind])
        return self._draw[kind](rng)

    def _word(self, rng: Random) -> str:
        return rng.choice(self._words)

    def _name(self, rng: Random) -> str:
        if rng.random() < 0.75:
            return rng.choice(self._names)
        return self._hashed(_invented_name)(rng)

    def _path(self, rng: Random) -> str:
        parts = [rng.choice(_FOLDERS), *(self._word(rng) for _ in range(rng.choice((1, 1, 2))))]
        return "/".join(parts) + "." + rng.choice(_SUFFIXES)

    def _hashed(self, make: Callable[[Random], str]) -> Callable[[Random], str]:
        """Draw until the text belongs to the part: ten draws on average for the held-out part."""

        def draw(rng: Random) -> str:
            while split_of(text := make(rng), "value") != self.split:
                pass
            return text

        return draw


def _number(rng: Random) -> str:
    return str(rng.randint(10 ** (digits := rng.choice((1, 2, 2, 3))), 10 ** (digits + 1) - 1))


def _time(rng: Random) -> str:
    hour, minute = rng.randint(0, 23), rng.randrange(0, 60, 5)
    if rng.random() < 0.5:
        return f"{hour}:{minute:02}"
    return f"{hour % 12 or 12}:{minute:02} {'am' if hour < 12 else 'pm'}"


def _letters(rng: Random) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXZ") for _ in range(2))


def _invented_name(rng: Random) -> str:
    syllables = (rng.choice(_ONSETS) + rng.choice(_NUCLEI) for _ in range(rng.choice((1, 2, 2))))
    return ("".join(syllables) + rng.choice(_CODAS[2:])).capitalize()


def article(text: str) -> str:
    """ "a" or "an" before a word or number, by its sound."""
    word = text.split()[0] if text.split() else ""
    lower = word.lower()
    if lower[:1].isdigit():
        leading = re.match(r"\d+", lower)
        digits = leading.group() if leading else ""
        return "an" if digits.startswith("8") or digits in ("11", "18") else "a"
    if len(word) > 1 and word.split("-")[0].isupper():  # pronounced letter by letter
        return "an" if word[0] in "AEFHILMNORSX" else "a"
    if re.match(r"(eu|ew|uni(?!n|m)|use|usu|ut[ei]|ur[aiu]|one|once|ubi|uk)", lower):
        return "a"
    if re.match(r"(hour|honest|honou?r|heir)", lower):
        return "an"
    return "an" if lower[:1] in "aeiou" else "a"
