"""Several GPUs: the configs that come along, as `accelerate launch` reads them, in two processes that play the GPUs."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.commands import launch
from accelerate.utils import DeepSpeedPlugin, DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from agentmem.delta.adapter import load_adapter
from agentmem.errors import ConfigError
from agentmem.training.command import accelerate_path
from tests.helpers.toy_training import assert_same, forked, losses, run, toy_trainer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """`launched(name, *options)`: what `accelerate launch` with a config of ours tells the processes that it starts."""
    told: list[dict[str, str]] = []
    environments: dict[str, Callable[[Any], Any]] = {
        "multi_gpu_launcher": prepare_multi_gpu_env,
        "deepspeed_launcher": lambda args: prepare_deepspeed_cmd_env(args)[1],
    }
    for name, environment in environments.items():
        monkeypatch.setattr(launch, name, lambda args, environment=environment: told.append(environment(args)))

    def tell(name: str, *options: str) -> dict[str, str]:
        argv = ["--config_file", str(accelerate_path(name)), "--main_process_port", str(free_port()), *options]
        launch.launch_command(launch.launch_command_parser().parse_args([*argv, "script.py"]))
        before = dict(os.environ)
        return {key: value for key, value in told.pop().items() if before.get(key) != value}

    return tell


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def in_two_processes(environment: dict[str, str], kind: DistributedType, work: Callable[[], None]) -> list[int | None]:
    """Do the same in two processes that talk by gloo; their exit codes.

    accelerate spreads parameters over GPUs only, so for that they take the CPU for one.
    """
    port = free_port()

    def start(rank: int) -> None:
        os.environ.update(environment)
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        if kind == DistributedType.DEEPSPEED:
            without_a_compiler()
        if kind != DistributedType.MULTI_CPU:
            PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
            PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
        work()

    processes = [forked(partial(start, rank)) for rank in (0, 1)]
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes]


def without_a_compiler() -> None:
    """Let DeepSpeed talk by gloo; what it would use between processes on a CPU it compiles at first use."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")  # of what it imports
    import_module("deepspeed")
    vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None


def train_in_two_sittings(out: Path, kind: DistributedType) -> None:
    """Train with half the batch: one step and a checkpoint, then the rest from there."""
    for stop in (True, False):
        device = "cpu" if kind == DistributedType.MULTI_CPU else "auto"
        trainer = toy_trainer(out, batch_size=2, device=device)
        trainer.stop.requested = stop
        trainer.run()
        assert trainer.accelerator.distributed_type == kind
        spread = {isinstance(parameter, DTensor) for parameter in trainer.model.parameters()}
        assert spread == {kind == DistributedType.FSDP}  # the frozen model too


def assert_learnt_as_one(out: Path, wanted: Path) -> None:
    assert losses(out) == pytest.approx(losses(wanted), rel=1e-5)
    found, one = (load_adapter(path / "checkpoint-6") for path in (out, wanted))
    assert_same(dict(found.tensors), dict(one.tensors), 1e-5)
    assert found.base == one.base


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the dependency group deepspeed")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DistributedType.MULTI_CPU),
        ("fsdp", DistributedType.FSDP),
        pytest.param("zero2", DistributedType.DEEPSPEED, marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_two_processes_learn_and_save_what_one_does(
    name: str, kind: DistributedType, tmp_path: Path, launched: Callable[..., dict[str, str]]
) -> None:
    """Also when the run is resumed. Memory, moments and model are whole on the disk, however they are spread."""
    codes = in_two_processes(launched(name), kind, partial(train_in_two_sittings, tmp_path / "two", kind))
    assert codes == [0, 0]
    run(tmp_path / "one", batch_size=4)
    assert_learnt_as_one(tmp_path / "two", tmp_path / "one")
    if kind != DistributedType.DEEPSPEED:  # which has files of its own
        two, one = (load_file(tmp_path / path / "checkpoint-6/optimizer.safetensors") for path in ("two", "one"))
        assert_same(two, one, 1e-4)


def test_layers_that_are_gathered_one_by_one_are_refused(
    tmp_path: Path, launched: Callable[..., dict[str, str]]
) -> None:
    options = ("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
    options = (*options, "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer")
    said = tmp_path / "said"

    def work() -> None:
        with pytest.raises(ConfigError) as caught:
            toy_trainer(tmp_path / "out", batch_size=2, device="auto")
        said.write_text(str(caught.value))

    assert in_two_processes(launched("fsdp", *options), DistributedType.FSDP, work) == [0, 0]
    assert "fsdp_auto_wrap_policy: NO_WRAP" in said.read_text()


def test_zero2_is_what_deepspeed_is_told(
    launched: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = launched("zero2")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    told = DeepSpeedPlugin().deepspeed_config
    assert told["zero_optimization"]["stage"] == 2
    assert told["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert told["gradient_clipping"] == "auto"
