"""What can be done from the page: go back to a checkpoint, forget, export. One change at a time.

Receipts and exports are kept until the command ends: receipts in memory, exports in a folder that only the user can
read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from threading import Lock
from time import monotonic
from typing import Any

from langgraph.checkpoint.base import CheckpointMetadata, copy_checkpoint
from langgraph.checkpoint.base.id import uuid6

from agentmem.errors import ConfigError
from agentmem_governance import Exported, Governor, Receipt
from agentmem_inspect.contents import Place

_NOTE_AGAIN = 600.0  # seconds: until then, one who looks at a thread is still looking

COUNTERS = "counters_since_delta_snapshot"
"""What LangGraph counts of delta channels; a copy has the same ancestors, so the same numbers hold."""


@dataclass
class Changes:
    """Makes changes through a `Governor`, and notes who looks at what.

    Attributes:
        receipts: of what was forgotten, by id.
        exports: what was exported, by an id of its own, with the file.
    """

    governor: Governor
    clock: Callable[[], float] = monotonic
    receipts: dict[str, Receipt] = field(default_factory=dict)
    exports: dict[str, tuple[Exported, Path]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._folder: TemporaryDirectory[str] | None = None
        self._one = Lock()  # a change at a time
        self._noting = Lock()  # another one, so that nobody waits for a long change to look at something
        self._noted: dict[str, float] = {}

    def close(self) -> None:
        """Delete the files of the exports."""
        if self._folder is not None:
            self._folder.cleanup()

    def note_inspection(self, thread: str) -> None:
        """Note in the audit trail that somebody looks into a thread, but not again for each page that they open."""
        now = self.clock()
        with self._noting:
            last = self._noted.get(thread)
            if last is None or now - last >= _NOTE_AGAIN:
                self.governor.note_inspection(thread)
                self._noted[thread] = now

    def rewind(self, place: Place) -> str:
        """Let a thread go on from an earlier checkpoint: a copy of it becomes the newest; nothing is removed.

        The copy hangs where the checkpoint itself hangs, as LangGraph's own copies do: what was written after the
        checkpoint is not in its past. Gives the id of the copy.

        Raises:
            ConfigError: the checkpoint is one of a subgraph, which the main graph would not follow.
        """
        if place.ns:
            raise ConfigError(
                "expected a checkpoint of the main graph, found one of a subgraph; rewind the main graph, whose runs "
                "call it"
            )
        stored = place.stored
        new_id = str(uuid6())
        copy = {**copy_checkpoint(stored.checkpoint), "id": new_id, "ts": datetime.now(UTC).isoformat()}
        kept = {name: value for name, value in stored.metadata.items() if name in ("parents", "user_id", COUNTERS)}
        step = int(stored.metadata.get("step") or 0) + 1
        metadata: dict[str, Any] = {**kept, "source": "fork", "step": step, "actor": self.governor.actor}
        where = {"thread_id": place.thread, "checkpoint_ns": ""}
        if place.parent is not None:
            where["checkpoint_id"] = place.parent
        with self._one:
            made: CheckpointMetadata = metadata  # type: ignore[assignment]
            self.governor.saver.put({"configurable": where}, copy, made, {})  # type: ignore[arg-type]
        return new_id

    def forget_subject(self, name: str) -> Receipt:
        """Forget a subject; see `Governor.forget`."""
        with self._one:
            self._noted.clear()  # names of threads
            self._drop_exports()
            return self._kept(self.governor.forget(name))

    def forget_message(self, thread: str, message: str, *, with_reply: bool, keep_checkpoints: bool) -> Receipt:
        """Forget a message of a thread; see `Governor.forget`."""
        with self._one:
            self._drop_exports()
            receipt = self.governor.forget(
                thread=thread, message=message, with_reply=with_reply, keep_checkpoints=keep_checkpoints
            )
            return self._kept(receipt)

    def _drop_exports(self) -> None:
        """Delete the exports of this session, which may hold what is about to go."""
        while self.exports:
            _, (_, path) = self.exports.popitem()
            path.unlink(missing_ok=True)

    def resume(self) -> list[Receipt]:
        """Complete the deletions that were interrupted; see `Governor.resume`."""
        with self._one:
            return [self._kept(receipt) for receipt in self.governor.resume()]

    def _kept(self, receipt: Receipt) -> Receipt:
        self.receipts[receipt.id] = receipt
        return receipt

    def export(self, subject: str) -> str:
        """Export a subject into a file; gives the id under which it is kept."""
        own = token_hex(8)
        with self._one:
            if self._folder is None:
                self._folder = TemporaryDirectory(prefix="agentmem-inspect-")  # of mode 700
            path = Path(self._folder.name) / f"{own}.zip"
            self.exports[own] = self.governor.export(subject, path), path
        return own
