"""A tokenizer's chat template: renders messages to text, and tokenises text with the position of each token.

Control tokens (`<|im_start|>` and the like) inside a message's text are only text: a quoted web page must not be able
to open a turn. They pass through the template between two quoting characters and are then tokenised as plain text; only
control tokens that the template itself writes become control tokens. This holds for every string that is passed to a
template: texts, names, ids, arguments, and schemas with their keys. Assistant messages keep the tags that do not mark
turns (`<think>`, `<tool_call>`), since the model wrote those itself.

It is an error if a request has a part that the template has no place for: tools, or an option that the template does
not read.

Most of a prompt is the prompt of the previous turn. So `Encoder` cuts a text before control tokens, where a tokenizer
splits it anyway, and looks up each piece in a cache: only new pieces are tokenised. The ids are exactly those of the
whole text, because a tokenizer treats the text between two such tokens separately, and each piece but the first begins
with one. Nothing is cut for tokenizers where this does not hold (tokens that match whole words only).

Nothing here changes the tokenizer or the messages.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from agentmem.errors import TranscriptError
from agentmem.messages import Message, MessageCache

Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # [start, stop) in characters
Encoded = tuple[list[int], list[int]]  # ids, and the start of each in characters

# Quoting characters around a control token in an input. They are noncharacters, which Unicode reserves for internal use
# and which do not occur in texts; if a text has them anyway they are removed.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"

_REASONING = {"<think>", "</think>"}  # templates look for these in an assistant's text
# Tags that do not mark turns but that models are trained to write, even where a template does not mention them.
_TAGS = _REASONING | {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
_CONTROL_SHAPE = re.compile(r"<\|[^|]+\|>")

_PROBE: Tools = ({"type": "function", "function": {"name": "probe", "description": "x", "parameters": {}}},)
_TOKEN_BYTES = 72  # per cached token: two numbers in two lists
_HEAD = 2  # tokens to search for are grouped by so many first characters


@dataclass(frozen=True)
class Text:
    """A rendered text, and the spans of it that are plain text although they look like control tokens."""

    text: str
    plain: tuple[Span, ...] = ()


class ChatTemplate:
    """Renders conversations and tokenises the result.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        options: further variables for the template, such as `enable_thinking`.
        cache: where encoded texts are stored.

    Raises:
        TranscriptError: the tokenizer is not a fast one or has no chat template, or the template does not use an
            option.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None, cache: MessageCache) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TranscriptError(
                "a fast tokenizer (tokenizer.json) was expected, since tokens are traced to messages by their "
                f"offsets; found {type(tokenizer).__name__}"
            )
        self._tokenizer = tokenizer
        self._options = dict(options or {})
        self.begin = str(tokenizer.bos_token or "")  # the first thing that many templates write
        try:
            template = str(tokenizer.get_chat_template())
        except ValueError as error:
            raise TranscriptError(f"a tokenizer with a chat template was expected: {error}") from error
        self.name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        unused = [name for name in self._options if not re.search(rf"\b{re.escape(name)}\b", template)]
        if unused:
            raise TranscriptError(
                f"the chat template of {self.name} has no use for the option {', '.join(unused)}; leave it out, "
                "or use a tokenizer with another template"
            )
        added = tokenizer.added_tokens_decoder.values()
        named = getattr(tokenizer, "chat_control_tokens", None)
        special = {str(token.content) for token in added if token.special}
        others = {
            text
            for text in (str(token.content) for token in added)
            if text in (template if named is None else named) or text in _TAGS or _CONTROL_SHAPE.fullmatch(text)
        }
        control = special | {text for text in others if not text.isspace()}
        self._turn = any_of(special - _REASONING)
        self._control = any_of(control)
        # A quoted control token as it looks after a template has written a value in Python's or JSON's ASCII notation.
        self._escaped = re.compile(rf"\\+ufdd0({self._control.pattern})\\+ufdd1")
        self._takes_tools: bool | None = None
        self._encoder = Encoder(tokenizer, cache)

    def prepare(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as templates expect them, with control tokens quoted. Do not change the result in place."""
        return [self._plain(message) for message in messages]

    def render(
        self, conversation: Sequence[dict[str, Any]], tools: Tools | None = None, add_generation_prompt: bool = False
    ) -> Text:
        """The rendered text of a conversation.

        Args:
            conversation: at least one message, as returned by `prepare`.
            tools: JSON schemas, as the template expects them.
            add_generation_prompt: whether to open the assistant's next turn.

        Raises:
            TranscriptError: the template refuses these messages; the error contains the template's own message.
        """
        if tools and not self.takes_tools():
            raise TranscriptError(
                f"the chat template of {self.name} has no place for tools, so the model would never see them; use a "
                "model whose template shows tools, give it another template, or call it without tools"
            )
        return self._render(conversation, tools, add_generation_prompt)

    def takes_tools(self) -> bool:
        """Whether the template shows tools at all."""
        if self._takes_tools is None:
            self._takes_tools = "probe" in self._render([{"role": "user", "content": "x"}], _PROBE, True).text
        return self._takes_tools

    def _render(self, conversation: Sequence[dict[str, Any]], tools: Tools | None, add_generation_prompt: bool) -> Text:
        try:
            text = self._tokenizer.apply_chat_template(
                list(conversation),
                tools=self._quote(list(tools), self._control) if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._options,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            roles = ", ".join(plain["role"] for plain in conversation)
            raise TranscriptError(
                f"the chat template refuses these messages ({roles}): {error}; give it messages in an order "
                "and of roles that it knows, or use a tokenizer with another template"
            ) from error
        return self._unquote(str(text))

    def encode(self, text: str, plain: Sequence[Span] = ()) -> Encoded:
        """The token ids of a text and the start of each in characters; `plain` spans stay plain text.

        Raises:
            TranscriptError: the text is not valid Unicode.
        """
        try:
            text.encode()  # tokenizers report it as a wrong type
        except UnicodeEncodeError as error:
            raise TranscriptError(
                "the text of a prompt is valid Unicode; found half a surrogate pair in "
                f"{text[max(0, error.start - 40) : error.start]!r}..., as in arguments of calls and descriptions of "
                "tools that were cut or decoded wrongly; repair it"
            ) from None
        return self._encoder.encode(text, plain)

    def content(self, message: Message) -> Text:
        """A message's content as it would appear in a rendered conversation."""
        return self._unquote(self._plain(message)["content"])

    def _plain(self, message: Message) -> dict[str, Any]:
        """One message as templates expect it."""
        control = self._turn if message.role == "assistant" else self._control
        plain: dict[str, Any] = {"role": message.role, "content": self._quote(message.content, control)}
        if message.tool_calls:
            plain["tool_calls"] = [
                {
                    "type": "function",
                    "id": self._quote(call.id, self._control),
                    "function": {
                        "name": self._quote(call.name, self._control),
                        "arguments": self._quote(dict(call.arguments), self._control),
                    },
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id:
            plain["tool_call_id"] = self._quote(message.tool_call_id, self._control)
        if message.name:
            plain["name"] = self._quote(message.name, self._control)
        return plain

    def _quote(self, value: Any, control: re.Pattern[str]) -> Any:
        """The value with every control token in its strings put between the quoting characters."""
        if isinstance(value, str):
            clean = value.replace(_OPEN, "").replace(_CLOSE, "")
            return control.sub(rf"{_OPEN}\g<0>{_CLOSE}", clean)
        if isinstance(value, Mapping):
            return {
                self._quote(key, control) if isinstance(key, str) else key: self._quote(item, control)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._quote(item, control) for item in value]
        return value

    def _unquote(self, quoted: str) -> Text:
        """The text without quoting characters, and the spans of complete control tokens that were quoted."""
        if "ufdd0" in quoted:
            quoted = self._escaped.sub(rf"{_OPEN}\g<1>{_CLOSE}", quoted)
        if _OPEN not in quoted and _CLOSE not in quoted:
            return Text(quoted)
        parts: list[str] = []
        plain: list[Span] = []
        length = at = 0
        for match in re.finditer(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]", quoted):
            inner = match.group(1) or ""
            parts += [quoted[at : match.start()], inner]
            length += match.start() - at
            if inner:
                plain.append((length, length + len(inner)))
            length += len(inner)
            at = match.end()
        return Text("".join(parts) + quoted[at:], tuple(plain))


class Encoder:
    """Encodes texts with a fast tokenizer, which is not changed.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        cache: where encoded pieces are stored.
    """

    def __init__(self, tokenizer: Any, cache: MessageCache) -> None:
        self._tokenizer = tokenizer
        self._cache = cache
        self._control, self._cut_before = _control_tokens(tokenizer)
        self._newline = self._whole("\n")[0]

    def encode(self, text: str, plain: Sequence[Span] = ()) -> Encoded:
        """The token ids of a text and the start of each in characters; in `plain` spans control tokens are text."""
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for start, stop in [*plain, (len(text), len(text))]:
            part_ids, part_starts = self._part(text[at:start], first=at == 0)
            ids += part_ids
            starts += [at + place for place in part_starts]
            plain_ids = self._plain(text[start:stop])
            ids += plain_ids
            starts += [start] * len(plain_ids)
            at = stop
        return ids, starts

    def _part(self, text: str, *, first: bool) -> Encoded:
        """Ids and starts of a text; if it is not the `first` of its text, it gets no extra space at its start."""
        if not text:
            return [], []
        if not first:
            # Some tokenizers add a space at the start of any text, but not after a newline.
            ids, starts = self._whole("\n" + text)
            skip = len(self._newline)
            if ids[:skip] == self._newline:
                return ids[skip:], [max(0, start - 1) for start in starts[skip:]]
        return self._whole(text)

    def _whole(self, text: str) -> Encoded:
        ids: list[int] = []
        starts: list[int] = []
        pieces = list(self._cut(text))
        for (at, piece), kept in zip(pieces, self._cache.get_all(("piece", piece) for _, piece in pieces), strict=True):
            piece_ids, piece_starts = kept or self._tokenised(piece)
            ids += piece_ids
            starts += [at + start for start in piece_starts]
        return ids, starts

    def _cut(self, text: str) -> Iterator[tuple[int, str]]:
        """The pieces of the text and their starts."""
        start = 0
        for match in self._control.finditer(text):
            if match.group() in self._cut_before and match.start() > start:
                yield start, text[start : match.start()]
                start = match.start()
        if start < len(text):
            yield start, text[start:]

    def _tokenised(self, text: str) -> Encoded:
        """Encode a piece and cache the result."""
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids: list[int] = encoded["input_ids"]
        starts: list[int] = []
        end = 0
        for token, (start, stop) in zip(ids, encoded["offset_mapping"], strict=True):
            # Some tokenizers report a token's span without the white space at its start.
            if start > end and text[end:start].isspace() and self._tokenizer.decode([token])[:1].isspace():
                start = end
            starts.append(start)
            end = max(end, stop)
        self._cache.put(("piece", text), (ids, starts), sys.getsizeof(text) + _TOKEN_BYTES * len(ids))
        return ids, starts

    def _plain(self, text: str) -> list[int]:
        """Ids of a text in which no added token is recognised: the tokenizer's pipeline without that step."""
        if not text:
            return []
        backend = self._tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the tokens, longer ones first; with no tokens it matches nothing.

    Tokens are grouped by their first characters: tokenizers have thousands of them, and a single list would be tried
    from end to end at every line break of a text.
    """
    groups: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len, reverse=True):
        groups.setdefault(token[:_HEAD], []).append(re.escape(token[_HEAD:]))
    heads = sorted(groups, key=len, reverse=True)
    return re.compile("|".join(f"{re.escape(head)}(?:{'|'.join(groups[head])})" for head in heads) or r"(?!)")


def _control_tokens(tokenizer: Any) -> tuple[re.Pattern[str], set[str]]:
    """A pattern for the tokens that a tokenizer looks for first, and those before which a text may be cut.

    A text may not be cut before tokens that include the white space on their left.
    """
    tokens = {str(token.content): token for token in tokenizer.added_tokens_decoder.values() if not token.normalized}
    if any(token.single_word for token in tokens.values()):
        return any_of(()), set()
    cut_before = {text for text, token in tokens.items() if not token.lstrip and not text[:1].isspace()}
    return any_of(tokens), cut_before
