"""Tools whose only argument was stated earlier, and requests for them that do not repeat it."""

from __future__ import annotations

from typing import Any

REQUESTS = {
    "send_message": ("Send a message about it.", "Please let the others know."),
    "create_ticket": ("Open a ticket for it.", "Please file this."),
    "search_records": ("Look it up, please.", "Search for it."),
    "update_record": ("Update the record, please.", "Enter that for me."),
    "schedule_event": ("Put it into the calendar.", "Schedule it, please."),
    "run_report": ("Run the report.", "Please start the report."),
}


def offered(name: str, argument: str, description: str) -> dict[str, Any]:
    """A tool in the form that templates take: a function with one required string argument."""
    properties = {argument: {"type": "string", "description": description}}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name.replace('_', ' ').capitalize()}. Needs what the user said earlier.",
            "parameters": {"type": "object", "properties": properties, "required": [argument]},
        },
    }
