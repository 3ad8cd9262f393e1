"""Three public data sets of dialogues as sources of training conversations, read from a folder that the user names.

    sgd          Schema-Guided Dialogue: replies that say again what the user said four or more turns before
    taskmaster4  Taskmaster-4: orders in a coffee bar, with calls of tools where the model has them
    personas     Synthetic-Persona-Chat: chats of somebody who was told at the start who they are

What a class leaves out is counted with the reason in `skipped`. Each file is read once, when a source is opened.
"""

from __future__ import annotations

import csv
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentmem.errors import DataError
from agentmem.messages import Message, Role, ToolCall
from agentmem.text import parse_json
from agentmem.training.conversations import Ask, Conversation, HeldConversations, SourceFile, read_file
from agentmem.training.facts.splits import split_of


class _Folder:
    """Files of a data set: reads them, compressed or not, and keeps their digests."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.files = list[SourceFile]()

    def read(self, name: str) -> bytes:
        """The content of a file, which may be compressed.

        Raises:
            DataError: there is none.
        """
        for suffix in ("", ".xz", ".gz"):
            if (path := self.path / (name + suffix)).is_file():
                return self._read(path)
        raise DataError(
            f"the source {self.name} needs {name} (or {name}.xz) in {self.path}, where it is not; give the folder that "
            f"has {self.path.name}/ as the data directory"
        )

    def matching(self, pattern: str) -> Iterator[bytes]:
        """The contents of all files whose name, without a suffix of compression, matches.

        Raises:
            DataError: there is none.
        """
        paths = sorted(
            p for p in self.path.glob(pattern + "*") if p.is_file() and re.search(r"\w(\.xz|\.gz)?$", p.name)
        )
        if not paths:
            raise DataError(
                f"the source {self.name} needs files {pattern} (or {pattern}.xz) in {self.path}, where there are none; "
                f"give the folder that has {self.path.name}/ as the data directory"
            )
        return map(self._read, paths)

    def _read(self, path: Path) -> bytes:
        file, content = read_file(path)
        self.files.append(file)
        return content


def _json(content: bytes, where: str) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}); fetch the file again") from error


class SchemaGuidedDialogues:
    """`sgd`: recall items of Schema-Guided Dialogue, each the conversation before a reply and that reply as a question.

    Reads `train.jsonl` and `dev.jsonl` (one dialogue per line, with `dialogue_id` and `turns` of `speaker` and
    `utterance`) and `train.recall.jsonl` and `dev.recall.jsonl` (one item per line: `dialogue_id`, the turn `told` in
    which the user says the `value`, and the turn `said_again` in which the system does). Training has the items of
    train, and `held_out` those of dev. Texts only: calls of services and their results are left out, because a result
    in the prompt would give the value away.

    Args:
        path: the folder.
        whole_dialogues: have every dialogue of train as a conversation too, whose replies after the first turn count.
        train: False reads the files of dev alone; there are no training conversations then.

    Raises:
        DataError: a file is missing or is not in this form.
    """

    name = "sgd"
    licence = "CC-BY-SA-4.0"

    def __init__(self, path: Path, *, whole_dialogues: bool = False, train: bool = True) -> None:
        folder = _Folder(path, self.name)
        skipped = Counter[str]()
        self._items: tuple[Conversation, ...] = ()
        others: tuple[tuple[str, bytes], ...] = ()
        if train:
            self._items, others = _recall_items(folder, "train", skipped, keep_others=whole_dialogues)
        self._held_out, _ = _recall_items(folder, "dev", skipped, keep_others=False)
        # Training meets every dialogue once as a whole, those with items included.
        self._dialogues = others
        self.files = tuple(folder.files)
        self.skipped: Mapping[str, int] = dict(skipped)

    def __len__(self) -> int:
        return len(self._items) + len(self._dialogues)

    def conversation(self, number: int) -> Conversation:
        """Conversation `number`, from 0: first the recall items, then whole dialogues."""
        if number < len(self._items):
            return self._items[number]
        identifier, packed = self._dialogues[number - len(self._items)]
        turns = _utterances(zlib.decompress(packed), identifier)
        return _chat(_alternating(turns), f"sgd:train/{identifier}")

    def held_out(self, count: int) -> tuple[Conversation, ...]:
        """Recall items of dev: `count` conversations, or all if there are fewer."""
        return self._held_out[:count]


def _recall_items(
    folder: _Folder, part: str, skipped: Counter[str], *, keep_others: bool
) -> tuple[tuple[Conversation, ...], tuple[tuple[str, bytes], ...]]:
    """The recall items of a part, in an order by hash; and with `keep_others` all dialogues, compressed."""
    items: dict[str, dict[int, list[str]]] = {}
    for line in filter(None, folder.read(f"{part}.recall.jsonl").splitlines()):
        item = _json(line, f"a line of {part}.recall.jsonl")
        try:
            asked = items.setdefault(item["dialogue_id"], {}).setdefault(int(item["said_again"]), [])
            asked.append(str(item["value"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"a line of {part}.recall.jsonl has dialogue_id, told, said_again and value; found {line[:80]!r}"
            ) from error
    conversations, dialogues = list[Conversation](), list[tuple[str, bytes]]()
    for line in filter(None, folder.read(f"{part}.jsonl").splitlines()):
        # Only dialogues with items are parsed: of 98 MB of JSON a sixth.
        found = re.search(rb'"dialogue_id":\s*"([^"]*)"', line)
        identifier = found[1].decode() if found else ""
        if keep_others:
            dialogues.append((identifier, zlib.compress(line, 1)))
        asked_of = items.pop(identifier, {})
        if not asked_of:
            skipped[f"{part}: a dialogue that says nothing again"] += not keep_others
            continue
        skipped[f"{part}: a service's call and results in a dialogue that is used"] += line.count(b'"service_call"')
        turns = _utterances(line, identifier)
        for turn, values in asked_of.items():
            conversations += _recall(turns, turn, values, f"sgd:{part}/{identifier}:{turn}", skipped)
    for missing in items.values():
        skipped[f"{part}: an item whose dialogue is missing"] += sum(len(values) for values in missing.values())
    for reason in [reason for reason, count in skipped.items() if not count]:
        del skipped[reason]
    # By hash, so that any first so many are a fair sample.
    conversations.sort(key=lambda conversation: zlib.crc32(conversation.origin.encode()))
    return tuple(conversations), tuple(dialogues)


def _recall(
    turns: Sequence[tuple[Role, str]], turn: int, values: Sequence[str], origin: str, skipped: Counter[str]
) -> Iterator[Conversation]:
    """The conversation before a reply, and a question for each value that the reply says again."""
    if not 2 < turn < len(turns) or turns[turn][0] != "assistant" or turns[turn - 1][0] != "user":
        skipped["an item that is no reply to a user"] += len(values)
        return
    (_, question), (_, reply) = turns[turn - 1], turns[turn]
    asks = []
    for value in values:
        if not _says(reply, value) or _says(question, value):
            skipped["an item whose reply lacks the value, or whose question has it"] += 1
            continue
        asks.append(Ask((Message("user", question),), Message("assistant", reply), (value,), kind="recall"))
    if asks:
        messages = _messages(turns[: turn - 1])
        yield Conversation(messages, (False,) * len(messages), asks=tuple(asks), origin=origin)


def _utterances(line: bytes, identifier: str) -> tuple[tuple[Role, str], ...]:
    dialogue = _json(line, f"the dialogue {identifier} of sgd")
    try:
        return tuple(
            ("user" if turn["speaker"] == "USER" else "assistant", turn["utterance"]) for turn in dialogue["turns"]
        )
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the dialogue {identifier} of sgd has `turns` of `speaker` and `utterance`; found another form ({error!r})"
        ) from error


def _says(text: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None


class CoffeeOrders(HeldConversations):
    """`taskmaster4`: orders in a coffee bar.

    Reads `data_*.json` of Taskmaster-4. Replies after the first turn count. With `tools` the calls that are noted with
    the user's utterances become calls by the assistant and messages of tools, and an order's number, which a call of a
    later turn needs and only an earlier result has, is asked for (kind "tool_call"). A tenth is held out by a hash of
    the conversation's id.

    Args:
        path: the folder.
        tools: whether the model's chat template shows tools.

    Raises:
        DataError: a file is missing or is not in this form.
    """

    name = "taskmaster4"
    licence = "CC-BY-4.0"

    def __init__(self, path: Path, *, tools: bool = False) -> None:
        folder = _Folder(path, self.name)
        skipped = Counter[str]()
        train, held_out = list[Conversation](), list[Conversation]()
        for content in folder.matching("data_*.json"):
            for dialogue in _json(content, f"a file of {path}"):
                try:
                    identifier, utterances = dialogue["conversation_id"], dialogue["utterances"]
                    made = _order(utterances, f"taskmaster4:{identifier}", skipped, tools=tools)
                except (KeyError, TypeError) as error:
                    raise DataError(
                        "a dialogue of taskmaster4 has `conversation_id` and `utterances`; found another form "
                        f"({error!r}); give the folder with data_*.json of TM-4-2024"
                    ) from error
                if made is not None:
                    (train if split_of(identifier, "conversation") == "train" else held_out).append(made)
        super().__init__(train, held_out)
        self.files = tuple(folder.files)
        self.skipped: Mapping[str, int] = dict(skipped)


def _order(
    utterances: Sequence[Mapping[str, Any]], origin: str, skipped: Counter[str], *, tools: bool
) -> Conversation | None:
    messages, results = list[Message](), ""
    parameters: dict[str, set[str]] = {}
    for utterance in utterances:
        messages.append(Message("user" if utterance["speaker"] == "user" else "assistant", utterance["text"].strip()))
        notes = utterance["annotations"]
        if not tools:
            skipped["a call of a tool (the source was opened without tools)"] += sum(
                n["name"] == "api_call" for n in notes
            )
            continue
        earlier, before = results, tuple(messages)
        for call, answer in _calls(notes, origin):
            if call is None:
                skipped["a conversation with a call whose arguments are no JSON object"] += 1
                return None
            parameters.setdefault(call.name, set()).update(call.arguments)
            order = str(call.arguments.get("order_id", ""))
            asking = Message("assistant", "", (call,))
            if order and order in earlier and messages[-1] is before[-1]:
                ask = Ask((before[-1],), asking, (order,), kind="tool_call", tools=_tools(parameters))
                told = before[:-1]
                return Conversation(told, (False,) * len(told), _tools(parameters), (ask,), origin)
            messages += [asking, Message("tool", answer, tool_call_id=call.id, name=call.name)]
            results += answer
    if sum(message.role == "user" for message in messages) < 2 or messages[-1].role == "user":
        skipped["a conversation of a single turn"] += 1
        return None
    if not all(message.content or message.tool_calls for message in messages if message.role != "tool"):
        skipped["a conversation with an empty message"] += 1
        return None
    return _chat(messages, origin, _tools(parameters))


def _calls(notes: Sequence[Mapping[str, str]], origin: str) -> Iterator[tuple[ToolCall | None, str]]:
    """The calls noted with an utterance and their results: notes named api_call, request and response, by context."""
    requests, responses = (
        {note["context"].rpartition("_")[2]: note["value"] for note in notes if note["name"] == name}
        for name in ("request", "response")
    )
    for note in notes:
        if note["name"] == "api_call":
            number = note["context"].rpartition("_")[2]
            try:
                arguments = parse_json(requests.get(number, "{}"))
                call = ToolCall(note["value"], arguments, f"call_{number}") if isinstance(arguments, dict) else None
            except ValueError:
                call = None
            yield call, responses.get(number, "")


def _tools(parameters: Mapping[str, set[str]]) -> tuple[dict[str, Any], ...]:
    """Tools in OpenAI's form from the arguments that calls have; the data set describes none."""
    return tuple(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": name.replace("_", " ").capitalize() + ".",
                "parameters": {"type": "object", "properties": {key: {"type": "string"} for key in sorted(keys)}},
            },
        }
        for name, keys in sorted(parameters.items())
    )


