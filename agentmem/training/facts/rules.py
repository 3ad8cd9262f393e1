"""Rules that a user gives once and that hold for later replies, and the replies that follow them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """An instruction for all later replies.

    Attributes:
        name: an identifier.
        tellings: how the user states it; {v} is a word that the rule mentions, if any.
        apply: makes the reply that follows the rule, from the reply without it and the word.
        takes_word: whether the rule needs a word from an open vocabulary.
        about_files: whether it applies to file names, and not to replies to questions.
    """

    name: str
    tellings: tuple[str, ...]
    apply: Callable[[str, str], str]
    takes_word: bool = False
    about_files: bool = False


def _first_sentence(reply: str, _: str) -> str:
    return reply.split(". ")[0].rstrip(".") + "."


RULES: tuple[Rule, ...] = (
    Rule(
        "one_sentence",
        (
            "From now on answer in one sentence.",
            "Please keep every answer to a single sentence.",
            "One sentence per answer is enough for me.",
        ),
        _first_sentence,
    ),
    Rule(
        "capitals",
        ("From now on write in capital letters.", "Please write all answers in upper case.", "Use capitals only."),
        lambda reply, _: reply.upper(),
    ),
    Rule(
        "lower_case",
        ("From now on write in lower case.", "Please do not use capital letters.", "Use small letters only."),
        lambda reply, _: reply.lower(),
    ),
    Rule(
        "closing_word",
        (
            'End every answer with the word "{v}".',
            'Please close each reply with "{v}".',
            'From now on the last word of an answer is "{v}".',
        ),
        lambda reply, word: f"{reply} {word.capitalize()}.",
        takes_word=True,
    ),
    Rule(
        "opening_word",
        ('Start every answer with the word "{v}".', 'Please open each reply with "{v}".'),
        lambda reply, word: f"{word.capitalize()}: {reply}",
        takes_word=True,
    ),
    Rule(
        "address",
        ("Call me {v} in every answer.", "Please address me as {v} from now on."),
        lambda reply, word: f"{word.capitalize()}, here is the answer. {reply}",
        takes_word=True,
    ),
    Rule(
        "list",
        ("Answer with a list from now on.", "Please put each sentence on a line of its own, with a dash."),
        lambda reply, _: "\n".join(f"- {part.rstrip('.')}." for part in reply.split(". ")),
    ),
    Rule(
        "snake_case",
        (
            "Call files snake_case.",
            "File names are in snake case.",
            "Join the words of a file name by underscores.",
        ),
        lambda words, suffix: "_".join(words.split()) + suffix,
        about_files=True,
    ),
    Rule(
        "kebab_case",
        ("Call files kebab-case.", "File names are in kebab case.", "Join the words of file names by hyphens."),
        lambda words, suffix: "-".join(words.split()) + suffix,
        about_files=True,
    ),
    Rule(
        "camel_case",
        (
            "Call files CamelCase.",
            "File names are in camel case here.",
            "File names run together, each word capitalised.",
        ),
        lambda words, suffix: "".join(word.capitalize() for word in words.split()) + suffix,
        about_files=True,
    ),
)

FILE_QUESTIONS = (
    "What should I call the file for the {words}?",
    "Suggest a name for the file with the {words}.",
    "How do I name the file that holds the {words}?",
)
FILE_SUBJECTS = (
    "monthly sales report",
    "user login test",
    "price list",
    "error log parser",
    "customer import",
    "quarterly tax table",
    "daily backup script",
    "weather data loader",
    "meeting notes",
    "password reset form",
)
