"""Questions that a model judges: what the judge is asked, that verdicts are kept, endpoints, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentmem import Message
from agentmem.errors import ConfigError
from agentmem.evaluation.judge import Judge, open_judge
from agentmem.evaluation.tasks import open_task
from agentmem.training.judging import judge as is_right
from agentmem_cli.app import app
from tests.helpers.chatterer import save_chatterer
from tests.helpers.task_data import save_longmemeval


class Endpoint:
    """A server in OpenAI's form, to which every reply is right."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.asked.append(json.loads(body))
                outer.keys.append(self.headers["authorization"])
                message = {"role": "assistant", "content": "Yes."}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(reply).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def test_the_rest_of_longmemeval_is_judged(tmp_path: Path) -> None:
    save_longmemeval(tmp_path)
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return "Yes." if "Ozu" in prompt.partition("Reply: ")[2] else "No"

    task = open_task("longmemeval-judge", [tmp_path], judge=Judge("wise", ask, tmp_path / "kept.jsonl"))
    assert "as wise judges it" in task.title
    assert task.skipped == {"a short answer (asked by longmemeval)": 3}
    assert "constant" not in task.arms
    kinds = {probe.ask.kind: probe.ask for probe in task.probes}
    assert set(kinds) == {"multi-session", "never told"}
    long, never = kinds["multi-session"], kinds["never told"]
    assert long.messages[0].content == "What do I like? (Today is 2023/05/30.)"
    assert is_right(long, Message("assistant", "films of Ozu")).right
    assert not is_right(long, Message("assistant", "films of others")).right
    assert "The reply should name films of Ozu" in asked[0]
    is_right(never, Message("assistant", "You never told me."))
    assert "says that it does not know" in asked[2]
    assert "You never said." in asked[2]
    assert is_right(long, Message("assistant", "films of Ozu")).right
    assert len(asked) == 3, "what is kept is not asked again"
    again = Judge("wise", ask, tmp_path / "kept.jsonl")
    assert again("multi-session", "What do I like?", long.reply.content, "films of Ozu")
    assert len(asked) == 3
    assert not Judge("other", ask, tmp_path / "kept.jsonl")("multi-session", "What?", "This", "That")
    assert len(asked) == 4, "another judge is asked anew"


def test_an_endpoint_judges_a_run(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMEM_JUDGE_KEY", "secret")
    save_longmemeval(tmp_path)
    model = save_chatterer(tmp_path / "model", max_position_embeddings=256)
    command = ["evaluate", "--model", model, "--task", "longmemeval-judge", "--data-dir", tmp_path, "--arms", "zero"]
    command += ["--judge", "small", "--judge-url", endpoint.url, "--max-tokens", 4, "--out", tmp_path / "out"]
    finished = CliRunner().invoke(app, [str(part) for part in command])
    assert finished.exit_code == 0, finished.output
    (task,) = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["tasks"]
    assert (task["arms"]["zero"]["share"], task["questions"]) == (1.0, 2)
    assert f"as small at {endpoint.url} judges it" in (tmp_path / "out" / "report.md").read_text("utf-8")
    assert {(each["model"], each["temperature"]) for each in endpoint.asked} == {("small", 0)}
    assert set(endpoint.keys) == {"Bearer secret"}
    assert len(endpoint.asked) == 2
    kept = (tmp_path / "out" / "judgements.jsonl").read_text("utf-8").splitlines()
    assert all(json.loads(line)["said"] == "Yes." for line in kept)


def test_a_model_of_ones_own_judges() -> None:
    judge = open_judge("nano")
    assert judge("multi-session", "What?", "This", "That") in (True, False)
    judge.close()


def test_without_a_judge_the_task_is_refused(tmp_path: Path) -> None:
    save_longmemeval(tmp_path)
    with pytest.raises(ConfigError, match="needs a model that judges replies: name it"):
        open_task("longmemeval-judge", [tmp_path])
    judge = open_judge("small", "http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match=r"small at http://127.0.0.1:9/v1 could not be asked"):
        judge("multi-session", "What?", "This", "That")
    finished = CliRunner().invoke(app, ["evaluate", "--task", "sgd", "--judge", "nano"])
    assert isinstance(finished.exception, ConfigError)
    assert "--judge is no option of --task sgd" in str(finished.exception)