class PersonaChats(HeldConversations):
    """`personas`: chats in which the assistant keeps to a description of itself that it was given at the start.

    Reads `*.csv` of Synthetic-Persona-Chat. The speaker who begins is the user; what the other one is like stands in a
    message before the chat, so that replies need it after it has left the window. All replies of the chat count. A
    tenth is held out by a hash of the chat. A chat that leaves a name open ("[User 1's name]") or has stage directions
    is left out.

    Args:
        path: the folder.

    Raises:
        DataError: a file is missing or is not in this form.
    """

    name = "personas"
    licence = "CC-BY-4.0"

    def __init__(self, path: Path) -> None:
        folder = _Folder(path, self.name)
        skipped = Counter[str]()
        train, held_out = list[Conversation](), list[Conversation]()
        for content in folder.matching("*.csv"):
            file = folder.files[-1].path.name
            rows = csv.reader(io.StringIO(content.decode("utf-8", "replace"), newline=""))
            if len(next(rows, ())) != 3:
                raise DataError(f"{folder.files[-1].path} has three columns: two personas and a chat; found others")
            for number, row in enumerate(rows, 1):
                made = _persona_chat(row, f"personas:{file}:{number}", skipped)
                if made is not None:
                    (train if split_of(row[2], "conversation") == "train" else held_out).append(made)
        super().__init__(train, held_out)
        self.files = tuple(folder.files)
        self.skipped: Mapping[str, int] = dict(skipped)


