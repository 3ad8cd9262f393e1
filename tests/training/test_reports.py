"""What `report_to` names gets every step and every measurement, without a network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from agentmem.training.checkpoints import LOG_FILE, logged
from agentmem.training.trainer import Measurement
from tests.helpers.toy_training import forked, toy_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def train(out: Path, report_to: str) -> None:
    """Six steps, and measurements after the third and the sixth."""
    toy_trainer(
        out,
        report_to=(report_to,),
        evaluate_every=3,
        measure=lambda _: Measurement(0.25, {"memory": 0.5, "zero": 0.25}),
    ).run()


def test_tensorboard(tmp_path: Path, needs: Callable[[object, str], None]) -> None:
    needs(find_spec("tensorboard"), "tensorboard, which is part of the dependency group `dev`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "tensorboard")
    (file,) = tmp_path.glob("runs/*/events.*")
    found = EventAccumulator(str(file)).Reload()
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(
        logged(tmp_path / LOG_FILE)[0], rel=1e-6
    )
    for name, value in (("score", 0.25), ("memory", 0.5), ("zero", 0.25)):
        assert [(event.step, event.value) for event in found.Scalars(f"eval/{name}")] == [(3, value), (6, value)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_trackio_is_written_to_its_own_folder_on_this_machine(
    tmp_path: Path, needs: Callable[[object, str], None]
) -> None:
    needs(find_spec("trackio"), "trackio, which is part of the dependency group `dev`")

    def work() -> None:
        os.environ["TRACKIO_DIR"] = str(tmp_path / "trackio")  # read when trackio is imported
        train(tmp_path / "out", "trackio")
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs("agentmem", str(tmp_path / "out"))
        (tmp_path / "rows.json").write_text(json.dumps(rows, default=str))

    process = forked(work)
    process.join(120)
    assert process.exitcode == 0
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    found = [row["train/loss"] for row in rows if "train/loss" in row]
    assert found == pytest.approx(logged(tmp_path / "out" / LOG_FILE)[0], rel=1e-6)
    assert [row["train/global_step"] for row in rows if row.get("eval/memory") == 0.5] == [3, 6]
