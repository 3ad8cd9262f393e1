"""Tools whose only argument was stated earlier, and requests for them that do not repeat it."""

from __future__ import annotations

from typing import Any

REQUESTS = {
    "send_message": (
        "Send a message about it.",
        "Please let the others know.",
        "Drop them a line, please.",
        "Write to the team.",
        "Pass it on, please.",
    ),
    "create_ticket": (
        "Open a ticket for it.",
        "Please file this.",
        "Make a ticket, please.",
        "Report it for me.",
        "That needs a ticket.",
    ),
    "search_records": (
        "Look it up, please.",
        "Search for it.",
        "See what we have on it.",
        "Find the entries, please.",
        "Go through the records.",
    ),
    "update_record": (
        "Update the record, please.",
        "Enter that for me.",
        "Put it into the system.",
        "Save it in the file.",
        "Change the entry, please.",
    ),
    "schedule_event": (
        "Put it into the calendar.",
        "Schedule it, please.",
        "Make an appointment of it.",
        "Reserve a slot for it.",
        "Plan it in, please.",
    ),
    "run_report": (
        "Run the report.",
        "Please start the report.",
        "Let me have the report.",
        "Make me a report, please.",
        "I need the report.",
    ),
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
