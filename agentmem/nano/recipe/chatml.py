"""nano's chat format: the template that ships with the tokenizer, and the same rendering in plain Python.

Every message is `<|im_start|>role\\n...<|im_end|>\\n`. A leading system turn holds the system text and, if there are
tools, one JSON object per line between `<tools>` and `</tools>`. Tool results are user turns; consecutive results share
one. `render` exists because training renders thousands of conversations per second; it gives the same text as the
template for every conversation of the language (a test compares them).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentmem.messages import Message

TEMPLATE = """\
{%- macro text(message) -%}
    {%- if message.content is string -%}{{- message.content -}}
    {%- elif message.content -%}
        {%- for part in message.content -%}{%- if part.text is defined -%}{{- part.text -}}{%- endif -%}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set first = messages[0] if messages else none -%}
{%- set opening = first if first and first.role == 'system' else none -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if opening and text(opening) -%}{{- text(opening) + '\\n\\n' -}}{%- endif -%}
    {{- 'You can call these tools:\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
    {{- '\\n</tools>\\nTo call one, write <tool_call> and a JSON object with name and arguments.<|im_end|>\\n' -}}
{%- elif opening -%}
    {{- '<|im_start|>system\\n' + text(opening) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
        {{- '\\n<tool_response>\\n' + text(message) + '\\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' + text(message) -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function if call.function is defined and call.function else call -%}
            {%- if not loop.first or text(message) -%}{{- '\\n' -}}{%- endif -%}
            {{- '<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' -}}
            {%- if function.arguments is string -%}{{- function.arguments -}}
            {%- else -%}{{- function.arguments | tojson -}}{%- endif -%}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message.role != 'system' or not loop.first -%}
        {{- '<|im_start|>' + message.role + '\\n' + text(message) + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class TextPiece:
    """A piece of rendered text; `reply` marks what the assistant has to produce (its text and the end token)."""

    text: str
    reply: bool = False


def _tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You can call these tools:\n<tools>{lines}\n</tools>\n"
        "To call one, write <tool_call> and a JSON object with name and arguments."
    )


def assistant_text(message: Message) -> str:
    """The text of an assistant message, its tool calls included."""
    calls = [
        f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": '
        f"{json.dumps(dict(call.arguments), ensure_ascii=False)}}}\n</tool_call>"
        for call in message.tool_calls
    ]
    return "\n".join([*([message.content] if message.content else []), *calls])


def render(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[TextPiece]:
    """Render a conversation as the template does, in pieces that begin and end where replies do."""
    pieces: list[TextPiece] = []
    rest = list(messages)
    opening = rest.pop(0).content if rest and rest[0].role == "system" else None
    if tools:
        head = f"{opening}\n\n" if opening else ""
        pieces.append(TextPiece(f"<|im_start|>system\n{head}{_tools_text(tools)}<|im_end|>\n"))
    elif opening is not None:
        pieces.append(TextPiece(f"<|im_start|>system\n{opening}<|im_end|>\n"))
    for i, message in enumerate(rest):
        if message.role == "assistant":
            pieces.append(TextPiece("<|im_start|>assistant\n"))
            pieces.append(TextPiece(assistant_text(message) + "<|im_end|>", reply=True))
            pieces.append(TextPiece("\n"))
        elif message.role == "tool":
            first = i == 0 or rest[i - 1].role != "tool"
            last = i + 1 == len(rest) or rest[i + 1].role != "tool"
            text = f"\n<tool_response>\n{message.content}\n</tool_response>"
            pieces.append(TextPiece(("<|im_start|>user" if first else "") + text + ("<|im_end|>\n" if last else "")))
        else:
            pieces.append(TextPiece(f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n"))
    return pieces
