"""All that the developer says, and what each request should lead to, in one place.

The sentences are plain enough for the embedded model, which knows few: a setting is told as "The NAME is VALUE.", and
a tool is asked for by what it does, without the value that was told. The fixes that were tried on the failing test are
on branches of the repository (files in its folder "fixes"), so "the branch" is the one that was tried and failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from agentmem.nano.recipe.pools import WORDS

SMALL_TALK = ("Hello!", "The meeting was boring.")
NANO_SYSTEM = "You are a coding assistant."
SYSTEM = (
    "You are a coding assistant in a repository. Work with the tools, one call at a time, and answer in one sentence. "
    "Use what the developer has told you (the test command, the code style, and the branch whose fix was tried and "
    "failed) without asking for it again. After a tool's result say what it says; do not go on by yourself."
)


@dataclass(frozen=True)
class Settings:
    """What the developer tells in session one; `style` replaces `old_style`."""

    test_command: str = "make test"
    branch: str = "round rule"
    old_style: str = "camel case"
    style: str = "snake case"

    @classmethod
    def draw(cls, rng: Random) -> Settings:
        """Other values, of two words each."""
        words = rng.sample(WORDS, 8)
        return cls(*(f"{a} {b}" for a, b in zip(words[::2], words[1::2], strict=True)))


@dataclass(frozen=True)
class Request:
    """What the developer asks for, and the call that is right: `arguments` of None means any."""

    text: str
    tool: str
    arguments: dict[str, str] | None


def session_one(settings: Settings) -> tuple[str, ...]:
    """What the developer says in session one."""
    return (
        SMALL_TALK[0],
        f"The test command is {settings.test_command}.",
        f"The code style is {settings.old_style}.",
        f"The branch is {settings.branch}.",
        f"Actually, the code style is now {settings.style}.",
        SMALL_TALK[1],
    )


def remembering(settings: Settings) -> tuple[Request, Request, Request]:
    """The requests that leave out what was told: run the tests, find another fix, rename."""
    return (
        Request("Run the tests.", "run_tests", {"test_command": settings.test_command}),
        Request("Prepare the fix.", "prepare_fix", {"branch": settings.branch}),
        Request("Format the names.", "format_names", {"code_style": settings.style}),
    )


def apply(name: str) -> Request:
    """The request to apply a fix by its name."""
    return Request(f'Call apply_fix with name "{name}".', "apply_fix", {"name": name})
