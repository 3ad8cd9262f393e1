"""Rules that a user gives once and that hold for later replies, replies that follow them, and checks of replies."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Rule:
    """An instruction for all later replies.

    Attributes:
        name: an identifier.
        tellings: how the user states it; {v} is a word that the rule mentions, if any.
        apply: makes the reply that follows the rule, from the reply without it and the word; for rules about files,
            from the words of a file name and its suffix.
        check: whether a reply follows the rule, from the reply and the word.
        takes_word: whether the rule needs a word from an open vocabulary.
        about_files: whether it applies to file names, and not to replies to questions.
        explanations: whether it shows only in replies that would be long without it.
    """

    name: str
    tellings: tuple[str, ...]
    apply: Callable[[str, str], str]
    check: Callable[[str, str], bool]
    takes_word: bool = False
    about_files: bool = False
    explanations: bool = False

    def followed(self, reply: str, word: str = "") -> bool:
        """Whether a reply follows the rule; `word` is the word that it mentions. An empty reply follows none."""
        return bool(reply.strip()) and self.check(reply.strip(), word)


@dataclass(frozen=True)
class RuleCheck:
    """A rule with its word, as a function of a reply; a value that another process can be sent, unlike a rule."""

    name: str
    word: str = ""

    def __call__(self, reply: str) -> bool:
        """Whether the reply follows the rule."""
        return next(rule for rule in RULES if rule.name == self.name).followed(reply, self.word)


def _first_sentence(reply: str, _: str) -> str:
    return reply.split(". ")[0].rstrip(".") + "."


def _is_one_sentence(reply: str, _: str) -> bool:
    return "\n" not in reply and len(re.findall(r"[.!?]+(?=\s|$)", reply)) <= 1


def _words(reply: str) -> list[str]:
    return re.findall(r"\w+", reply.lower())


def _is_list(reply: str, _: str) -> bool:
    return all(re.match(r"\s*(?:[-*•]|\d+[.)]) ", line) for line in reply.splitlines() if line.strip())


def _file_names(style: str) -> Callable[[str, str], bool]:
    """A check that a reply has a file name, and that each of its file names is in the style."""

    def check(reply: str, _: str) -> bool:
        names = re.findall(r"[\w-]+(?=\.[a-z]{1,5}\b)", reply)
        return bool(names) and all(re.fullmatch(style, name) for name in names)

    return check


RULES: tuple[Rule, ...] = (
    Rule(
        "one_sentence",
        (
            "From now on answer in one sentence.",
            "Please keep every answer to a single sentence.",
            "One sentence per answer is enough for me.",
            "Never use more than one sentence.",
            "I like it short: a single sentence each time.",
            "Limit yourself to one sentence from here on.",
        ),
        _first_sentence,
        _is_one_sentence,
        explanations=True,
    ),
    Rule(
        "capitals",
        (
            "From now on write in capital letters.",
            "Please write all answers in upper case.",
            "Use capitals only.",
            "I can only read capitals, so write in those.",
            "Every letter that you write is to be a capital.",
        ),
        lambda reply, _: reply.upper(),
        lambda reply, _: reply == reply.upper() != reply.lower(),
    ),
    Rule(
        "lower_case",
        (
            "From now on write in lower case.",
            "Please do not use capital letters.",
            "Use small letters only.",
            "Leave out capitals in whatever you write.",
            "Every letter that you write is to be a small one.",
        ),
        lambda reply, _: reply.lower(),
        lambda reply, _: reply == reply.lower() != reply.upper(),
    ),
    Rule(
        "closing_word",
        (
            'End every answer with the word "{v}".',
            'Please close each reply with "{v}".',
            'From now on the last word of an answer is "{v}".',
            'Sign off with "{v}" each time.',
            'Let "{v}" be the last thing that you say in a reply.',
        ),
        lambda reply, word: f"{reply} {word.capitalize()}.",
        lambda reply, word: _words(reply)[-1:] == [word.lower()],
        takes_word=True,
    ),
    Rule(
        "opening_word",
        (
            'Start every answer with the word "{v}".',
            'Please open each reply with "{v}".',
            'From now on the first word of an answer is "{v}".',
            'Begin with "{v}" each time.',
            'Let "{v}" be the first thing that you say in a reply.',
        ),
        lambda reply, word: f"{word.capitalize()}: {reply}",
        lambda reply, word: _words(reply)[:1] == [word.lower()],
        takes_word=True,
    ),
    Rule(
        "address",
        (
            "Call me {v} in every answer.",
            "Please address me as {v} from now on.",
            "Say {v} to me whenever you answer.",
            "I want to be called {v} in each reply.",
            "Do not forget to call me {v} when you reply.",
        ),
        lambda reply, word: f"{word.capitalize()}, here is the answer. {reply}",
        lambda reply, word: word.lower() in _words(reply),
        takes_word=True,
    ),
    Rule(
        "list",
        (
            "Answer with a list from now on.",
            "Please put each sentence on a line of its own, with a dash.",
            "I want bullet points, always.",
            "Give me every answer as a list with dashes.",
            "Write in bullet points only.",
        ),
        lambda reply, _: "\n".join(f"- {part.rstrip('.')}." for part in reply.split(". ")),
        _is_list,
    ),
    Rule(
        "exclamation",
        (
            "End every answer with an exclamation mark.",
            "I like exclamation marks, so finish with one each time.",
            "The last character of each reply is to be an exclamation mark.",
            "Close your answers with an exclamation mark from now on.",
        ),
        lambda reply, _: reply.rstrip(".") + "!",
        lambda reply, _: reply.endswith("!"),
    ),
    Rule(
        "ask_back",
        (
            "End every answer with a question to me.",
            "Ask me something at the end of each reply.",
            "From now on finish your answers with a question.",
            "The last sentence of each reply is to be a question.",
        ),
        lambda reply, _: f"{reply} Does that help you?",
        lambda reply, _: reply.endswith("?"),
    ),
    Rule(
        "snake_case",
        (
            "Call files snake_case.",
            "File names are in snake case.",
            "Join the words of a file name by underscores.",
            "We name files in snake case, all small.",
            "In file names put underscores between the words.",
            "Name every file in snake_case, please.",
        ),
        lambda words, suffix: "_".join(words.split()) + suffix,
        _file_names(r"[a-z0-9]+(_[a-z0-9]+)+"),
        about_files=True,
    ),
    Rule(
        "kebab_case",
        (
            "Call files kebab-case.",
            "File names are in kebab case.",
            "Join the words of file names by hyphens.",
            "We name files in kebab case, all small.",
            "In file names put hyphens between the words.",
            "Name every file in kebab-case, please.",
        ),
        lambda words, suffix: "-".join(words.split()) + suffix,
        _file_names(r"[a-z0-9]+(-[a-z0-9]+)+"),
        about_files=True,
    ),
    Rule(
        "camel_case",
        (
            "Call files CamelCase.",
            "File names are in camel case here.",
            "File names run together, each word capitalised.",
            "We name files in camel case, with nothing in between.",
            "In file names each word begins with a capital and nothing separates them.",
            "Name every file in CamelCase, please.",
        ),
        lambda words, suffix: "".join(word.capitalize() for word in words.split()) + suffix,
        _file_names(r"([A-Z][a-z0-9]*){2,}"),
        about_files=True,
    ),
)

FILE_QUESTIONS = (
    "What should I call the file for the {words}?",
    "Suggest a name for the file with the {words}.",
    "How do I name the file that holds the {words}?",
    "I need a file name for the {words}.",
    "Under which name do I save the {words}?",
    "Which name would you give to the file of the {words}?",
    "I am about to save the {words}. What is a good name?",
    "Propose a file name for the {words}.",
)

_FILE_WORDS = (
    ("monthly", "weekly", "daily", "quarterly", "final", "first", "new", "old", "public", "internal"),
    (
        "sales",
        "user",
        "price",
        "error",
        "customer",
        "tax",
        "backup",
        "weather",
        "meeting",
        "password",
        "order",
        "stock",
    ),
    ("report", "list", "log", "table", "script", "notes", "form", "test", "import", "parser", "summary", "plan"),
)


def file_subject(rng: Random) -> str:
    """Two or three words that say what a file holds: one of some 1,500."""
    first, *rest = (rng.choice(words) for words in _FILE_WORDS)
    return " ".join([first, *rest] if rng.random() < 0.7 else rest)
