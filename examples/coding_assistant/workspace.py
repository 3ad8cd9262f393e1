"""The folder that the assistant works in, and nothing outside it.

Every path that the model names goes through `Workspace.find`. Absolute paths, "..", and symbolic links (also those that
lead back inside) are refused with a `ToolException`, whose text the model gets as the tool's result.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from langchain_core.tools import ToolException

REPOSITORY = Path(__file__).parent / "repository"
"""The small repository that ships with the example; it is copied before it is changed."""

_MAX_CHARS = 20_000
_HIDDEN = {"__pycache__"}


class Workspace:
    """A folder, its files, and changes to them.

    Args:
        root: the folder; it must exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve(strict=True)

    @classmethod
    def copy_of(cls, repository: Path, target: Path) -> Workspace:
        """A fresh copy of a repository, in place of what is at `target`."""
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(repository, target, ignore=shutil.ignore_patterns(*_HIDDEN))
        return cls(target)

    def find(self, name: str) -> Path:
        """The file of a relative path, or the only Python file of that name ("prices").

        Raises:
            ToolException: the path leads out of the folder, passes a link, or there is no such file.
        """
        path = self.confined(name)
        if path.is_file():
            return path
        same = [file for file in self.files() if file.suffix == ".py" and file.stem == name]
        if len(same) == 1:
            return same[0]
        raise ToolException(f"Error: no file {name}.")

    def confined(self, name: str) -> Path:
        """A path inside the folder, whether or not something is there.

        Raises:
            ToolException: it leads out of the folder or passes a link.
        """
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
            raise ToolException(f"Error: {name!r} is not inside the repository.")
        path = self.root
        for part in parts.parts:
            path = path / part
            if path.is_symlink():
                raise ToolException(f"Error: {name!r} is a symbolic link.")
        return path

    def files(self) -> Iterator[Path]:
        """All regular files, in order of their paths; links are passed over."""
        for folder, folders, names in os.walk(self.root):
            here = Path(folder)
            folders[:] = sorted(name for name in folders if name not in _HIDDEN and not (here / name).is_symlink())
            yield from (here / name for name in sorted(names) if not (here / name).is_symlink())

    def name(self, path: Path) -> str:
        """The path as the model is shown it."""
        return path.relative_to(self.root).as_posix()

    def read(self, name: str) -> str:
        """The text of a file.

        Raises:
            ToolException: see `find`; or it is no text, or too long.
        """
        path = self.find(name)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ToolException(f"Error: {name} is no text.") from None
        if len(text) > _MAX_CHARS:
            raise ToolException(f"Error: {name} has {len(text)} characters, more than {_MAX_CHARS}.")
        return text

    def replaced(self, name: str, old: str, new: str) -> str:
        """The text of a file with the only occurrence of `old` replaced; nothing is written.

        Raises:
            ToolException: see `read`; or `old` is not there exactly once.
        """
        text = self.read(name)
        if (found := text.count(old) if old else 0) != 1:
            raise ToolException(f"Error: the text to replace occurs {found} times in {name}, not once.")
        return text.replace(old, new)

    def write(self, texts: dict[str, str]) -> None:
        """Put new texts in place of existing files' texts."""
        for path, text in [(self.find(name), text) for name, text in texts.items()]:
            path.write_text(text, encoding="utf-8")
