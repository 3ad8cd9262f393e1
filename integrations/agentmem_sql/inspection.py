"""Looking into threads without running them: what a thread's memory was, checkpoint by checkpoint.

No model is loaded and no graph is built; see `memory_history` for what is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from agentmem_sql.codec import Address
from agentmem_sql.driven import Driven
from agentmem_sql.ids import check_id
from agentmem_sql.memory_history import MemoryStep, memory_history


class Inspection(Driven):
    """Reads what is remembered in a thread."""

    def memory_history(
        self,
        thread_id: str,
        *,
        checkpoint_ns: str = "",
        checkpoint_id: str | None = None,
        channel: str | None = None,
        newest_first: bool = False,
    ) -> Iterator[MemoryStep]:
        """The memories that led to the thread's newest checkpoint, oldest first.

        There is one step for every checkpoint in which a channel holds a memory other than in the checkpoint
        before it (its parent). A checkpoint that leaves the memory as it was gives none, nor does one that
        empties it; the memory after that counts from nothing. Branches that the newest checkpoint does not
        come from are not on the way; name a checkpoint of theirs to see them.

        A thread that is not there has no steps. One that is pruned meanwhile gives those that are left. Reads
        page by page and holds one page at a time; `newest_first` begins at once, without following the
        thread to its first checkpoint.

        Args:
            thread_id: whose memory.
            checkpoint_ns: of a subgraph.
            checkpoint_id: where the way ends, instead of the newest checkpoint.
            channel: where the memory is kept. None finds every channel whose latest value is a memory as
                `MemoryState.to_dict` writes it, and leaves out what else such a channel held.
            newest_first: turn the order round.

        Raises:
            StorageError: there is no such checkpoint, or stored bytes were changed or damaged (names the
                checkpoint).
            CorruptStateError: what a checkpoint holds is no memory, or not one that this version reads.
        """
        address = Address(check_id(thread_id), checkpoint_ns, checkpoint_id)
        return memory_history(self._database, self._store, self._serde, address, channel, newest_first=newest_first)

    async def amemory_history(
        self,
        thread_id: str,
        *,
        checkpoint_ns: str = "",
        checkpoint_id: str | None = None,
        channel: str | None = None,
        newest_first: bool = False,
    ) -> AsyncIterator[MemoryStep]:
        """`memory_history` for a task."""
        options: dict[str, Any] = {"checkpoint_ns": checkpoint_ns, "checkpoint_id": checkpoint_id, "channel": channel}
        steps = self.memory_history(thread_id, newest_first=newest_first, **options)
        while (step := await asyncio.to_thread(next, steps, None)) is not None:
            yield step
