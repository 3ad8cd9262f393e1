"""All that the analyst says, and what each request should lead to, in one place.

Definitions are told as "The NAME is VALUE."; requests leave them out:
- the branch: what this shop has recorded are no customers' sales, and is left out;
- the currency: the one that is summed;
- the release month, here a quarter: the fiscal year begins with it.

The chart is named in its request.
"""

from __future__ import annotations

from dataclasses import dataclass

NANO_SYSTEM = "You are an analysis assistant."
SYSTEM = (
    "You are an analysis assistant. Work with the tools, one call at a time, and answer in one sentence. The analyst's "
    "definitions (the branch to leave out, the currency, and the release month, with which the fiscal year begins) are "
    "the arguments; do not ask for them again."
)


@dataclass(frozen=True)
class Terms:
    """The definitions; `currency` replaces `old_currency`."""

    branch: str = "demo desk"
    old_currency: str = "net dollar"
    currency: str = "net euro"
    release_month: str = "autumn quarter"


@dataclass(frozen=True)
class Request:
    """What the analyst asks for, and the call that is right."""

    text: str
    tool: str
    arguments: dict[str, str]


def definitions(terms: Terms) -> tuple[str, ...]:
    """What the analyst says in session one."""
    return (
        "Hello!",
        f"The branch is {terms.branch}.",
        f"The currency is {terms.old_currency}.",
        f"The release month is {terms.release_month}.",
        f"Actually, the currency is now {terms.currency}.",
        "Thanks!",
    )


def requests(terms: Terms) -> dict[str, Request]:
    """The requests, by the name of what they bring."""
    return {
        "rows": Request("Prepare the rows.", "prepare_rows", {"branch": terms.branch}),
        "sums": Request("Measure the sums.", "measure_sums", {"currency": terms.currency}),
        "year": Request("Render the tables.", "render_tables", {"release_month": terms.release_month}),
        "plot": Request('Call plot_sums with chart_type "bar chart".', "plot_sums", {"chart_type": "bar chart"}),
    }


SESSIONS = (("rows", "sums", "sale total"), ("rows", "sums", "year", "plot", "year total"))
"""What the two working sessions ask for; what is no request is a fact that is asked for."""


def question(subject: str) -> str:
    """A question for a fact."""
    return f"What is the {subject}?"
