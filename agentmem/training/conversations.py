"""Conversations to train a memory on: their type, and reading them from a JSONL file.

A conversation is messages, which of them count in the loss, and questions to ask after all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agentmem.messages import Message


@dataclass(frozen=True)
class Ask:
    """A question asked after all messages of a conversation, apart from the others; its reply counts in the loss.

    Attributes:
        messages: what is asked; usually one user message.
        reply: the reply to learn.
        values: texts of which a right reply contains at least one. Empty: a reply is judged by its loss only.
        forbidden: texts that a right reply does not contain, such as an old value.
        kind: what the question is about: "ask", "choice", "never_told", "rule_followed", "tool_call" or free text.
        tools: the tools on offer, in OpenAI's form.
    """

    messages: tuple[Message, ...]
    reply: Message
    values: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    kind: str = ""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)


@dataclass(frozen=True)
class Conversation:
    """Messages in order, with which of them count in the loss.

    Attributes:
        messages: the messages; `Message.write` is False for those that memory must not take in.
        train: for each message, whether predicting its tokens counts in the loss. True for assistant messages only.
        tools: the tools on offer throughout, in OpenAI's form.
        asks: questions after all messages, each apart from the others. Rows of a file have none.
        origin: where it comes from, for messages to the user: "chats.jsonl:12", "facts:3".
    """

    messages: tuple[Message, ...]
    train: tuple[bool, ...]
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    asks: tuple[Ask, ...] = ()
    origin: str = ""
