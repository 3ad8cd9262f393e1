"""Where training conversations come from: a file of the user's, the `facts` generator, public data sets, and mixtures.

    source = open_source("chats.jsonl")
    source = open_source("facts", seed=1)
    source = open_sources(["facts", "sgd"], shares=[3, 1], data_dir=Path("data"))
    source.conversation(0)

Conversation `n` of a source is always the same, and what a source holds out is never among them.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Literal, Protocol

from agentmem.errors import ConfigError, DataError
from agentmem.training.conversations import Ask, Conversation, HeldConversations, SourceFile, read_conversations
from agentmem.training.datasets import CoffeeOrders, PersonaChats, SchemaGuidedDialogues
from agentmem.training.episodes import EpisodeConfig, FactEpisode, FactEpisodes
from agentmem.training.facts.splits import Split
from agentmem.training.facts.values import Vocabulary
from agentmem.training.facts.wordings import NOT_TOLD

ENDLESS = 2**31
"""The length that an endless source gives."""

FOLDERS = {"sgd": "sgd", "taskmaster4": "taskmaster4", "personas": "synthetic_persona_chat"}
"""The folder of each public data set inside the data directory."""

NAMES = ("facts", *FOLDERS)
"""The sources that have a name; anything else is the path of a file."""

FactPart = Literal["values", "wordings", "attributes"]

_BLOCK = 100  # conversations over which a mixture keeps to its shares


class Source(Protocol):
    """Training conversations by number, and held-out ones.

    Attributes:
        name: "facts", "sgd" ..., or the file's name.
        licence: an SPDX identifier; "" where none applies or none is known.
        files: the files that were read.
        skipped: how much was left out, by reason.
    """

    @property
    def name(self) -> str: ...
    @property
    def licence(self) -> str: ...
    @property
    def files(self) -> tuple[SourceFile, ...]: ...
    @property
    def skipped(self) -> Mapping[str, int]: ...

    def __len__(self) -> int:
        """How many training conversations there are; `ENDLESS` where they never run out."""
        ...

    def conversation(self, number: int) -> Conversation:
        """Training conversation `number`, from 0; the same at every call."""
        ...

    def held_out(self, count: int) -> tuple[Conversation, ...]:
        """`count` conversations that are not among the training ones, or all of them if there are fewer."""
        ...


@dataclass(frozen=True)
class SourceOptions:
    """What sources can be told. Each option matters to the sources that it names.

    Attributes:
        facts: how much is stated and asked (`facts`).
        vocabulary: the source of words and names (`facts`); `Vocabulary.from_tokenizer` gives the largest.
        held_out_parts: which of "values", "wordings" and "attributes" held-out conversations take from the part that
            training never sees (`facts`); the others they take from the training part.
        max_bad: the largest share of lines that may be bad (files).
        held_out_share: the share of conversations that is held out (files).
        tools: whether the model's chat template shows tools (`facts`, `taskmaster4`); without, there are no tool calls.
        whole_dialogues: have each dialogue as a whole, not only what is said again (`sgd`).

    Raises:
        ConfigError: a share is none, or a part is unknown.
    """

    facts: EpisodeConfig = field(default_factory=EpisodeConfig)
    vocabulary: Vocabulary | None = None
    held_out_parts: tuple[FactPart, ...] = ("values", "wordings")
    max_bad: float = 0.05
    held_out_share: float = 0.1
    tools: bool = False
    whole_dialogues: bool = False

    def __post_init__(self) -> None:
        for name in ("max_bad", "held_out_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share from 0 to 1; found {getattr(self, name)}")
        if unknown := set(self.held_out_parts) - {"values", "wordings", "attributes"}:
            raise ConfigError(f"held_out_parts names values, wordings and attributes; found {min(unknown)!r}")


def open_source(
    name_or_path: str | Path, *, data_dir: Path | None = None, seed: int = 0, options: SourceOptions | None = None
) -> Source:
    """Open one source.

    Args:
        name_or_path: one of `NAMES`, or the path of a JSONL file.
        data_dir: the directory that has the folders of the public data sets (`FOLDERS`).
        seed: determines what is generated (`facts`).
        options: see `SourceOptions`.

    Raises:
        ConfigError: no source has this name and no file this path, or `data_dir` is missing.
        DataError: a file is missing or cannot be used.
    """
    options = options or SourceOptions()
    name = str(name_or_path)
    if name == "facts":
        return FactSource(seed, options)
    if name not in FOLDERS:
        if not Path(name).exists():
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"data is one of {', '.join(NAMES)} or a JSONL file that exists; found {name!r}{hint}")
        return FileSource(Path(name), max_bad=options.max_bad, held_out_share=options.held_out_share)
    if data_dir is None:
        raise ConfigError(f"the source {name} is read from a folder; pass the directory that has it (data_dir)")
    folder = data_dir / FOLDERS[name]
    if not folder.is_dir():
        raise DataError(
            f"the source {name} is read from {folder}, which is no folder; see docs/reference/training_data"
        )
    if name == "sgd":
        return SchemaGuidedDialogues(folder, whole_dialogues=options.whole_dialogues)
    return CoffeeOrders(folder, tools=options.tools) if name == "taskmaster4" else PersonaChats(folder)


def open_sources(
    names: Sequence[str | Path],
    *,
    shares: Sequence[float] | None = None,
    data_dir: Path | None = None,
    seed: int = 0,
    options: SourceOptions | None = None,
) -> Source:
    """Open one source, or several as a mixture.

    Args:
        names: names or paths, see `open_source`.
        shares: how often each is drawn, in any unit; equal by default.
        data_dir, seed, options: see `open_source`.

    Raises:
        ConfigError, DataError: see `open_source` and `MixedSource`.
    """
    if not names:
        raise ConfigError(f"training needs data: one of {', '.join(NAMES)}, or a JSONL file; found none")
    sources = [open_source(name, data_dir=data_dir, seed=seed, options=options) for name in names]
    if len(sources) == 1 and shares is None:
        return sources[0]
    return MixedSource(sources, shares, seed=seed)


class FactSource:
    """`facts`: generated conversations (`agentmem.training.episodes`); the questions about them are `Ask`s.

    Args:
        seed: determines all conversations.
        options: `facts`, `vocabulary`, `held_out_parts` and `tools` matter.

    Raises:
        ConfigError: see `FactEpisodes`.
    """

    name = "facts"
    licence = ""
    files: tuple[SourceFile, ...] = ()

    def __init__(self, seed: int = 0, options: SourceOptions | None = None) -> None:
        options = options or SourceOptions()
        config = options.facts
        self.skipped: Mapping[str, int] = {}
        if not options.tools:
            acts = tuple((act, weight) for act, weight in config.acts if act != "tool_call")
            config = replace(config, acts=acts or (("ask", 1.0),))
        parts: dict[FactPart, Split] = {
            part: "heldout" if part in options.held_out_parts else "train"
            for part in ("values", "wordings", "attributes")
        }
        self._train = FactEpisodes(seed, config, vocabulary=options.vocabulary)
        self._held_out = FactEpisodes(seed, config, vocabulary=options.vocabulary, **parts)

    def __len__(self) -> int:
        return ENDLESS

    def conversation(self, number: int) -> Conversation:
        """Episode `number`, from 0."""
        return as_conversation(self._train.episode(number), f"facts:{number}")

    def held_out(self, count: int) -> tuple[Conversation, ...]:
        """`count` episodes; their numbers are negative, so that none is a training one even if nothing is held out."""
        return tuple(
            as_conversation(self._held_out.episode(number), f"facts:{number}") for number in range(-1, -1 - count, -1)
        )


def as_conversation(episode: FactEpisode, origin: str = "") -> Conversation:
    """An episode as a conversation: no message counts in the loss, the replies to its questions do."""
    opening = () if episode.system is None else (episode.system,)
    messages = (*opening, *(message for turn in episode.turns for message in turn.messages))
    asks = tuple(
        Ask(
            (question.user,),
            question.reply,
            (question.value,) if question.value else (),
            (question.old,) if question.old else (),
            question.act,
            question.tools,
            question.check,
            (NOT_TOLD,) if question.act == "never_told" else (),
        )
        for question in episode.questions
    )
    return Conversation(messages, (False,) * len(messages), asks=asks, origin=origin)


class FileSource(HeldConversations):
    """A JSONL file of the user's (`read_conversations`).

    Which conversations are held out follows from a hash of their messages, so equal ones are on the same side, and
    further lines in the file move none of the others (in a file of a few lines one or two are held out in any case).

    Args:
        path: the file.
        max_bad: the largest share of lines that may be bad.
        held_out_share: the share of conversations that is held out: at least one, and of four two, unless the share is
            0 or all conversations are equal.

    Raises:
        DataError: see `read_conversations`.
    """

    licence = ""

    def __init__(self, path: Path, *, max_bad: float = 0.05, held_out_share: float = 0.1) -> None:
        conversations = read_conversations(path, max_bad=max_bad)
        self.name = path.name
        self.files = (conversations.file,)
        self.bad = conversations.bad
        left_out = Counter({"a bad line": len(conversations.bad)})
        left_out.update({f"the unknown key {key}": count for key, count in conversations.ignored.items()})
        self.skipped: Mapping[str, int] = {reason: count for reason, count in left_out.items() if count}
        places = [_place(conversation) for conversation in conversations.good]
        limit, different = held_out_share, sorted(set(places))
        if held_out_share > 0 and len(different) > 1:
            # At least one on each side, and two that are held out, each the other's control, where there are four.
            limit = max(limit, math.nextafter(different[1 if len(different) > 3 else 0], 2))
            limit = min(limit, different[-1])
        elif len(different) == 1:
            limit = 0.0
        pairs = list(zip(conversations.good, places, strict=True))
        super().__init__(
            [conversation for conversation, place in pairs if place >= limit],  # in the file's order
            [conversation for conversation, place in pairs if place < limit],
        )


def _place(conversation: Conversation) -> float:
    """A number from 0 to 1 that follows from the messages."""
    digest = hashlib.blake2b(digest_size=8)
    for message in conversation.messages:
        digest.update(message.digest())
    return int.from_bytes(digest.digest()) / 2**64


class MixedSource:
    """Several sources in fixed shares.

    Every hundred conversations have exactly the shares (rounded), in a random order. Finite sources begin again when
    they are through, in another order each time, so a mixture is endless.

    Args:
        sources: the sources.
        shares: how often each is drawn, in any unit; equal by default.
        seed: determines the order.

    Raises:
        ConfigError: there is not one share above 0 per source, or one is below a hundredth of all.
    """

    def __init__(self, sources: Sequence[Source], shares: Sequence[float] | None = None, *, seed: int = 0) -> None:
        shares = [1.0] * len(sources) if shares is None else list(shares)
        if not sources or len(shares) != len(sources) or not all(0 < share < math.inf for share in shares):
            raise ConfigError(f"a mixture of {len(sources)} sources needs as many shares above 0; found {shares}")
        empty = next((source.name for source in sources if not len(source)), None)
        if empty is not None:
            raise ConfigError(f"the source {empty} has no training conversation; leave it out, or hold out less of it")
        self.sources = tuple(sources)
        self._seed = seed
        self._counts = _rounded([share / sum(shares) * _BLOCK for share in shares])
        if not all(self._counts):
            raise ConfigError(f"the smallest share of a mixture is a hundredth of all; found {shares}")
        self.name = "+".join(source.name for source in sources)
        self.licence = " AND ".join(dict.fromkeys(source.licence for source in sources if source.licence))
        self.files = tuple(file for source in sources for file in source.files)
        self.skipped: Mapping[str, int] = {
            f"{source.name}: {reason}": count for source in sources for reason, count in source.skipped.items()
        }

    def __len__(self) -> int:
        return ENDLESS

    def conversation(self, number: int) -> Conversation:
        """Conversation `number`, from 0."""
        block, place = divmod(number, _BLOCK)
        order = _order(self._seed, block, self._counts)
        chosen = order[place]
        drawn = block * self._counts[chosen] + order[:place].count(chosen)
        source = self.sources[chosen]
        if len(source) >= ENDLESS:
            return source.conversation(drawn)
        epoch, place = divmod(drawn, len(source))
        return source.conversation(_permutation(self._seed, epoch, chosen, len(source))[place])

    def held_out(self, count: int) -> tuple[Conversation, ...]:
        """Held-out conversations of all sources, by their shares; fewer where a source has too few."""
        counts = _rounded([count * part / _BLOCK for part in self._counts])
        return tuple(
            conversation
            for source, part in zip(self.sources, counts, strict=True)
            for conversation in source.held_out(part)
        )


def _rounded(parts: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers near the parts with the same sum: the largest remainders are rounded up."""
    counts = [math.floor(part) for part in parts]
    missing = round(sum(parts)) - sum(counts)
    for index in sorted(range(len(parts)), key=lambda index: counts[index] - parts[index])[:missing]:
        counts[index] += 1
    return tuple(counts)


@lru_cache(maxsize=16)
def _order(seed: int, block: int, counts: tuple[int, ...]) -> list[int]:
    """Which source each conversation of a block comes from."""
    order = [index for index, count in enumerate(counts) for _ in range(count)]
    Random(f"{seed}/{block}").shuffle(order)
    return order


@lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, source: int, length: int) -> list[int]:
    """The order of a finite source in one of its epochs."""
    order = list(range(length))
    Random(f"{seed}/{epoch}/{source}").shuffle(order)
    return order
