"""Every error that agentmem raises on purpose.

    AgentMemError
    ├── MissingExtraError          an optional dependency is not installed
    ├── ConfigError                an option is unknown, archived or contradictory
    ├── AdapterError               adapter files do not hold what the config or the model needs
    │   └── MissingAdapterError    memory was asked for and no adapter is at hand
    ├── ModelNotFoundError         a model's files are not at the place that was given
    ├── UnsupportedModelError      the model's attention is not built in a way we can steer
    ├── SegmentsRequiredError      a message or sentence adapter was asked to write without segments
    ├── StateError                 a memory state cannot be used
    │   ├── CorruptStateError      truncated, altered or malformed bytes
    │   └── StateMismatchError     made by another model or adapter, or of another shape
    ├── TranscriptError            messages that the chat template cannot carry
    ├── HistoryEditedError         on_edit="error" met an edited message
    ├── WindowError                not even what must be shown fits the window
    ├── TurnError                  a turn was used against its contract (a carrier used twice, for example)
    ├── TurnCancelledError         the caller cancelled the turn
    ├── TurnTimeoutError           the turn took longer than it was given
    ├── EngineClosedError          the engine was closed
    ├── TrainingError              a process that computes part of a training step failed
    ├── StorageError               a database does not hold what was asked for, or holds something foreign
    └── FactStoreError             the fact store cannot be opened or used
        ├── FactIndexError         its search index is lost or damaged; the facts are not
        └── StoreOwnedError        another process owns the directory

Messages say what was expected, what was found, and what to do. What works, but perhaps not as meant, is a
`MemoryWarning`. This module imports nothing.
"""


def install_hint(extra: str) -> str:
    """What to run to get an extra. agentmem is on no package index: it is installed from its repository."""
    return f"in a checkout of agentmem run: pip install '.[{extra}]'"


class AgentMemError(Exception):
    """Base of every error that agentmem raises on purpose."""


class MemoryWarning(UserWarning):
    """A memory is used in a way that works, but perhaps not as its owner means it."""


class MissingExtraError(AgentMemError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}, which is not installed; {install_hint(extra)}")
        self.package = package
        self.extra = extra


class ConfigError(AgentMemError, ValueError):
    """A memory option is unknown, archived, out of range or contradicts another."""


class AdapterError(AgentMemError, ValueError):
    """Adapter files are missing, malformed, or do not fit the model they are attached to."""


class MissingAdapterError(AdapterError):
    """The model has no adapter of its own and none was given."""


class ModelNotFoundError(AgentMemError, OSError):
    """A model's or tokenizer's files are neither in a directory nor on the hub under the name that was given."""


class UnsupportedModelError(AgentMemError, TypeError):
    """The model's attention projections cannot be steered; the message names what was seen."""


class SegmentsRequiredError(AgentMemError, ValueError):
    """An adapter that writes by message or sentence was asked to write without segment ids."""


class StateError(AgentMemError, ValueError):
    """A memory state cannot be used."""


class CorruptStateError(StateError):
    """A state's bytes are truncated, altered or malformed."""


class StateMismatchError(StateError):
    """A state was made by another model or adapter, or has another shape."""


class TranscriptError(AgentMemError, ValueError):
    """Messages that the tokenizer's chat template cannot carry."""


class HistoryEditedError(AgentMemError, ValueError):
    """`on_edit="error"` and a message before an already consumed one is new or changed."""


class WindowError(AgentMemError, ValueError):
    """What must be shown (system messages and the last message) does not fit the window."""


class TurnError(AgentMemError, RuntimeError):
    """A turn was used against its contract."""


class TurnCancelledError(AgentMemError):
    """The caller cancelled the turn; the state it started from is unchanged."""


class TurnTimeoutError(AgentMemError, TimeoutError):
    """The turn took longer than the seconds it was given; the state it started from is unchanged."""


class EngineClosedError(AgentMemError, RuntimeError):
    """The engine was closed, or its worker died; load a new one."""


class TrainingError(AgentMemError, RuntimeError):
    """A process that computes part of a training step failed; the last checkpoint is intact."""


class StorageError(AgentMemError, RuntimeError):
    """A database does not hold what was asked for, or holds something this version cannot read."""


class FactStoreError(AgentMemError, RuntimeError):
    """A fact store cannot be opened or used as asked."""


class FactIndexError(FactStoreError):
    """A fact store's search index is lost or damaged; the facts are kept apart, and it can be built anew from them."""


class StoreOwnedError(FactStoreError):
    """Another process owns the fact store's directory."""
