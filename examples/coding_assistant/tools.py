"""What the assistant can do: look, run the tests, and, when a human agrees, change files.

The tools that change something are in `CHANGING`; `planned` gives the same change without making it, for the human.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Mapping
from difflib import unified_diff
from pathlib import Path
from typing import Any

from langchain_core.tools import BaseTool, StructuredTool, ToolException

from coding_assistant.runner import run
from coding_assistant.workspace import Workspace

CHANGING = ("edit_file", "apply_fix", "format_names")

_SNAKE = ("snake case", "snake_case", "pep8")
_CAMEL = ("camel case", "camelCase")


class Tools:
    """The tools over one workspace.

    Args:
        workspace: the repository's folder.
        detail: how many characters of the tests' output a result shows; a very small model is confused by any.
    """

    def __init__(self, workspace: Workspace, detail: int = 0) -> None:
        self.workspace = workspace
        self.detail = detail
        self._changes: dict[str, Callable[..., dict[str, str]]] = {
            "edit_file": self._edited,
            "apply_fix": self._fixed,
            "format_names": self._renamed,
        }

    def all(self) -> list[BaseTool]:
        """The tools for LangChain; what they refuse is a result that the model reads."""
        functions = (
            self.list_files, self.read_file, self.search_code, self.run_tests,
            self.prepare_fix, self.edit_file, self.apply_fix, self.format_names,
        )  # fmt: skip
        return [StructuredTool.from_function(function, handle_tool_error=True) for function in functions]

    def planned(self, name: str, arguments: Mapping[str, Any]) -> str | ToolException:
        """What a changing tool would do, as a diff; or why it would refuse."""
        try:
            texts = self._changes[name](**arguments)
        except ToolException as refusal:
            return refusal
        except TypeError as wrong:
            return ToolException(f"Error: {wrong}.")
        lines: list[str] = []
        for path, text in texts.items():
            old = self.workspace.read(path).splitlines(keepends=True)
            lines += unified_diff(old, text.splitlines(keepends=True), path, path, n=0)
        return "".join(lines)

    # ------------------------------------------------------------------ looking

    def list_files(self) -> str:
        """List the files."""
        return "\n".join(self.workspace.name(file) for file in self.workspace.files())

    def read_file(self, path: str) -> str:
        """Read a file."""
        return self.workspace.read(path)

    def search_code(self, query: str) -> str:
        """Search the code."""
        found = []
        for file in self.workspace.files():
            name = self.workspace.name(file)
            for number, line in enumerate(self.workspace.read(name).splitlines(), 1):
                if query and query in line:
                    found.append(f"{name}:{number}: {line.strip()}")
        return "\n".join(found[:50]) or f"No {query} was found."

    def run_tests(self, test_command: str) -> str:
        """Run the tests."""
        return run(test_command, self.workspace.root, detail=self.detail)

    def prepare_fix(self, branch: str) -> str:
        """Prepare a fix other than that of the branch, which was tried and failed."""
        for name in self._fixes():
            if name != branch:
                return f"The next fix is {name}."
        return "No fix was found."

    # ------------------------------------------------------------------ changing

    def edit_file(self, path: str, old: str, new: str) -> str:
        """Edit a file: replace the only occurrence of the old text."""
        return self._done(self._edited(path, old, new))

    def apply_fix(self, name: str) -> str:
        """Apply a fix."""
        return self._done(self._fixed(name))

    def format_names(self, code_style: str) -> str:
        """Format the names of all functions by the code style."""
        return self._done(self._renamed(code_style))

    def _edited(self, path: str, old: str, new: str) -> dict[str, str]:
        return {self.workspace.name(self.workspace.find(path)): self.workspace.replaced(path, old, new)}

    def _fixed(self, name: str) -> dict[str, str]:
        if name not in self._fixes():
            raise ToolException(f"Error: no fix {name}.")
        fix = tomllib.loads(self.workspace.read(f"fixes/{name}.toml"))
        return self._edited(fix["path"], fix["old"], fix["new"])

    def _renamed(self, code_style: str) -> dict[str, str]:
        names = {old: new for old in self._functions() if (new := _styled(old, code_style)) != old}
        if not names:
            raise ToolException(f"No name differs from {code_style}.")
        pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
        texts = {self.workspace.name(f): f.read_text(encoding="utf-8") for f in self.workspace.files() if _python(f)}
        changed = {path: pattern.sub(lambda found: names[found[1]], text) for path, text in texts.items()}
        return {path: text for path, text in changed.items() if text != texts[path]}

    def _done(self, texts: dict[str, str]) -> str:
        self.workspace.write(texts)
        return "Done."

    def _fixes(self) -> list[str]:
        """The branches that hold a fix: files of the folder "fixes"."""
        files = (self.workspace.name(file) for file in self.workspace.files())
        return [name.removeprefix("fixes/").removesuffix(".toml") for name in files if name.startswith("fixes/")]

    def _functions(self) -> set[str]:
        """Names of the functions and methods of the repository; tests' names belong to the test runner."""
        found = set()
        for file in filter(_python, self.workspace.files()):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and not node.name.startswith(("test", "_")):
                    found.add(node.name)
        return found


def _python(file: Path) -> bool:
    return file.suffix == ".py"


def _styled(name: str, code_style: str) -> str:
    if code_style in _SNAKE:
        return re.sub(r"(?<=[a-z0-9])[A-Z]", lambda found: "_" + found[0], name).lower()
    if code_style in _CAMEL:
        return re.sub(r"_([a-z0-9])", lambda found: found[1].upper(), name)
    raise ToolException(f"Error: the style {code_style} is not known.")