_SPEAKER = re.compile(r"User ([12]): *")


def _persona_chat(row: Sequence[str], origin: str, skipped: Counter[str]) -> Conversation | None:
    if len(row) != 3:
        skipped["a row without three columns"] += 1
        return None
    turns = list[tuple[str, str]]()
    for line in filter(None, map(str.strip, row[2].split("\n"))):
        match = _SPEAKER.match(line)
        if match:
            turns.append((match[1], line[match.end() :]))
        elif not turns or line[0] in "[(*":
            skipped["a chat with stage directions"] += 1
            return None
        else:  # a further paragraph of the same message
            turns[-1] = turns[-1][0], f"{turns[-1][1]}\n{line}"
    if re.search(r"\[[^\]]{1,40}\]", row[2]):
        skipped["a chat that leaves a name or a fact open in brackets"] += 1
        return None
    if len({speaker for speaker, _ in turns}) < 2 or not all(text for _, text in turns):
        skipped["a chat of one speaker, or with an empty message"] += 1
        return None
    first = turns[0][0]
    persona = row[1] if first == "1" else row[0]
    start = [
        Message("user", f"In this chat you are somebody of whom this is true:\n{persona.strip()}"),
        Message("assistant", "All right. I will talk as this person."),
    ]
    chat = _alternating([("user" if speaker == first else "assistant", text) for speaker, text in turns])
    return _chat([*start, *chat], origin)


# What the three share.


def _messages(turns: Sequence[tuple[Role, str]]) -> tuple[Message, ...]:
    return tuple(Message(role, text) for role, text in turns)


def _alternating(turns: Sequence[tuple[Role, str]]) -> tuple[Message, ...]:
    """Messages in which neighbours of one role are joined, as many chat templates require."""
    joined = list[tuple[Role, str]]()
    for role, text in turns:
        if joined and joined[-1][0] == role:
            joined[-1] = role, f"{joined[-1][1]}\n{text}"
        else:
            joined.append((role, text))
    return _messages(joined)


def _chat(messages: Sequence[Message], origin: str, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    """A conversation whose replies after the first turn count."""
    train, users = [], 0
    for message in messages:
        users += message.role == "user"
        train.append(message.role == "assistant" and users > 1)
    return Conversation(tuple(messages), tuple(train), tools, origin=origin)
