"""agentmem_governance: whose memory is whose, what was done to it, and how it is forgotten, exported and accounted for.

It stands on the SQL checkpointer and the fact store. A *subject* (a user, a customer, a project) owns threads and
facts; a `Governor` lists, exports and forgets them, and gives a signed receipt of what went.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.lazy import lazy_names

_HOMES = {
    "AuditEntry": "agentmem_governance.trail",
    "Exported": "agentmem_governance.export",
    "Governor": "agentmem_governance.governor",
    "Receipt": "agentmem_governance.receipt",
    "Subject": "agentmem_governance.subjects",
    "Trail": "agentmem_governance.trail",
    "Verification": "agentmem_governance.receipt",
}
_NEEDS = {"sqlalchemy": ("sqlalchemy", "sql"), "langgraph": ("langgraph-checkpoint", "sql")}

__all__ = ["AuditEntry", "Exported", "Governor", "Receipt", "Subject", "Trail", "Verification"]

if TYPE_CHECKING:
    from agentmem_governance.export import Exported
    from agentmem_governance.governor import Governor
    from agentmem_governance.receipt import Receipt, Verification
    from agentmem_governance.subjects import Subject
    from agentmem_governance.trail import AuditEntry, Trail

__getattr__, __dir__ = lazy_names(__name__, _HOMES, _NEEDS)
