"""A coding assistant in two sessions, each a process of its own; then the second one again with the memory off.

    python -m coding_assistant [--model nano] [--adapter DIR] [--data DIR] [--yes]
    python -m coding_assistant --measure 24

Exits with 1 where the assistant, with its memory, does not do what it was told in session one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from agentmem.loading import load_tokenizer
from agentmem.prompt.transcript import Transcript
from coding_assistant.measure import measure
from coding_assistant.phrases import Settings
from coding_assistant.session import Outcome, Setup

_MARKER = ".coding-assistant"


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="coding_assistant", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="nano", help='"nano", a directory or a hub id')
    parser.add_argument("--adapter", help="a directory or a hub id; nano brings its own")
    parser.add_argument("--data", type=Path, default=Path("coding-assistant-data"), help="emptied first")
    parser.add_argument("--yes", action="store_true", help="approve every change without asking")
    parser.add_argument("--measure", type=int, metavar="N", help="instead: right calls over N draws of the values")
    given = parser.parse_args()
    if not Transcript(load_tokenizer(given.model)).takes_tools():
        parser.error(
            f"the chat template of {given.model} has no place for tools, and all that is shown here is tool calls"
        )
    if given.measure:
        print(measure(given.model, given.adapter, given.measure))
        return 0
    if not given.yes and not sys.stdin.isatty():
        parser.error("changes need a human's approval and nobody can be asked here; pass --yes to approve them all")
    return play(given.model, given.adapter, given.data, yes=given.yes)


def play(model: str, adapter: str | None, data: Path, *, yes: bool) -> int:
    """Both sessions and the control; returns the exit code."""
    started = time.monotonic()
    prepare(data)
    setup = Setup(str(data / "with-memory"), model, adapter, yes=yes)
    control = Setup(str(data / "without-memory"), model, adapter, memory=False, yes=True)
    Path(setup.data).mkdir()
    print("Session one: the developer tells things")
    _run("tell", setup)
    # The control starts from the same thread.
    shutil.copytree(setup.data, control.data)
    print("\nSession two, in another process: the conversation is gone, the memory is not")
    outcome = _run("work", setup)
    print("\nThe same session with the memory off (changes approved without asking)")
    without = _run("work", control)
    print(f"\n{_verdict(outcome, without)}")
    print(f"{time.monotonic() - started:.0f} s; the changed repository is in {Path(setup.data).resolve()}")
    return 0 if kept(outcome) else 1


def prepare(data: Path) -> None:
    """An empty folder, in place of that of an earlier run; other folders with content are refused."""
    if data.exists():
        if any(data.iterdir()) and not (data / _MARKER).exists():
            sys.exit(f"{data} holds other things; give another folder with --data")
        shutil.rmtree(data)
    data.mkdir(parents=True)
    (data / _MARKER).touch()


def kept(outcome: Outcome) -> bool:
    """Whether everything that was told held in session two."""
    proposed = outcome.proposed not in ("", Settings().branch)
    return all(outcome.right.values()) and proposed and outcome.renamed and outcome.tests.startswith("5 passed")


def _run(phase: str, setup: Setup) -> Outcome:
    """A session in a process of its own."""
    subprocess.run([sys.executable, "-m", "coding_assistant.session", phase, json.dumps(asdict(setup))], check=True)
    found = Path(setup.data) / "outcome.json"
    return Outcome(**json.loads(found.read_text())) if found.exists() else Outcome()


def _verdict(outcome: Outcome, without: Outcome) -> str:
    rows = [("", "memory", "memory off")]
    rows += [(name, _word(right), _word(without.right.get(name))) for name, right in outcome.right.items()]
    rows += [
        ("fix proposed", outcome.proposed or "none", without.proposed or "none"),
        ("tests at the end", outcome.tests or "not run", without.tests or "not run"),
        ("prompt tokens", str(outcome.prompt_tokens), str(without.prompt_tokens)),
        ("replaying session one", str(outcome.replayed_tokens), str(without.replayed_tokens)),
    ]
    lines = [f"{name:<26}{one:<28}{other}" for name, one, other in rows]
    end = "All that was told held." if kept(outcome) else "Falls short: not all that was told held."
    return "\n".join([*lines, end])


def _word(right: bool | None) -> str:
    return {True: "right call", False: "wrong or no call", None: "-"}[right]


if __name__ == "__main__":
    sys.exit(main())
