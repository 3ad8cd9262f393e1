"""Every error that agentmem raises on purpose.

    AgentMemError
    ├── MissingExtraError          an optional dependency is not installed
    ├── ConfigError                an option is unknown, archived or contradictory
    ├── AdapterError               adapter files do not hold what the config or the model needs
    │   └── MissingAdapterError    memory is wanted, but the model has no adapter
    ├── ModelNotFoundError         no model files at the path, or under the name, that was given
    ├── UnsupportedModelError      the model's attention is built in a way that memory cannot be attached to
    ├── SegmentsRequiredError      a message or sentence adapter should write but has no segments
    ├── StateError                 a memory state cannot be used
    │   ├── CorruptStateError      truncated, altered or malformed bytes
    │   └── StateMismatchError     made by another model or adapter, or of another shape
    ├── TranscriptError            messages that the chat template cannot render
    ├── HistoryEditedError         on_edit="error", and a consumed message was edited
    ├── WindowError                what must be shown does not fit the window
    ├── TurnError                  a call breaks the rules of a turn (one `MemoryTurn` used twice, for example)
    ├── TurnCancelledError         the caller cancelled the turn
    ├── TurnTimeoutError           the turn took longer than its timeout
    ├── EngineClosedError          the engine was closed
    ├── DataError                  data to train on or to measure by cannot be read or used
    ├── TrainingError              a training run cannot go on; its last checkpoint is whole
    ├── StorageError               a database lacks what was requested, or holds something this version cannot read
    └── FactStoreError             the fact store cannot be opened or used
        ├── FactIndexError         its search index is lost or damaged; the facts are not
        └── StoreOwnedError        another process owns the directory

Messages say what was expected, what was found, and what to do. Something that works, but perhaps not as intended, is a
`MemoryWarning`. This module imports nothing.
"""


def install_hint(extra: str) -> str:
    """The command that installs an extra. agentmem is on no package index; it is installed from its repository."""
    return f"in a checkout of agentmem run: pip install '.[{extra}]'"


class AgentMemError(Exception):
    """Base of every error that agentmem raises on purpose."""


class MemoryWarning(UserWarning):
    """A memory is used in a way that works, but perhaps not as intended."""


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
    """The model has no adapter of its own, and none was passed."""


class ModelNotFoundError(AgentMemError, OSError):
    """Neither a local directory nor the hub has a model's or tokenizer's files under the given name."""


class UnsupportedModelError(AgentMemError, TypeError):
    """Memory cannot be attached to the model's attention projections; the message says what the model has instead."""


class SegmentsRequiredError(AgentMemError, ValueError):
    """An adapter that writes by message or sentence should write but has no segment ids."""


class StateError(AgentMemError, ValueError):
    """A memory state cannot be used."""


class CorruptStateError(StateError):
    """A state's bytes are truncated, altered or malformed."""


class StateMismatchError(StateError):
    """A state was made by another model or adapter, or has another shape."""


class TranscriptError(AgentMemError, ValueError):
    """Messages that the tokenizer's chat template cannot render."""


class HistoryEditedError(AgentMemError, ValueError):
    """Under `on_edit="error"`: a message that comes before a consumed one is new or changed."""


class WindowError(AgentMemError, ValueError):
    """What must be shown (system messages and the last message) does not fit the window."""


class TurnError(AgentMemError, RuntimeError):
    """A call breaks the rules of a turn, such as using one `MemoryTurn` twice."""


class TurnCancelledError(AgentMemError):
    """The caller cancelled the turn; the state it started from is unchanged."""


class TurnTimeoutError(AgentMemError, TimeoutError):
    """The turn took longer than its timeout; the state it started from is unchanged."""


class EngineClosedError(AgentMemError, RuntimeError):
    """The engine was closed, or its worker thread died; load a new one."""


class DataError(AgentMemError, ValueError):
    """Data to train on or to measure by cannot be read, or too much of it cannot be used; the message says where."""


class TrainingError(AgentMemError, RuntimeError):
    """A training run cannot go on: its loss is no number, or memory ran out. The last checkpoint is whole."""


class StorageError(AgentMemError, RuntimeError):
    """A database does not hold what was requested, or holds something that this version cannot read."""


class FactStoreError(AgentMemError, RuntimeError):
    """A fact store cannot be opened, or cannot do what was requested."""


class FactIndexError(FactStoreError):
    """A fact store's search index is lost or damaged; the facts are safe, and it can be rebuilt from them."""


class StoreOwnedError(FactStoreError):
    """Another process owns the fact store's directory."""
