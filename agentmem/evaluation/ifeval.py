"""IFEval's prompts, and whether replies follow their instructions: the program is lm-eval's.

Two kinds of instruction count sentences or words by NLTK's `punkt_tab`, which lm-eval fetches from NLTK's site when it
is first used. Where that is not to be had, prompts with these instructions are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from agentmem.errors import DataError, MissingExtraError

_NEED_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
_WITHOUT_PUNKT = "a prompt that NLTK's punkt_tab is needed for (python -m nltk.downloader punkt_tab)"


@dataclass(frozen=True)
class InstructionPrompt:
    """A prompt of IFEval; `check` tells whether a reply follows all of its instructions as they stand (strict)."""

    text: str
    check: Callable[[str], bool]


def ifeval_prompts(rows: Sequence[Mapping[str, Any]], place: Path) -> tuple[list[InstructionPrompt], Mapping[str, int]]:
    """The prompts in rows of IFEval's file, and how many are left out for which reason.

    Args:
        rows: objects with `key`, `prompt`, `instruction_id_list` and `kwargs`.
        place: where they were read, for errors.

    Raises:
        DataError: a row is in another form, or no prompt is left.
        MissingExtraError: lm-eval or a package that its IFEval needs is not installed.
    """
    ifeval, known, punkt = _lm_eval()
    prompts, left_out = list[InstructionPrompt](), 0
    for row in rows:
        try:
            kinds = list(row["instruction_id_list"])
            given = ifeval.InputExample(row["key"], kinds, str(row["prompt"]), list(row["kwargs"]))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"a line of IFEval in {place} has key, prompt, instruction_id_list and kwargs; found {row!r:.120} "
                f"({error!r})"
            ) from error
        if unknown := set(kinds) - set(known):
            raise DataError(f"IFEval in {place} has an instruction that lm-eval does not know: {min(unknown)}")
        if not punkt and _NEED_PUNKT & set(kinds):
            left_out += 1
        else:
            prompts.append(InstructionPrompt(given.prompt, _Follows(ifeval, given)))
    if not prompts:
        raise DataError(f"no prompt of IFEval in {place} can be checked; fetch what is missing: {_WITHOUT_PUNKT}")
    return prompts, {_WITHOUT_PUNKT: left_out} if left_out else {}


@dataclass(frozen=True)
class _Follows:
    """Whether a reply follows the instructions of an example."""

    ifeval: Any
    example: Any

    def __call__(self, reply: str) -> bool:
        return bool(self.ifeval.test_instruction_following_strict(self.example, reply).follow_all_instructions)


def _lm_eval() -> tuple[Any, Mapping[str, Any], bool]:
    """lm-eval's module for IFEval, the instructions that it knows, and whether NLTK's punkt_tab is there."""
    try:
        import langdetect
        import nltk

        with redirect_stdout(StringIO()):  # it says that it downloaded even where it could not
            from lm_eval.tasks.ifeval import instructions_registry, utils
    except ImportError as error:
        raise MissingExtraError(error.name or "lm_eval", "eval") from error
    langdetect.DetectorFactory.seed = 0  # it draws samples of a text
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return utils, instructions_registry.INSTRUCTION_DICT, False
    return utils, instructions_registry.INSTRUCTION_DICT, True
