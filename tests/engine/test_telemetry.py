"""OpenTelemetry: nothing is imported or made until the application sets a provider; then turns and events are seen.

In a process of its own, since providers are set once in a process.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.sql_cases import finish, start_child

CODE = """
import json, sys
import agentmem
from agentmem import Message, Sampling, telemetry

engine = agentmem.load("nano")
said, short = [Message("user", "My codename is zebra.")], Sampling(max_tokens=4)
engine.turn(said, sampling=short)
loaded = [name for name in sys.modules if name.startswith("opentelemetry")]
made = []

from langchain_core.messages import HumanMessage
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from agentmem_governance import Governor
from agentmem_sql import SQLAlchemySaver
from tests.helpers.sql_cases import config, put

engine.turn(said, sampling=short)
made += telemetry.ACTIVE
spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([reader]))

with trace.get_tracer("application").start_as_current_span("request"):
    turn = engine.turn(said, sampling=short)
engine.remember(said)
try:
    engine.turn(said, sampling=short, timeout=1e-9)
except agentmem.errors.TurnTimeoutError:
    pass
with SQLAlchemySaver.from_url("sqlite:///:memory:", audit=True) as saver:
    values = {"messages": [HumanMessage("zebra", id="1")], "memory": turn.state.to_dict()}
    put(saver, config("Zephyrine/1"), values, user_id="Zephyrine")
    Governor(saver, actor="Zephyrine").note_inspection("Zephyrine/1")
engine.close()

points = {}
for resource in reader.get_metrics_data().resource_metrics:
    for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
        points[metric.name] = [
            [dict(point.attributes), getattr(point, "value", None), getattr(point, "count", None)]
            for point in metric.data.data_points
        ]
print(json.dumps({
    "before": loaded + [repr(each) for each in made],
    "spans": [json.loads(span.to_json()) for span in spans.get_finished_spans()],
    "points": points,
    "turn": [turn.usage.input_tokens, turn.usage.output_tokens, turn.written, turn.state.digest, turn.state.shape[0]],
}))
"""


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    lines = finish(start_child(code=CODE)).splitlines()
    return dict(json.loads(lines[-1]))


def points(recorded: dict[str, Any], name: str, **attributes: object) -> list[list[Any]]:
    return [point for point in recorded["points"][name] if attributes.items() <= point[0].items()]


def test_nothing_is_imported_or_made_before_the_application_sets_a_provider(recorded: dict[str, Any]) -> None:
    assert recorded["before"] == []


def test_a_turn_is_a_span_below_its_callers(recorded: dict[str, Any]) -> None:
    shown, decoded, written, digest, _ = recorded["turn"]
    spans = {span["name"]: span for span in recorded["spans"] if "error.type" not in span["attributes"]}
    turn = spans["chat nano"]
    assert turn["parent_id"] == spans["request"]["context"]["span_id"]
    assert turn["attributes"]["gen_ai.usage.input_tokens"] == shown
    assert turn["attributes"]["gen_ai.usage.output_tokens"] == decoded
    assert turn["attributes"]["agentmem.tokens.written"] == written
    assert turn["attributes"]["agentmem.memory.digest"] == digest
    assert "remember nano" in spans
    (failed,) = [span for span in recorded["spans"] if "error.type" in span["attributes"]]
    assert failed["attributes"]["error.type"] == "TurnTimeoutError"
    assert failed["status"]["status_code"] == "ERROR"


def test_tokens_seconds_batches_queue_and_norms_are_measured(recorded: dict[str, Any]) -> None:
    _, decoded, written, _, layers = recorded["turn"]
    chat = {"gen_ai.operation.name": "chat"}
    ((_, value, _),) = points(recorded, "agentmem.tokens", kind="written", **chat)
    assert value == written
    ((_, value, _),) = points(recorded, "agentmem.tokens", kind="output", **chat)
    assert value == decoded
    assert [count for _, _, count in points(recorded, "agentmem.turn.duration", **chat)] == [1, 1], "one failed"
    assert all(value == 0 for _, value, _ in points(recorded, "agentmem.turns"))
    assert sum(count for _, _, count in points(recorded, "agentmem.turn.queued")) >= 2
    assert points(recorded, "agentmem.batch.size")[0][2] >= decoded - 1
    assert len(points(recorded, "agentmem.memory.norm", **chat)) == layers


def test_events_of_the_audit_trail_are_spans_without_text_or_persons(recorded: dict[str, Any]) -> None:
    *_, digest, _ = recorded["turn"]
    assert [value for _, value, _ in points(recorded, "agentmem.audit.events", event="written")] == [1]
    (event,) = [span for span in recorded["spans"] if span["name"] == "agentmem.written"]
    assert event["attributes"]["agentmem.memory.after"] == [digest]
    assert event["attributes"]["agentmem.messages"] == 1
    assert any(span["name"] == "agentmem.inspected" for span in recorded["spans"])
    assert not any(word in json.dumps(recorded["spans"]) for word in ("zebra", "Zephyrine"))
