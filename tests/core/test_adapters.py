"""Adapter directories: both formats in and out, and everything that is refused, by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from agentmem import MemoryConfig, SteeredModel
from agentmem.delta.adapter import AUTHORS_FILE, SAFETENSORS_FILE, Adapter, load_adapter, save_adapter
from agentmem.delta.config import CONFIG_FILE, DIGEST_KEY
from agentmem.errors import AdapterError, ConfigError
from tests.helpers.core_models import GOLDEN, random_ids, steer, tiny

CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
KEY = "model.layers.1.self_attn.memory_q_proj"


def _golden(case: str = "qwen3_tsw") -> Adapter:
    return load_adapter(GOLDEN / case / "adapter")


def _same(a: Adapter, b: Adapter) -> bool:
    return (
        a.config == b.config
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(t, b.tensors[name]) and t.dtype == b.tensors[name].dtype for name, t in a.tensors.items())
    )


@pytest.mark.parametrize("form", ["safetensors", "authors"])
@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, form: Any, tmp_path: Path) -> None:
    adapter = _golden(case)
    save_adapter(tmp_path, adapter, format=form)
    weights = SAFETENSORS_FILE if form == "safetensors" else AUTHORS_FILE
    assert {path.name for path in tmp_path.iterdir()} == {weights, CONFIG_FILE}
    if form == "safetensors":  # other tools read it: the authors' names
        assert load_file(tmp_path / weights).keys() == adapter.tensors.keys()
    again = load_adapter(tmp_path)
    assert _same(again, adapter)
    assert again.fingerprint == adapter.fingerprint
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (written.pop(DIGEST_KEY, None) is not None) is (form == "safetensors")
    assert written == json.loads((GOLDEN / case / "adapter" / CONFIG_FILE).read_text())


def test_round_trip_through_a_model(tmp_path: Path) -> None:
    model = tiny()
    steered = steer(model, couple_lambda=False, lambda_bias_init=1.5, num_state_heads=2, target_layers=(0, 2))
    steered.save(tmp_path)
    other = SteeredModel.attach(tiny(), adapter=tmp_path)
    ids = random_ids(1, 9)
    with torch.no_grad():
        a, b = steered(ids), other(ids)
    assert other.config == steered.config
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.state, b.state)
    assert other.adapter_fingerprint == steered.adapter_fingerprint == load_adapter(tmp_path).fingerprint


def test_fingerprint_follows_every_bit_and_every_field() -> None:
    adapter = _golden("qwen3_all_options")
    for name in adapter.tensors:
        changed = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
        changed[name].view(torch.int32).view(-1)[-1] ^= 1
        assert Adapter(adapter.config, changed).fingerprint != adapter.fingerprint, name
    fields: dict[str, Any] = {
        "alpha": 9.5,
        "delta_scale_max": 2.5,
        "write_strategy": "message",
        "lambda_bias_init": 3.0,
    }
    seen = {replace(adapter, config=adapter.config.replace(**{k: v})).fingerprint for k, v in fields.items()}
    assert len(seen | {adapter.fingerprint}) == len(fields) + 1
    halved = Adapter(adapter.config, {name: tensor.half() for name, tensor in adapter.tensors.items()})
    assert halved.fingerprint != adapter.fingerprint


def test_fingerprint_of_a_running_adapter() -> None:
    """Whatever dtype it runs in, it is the file's; once it is trained on, it is its own."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "qwen3_tsw" / "base", dtype=torch.bfloat16)
    steered = SteeredModel.attach(model, adapter=_golden())
    assert steered.memory[0].get_parameter("memory_q_proj").dtype == torch.bfloat16
    assert steered.adapter_fingerprint == _golden().fingerprint
    with torch.no_grad():
        steered.memory[0].get_parameter("beta_bias").add_(0.5)
    assert steered.adapter_fingerprint == steered.adapter.fingerprint != _golden().fingerprint


def test_ours_is_taken_where_both_are_there(tmp_path: Path) -> None:
    adapter = _golden()
    doubled = Adapter(adapter.config, {name: 2 * tensor for name, tensor in adapter.tensors.items()})
    save_adapter(tmp_path, adapter, format="authors")
    save_adapter(tmp_path, doubled)
    assert _same(load_adapter(tmp_path), doubled)
    with pytest.raises(AdapterError, match="another directory"):
        save_adapter(tmp_path, adapter, format="authors")


def test_tensors_that_share_memory_or_stand_across_are_saved_whole(tmp_path: Path) -> None:
    adapter = _golden()
    both = torch.randn(64, 16)
    tensors = {**adapter.tensors, KEY: both[:, :8].T, KEY.replace("_q_", "_k_"): both[:, :8].T}
    save_adapter(tmp_path, Adapter(adapter.config, tensors))
    assert torch.equal(load_adapter(tmp_path).tensors[KEY], both[:, :8].T)
    assert Adapter(adapter.config, tensors).fingerprint == load_adapter(tmp_path).fingerprint


# Refusals of weights, by what is done to them and what the error must name.


def _drop(tensors: dict[str, Any]) -> None:
    del tensors[KEY]


def _put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.__setitem__(name, value)


def _poison(number: float) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors[KEY].view(-1).__setitem__(3, number)


BAD_WEIGHTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing": (_drop, f"lacks {KEY}"),
    "foreign parameter": (_put(KEY.replace("memory_q", "global_q"), torch.zeros(3)), "holds .*global_q_proj"),
    "foreign layer": (_put(KEY.replace(".1.", ".9."), torch.zeros(8, 64)), r"holds .*layers\.9\."),
    "lambda of a coupled adapter may lie there, other things not": (
        _put(KEY.replace("memory_q_proj", "delta_scale_raw"), torch.zeros(1)),
        "holds .*delta_scale_raw",
    ),
    "other rank": (_put(KEY, torch.zeros(4, 64)), rf"{KEY} has shape \[4, 64\].*need \[8, 64\]"),
    "turned": (_put(KEY, torch.zeros(64, 8)), rf"{KEY} has shape \[64, 8\]"),
    "flat": (_put(KEY, torch.zeros(512)), rf"{KEY} has shape \[512\]"),
    "nan": (_poison(float("nan")), f"{KEY} holds numbers that are not finite"),
    "infinite": (_poison(float("-inf")), f"{KEY} holds numbers that are not finite"),
    "whole numbers": (_put(KEY, torch.zeros(8, 64, dtype=torch.long)), f"{KEY} must hold plain floating.*int64"),
    "sparse": (_put(KEY, torch.zeros(8, 64).to_sparse()), f"{KEY} must hold plain.*sparse"),
    "no memory": (_put(KEY, torch.zeros(8, 64, device="meta")), f"{KEY} must hold plain.*meta"),
    "no tensor": (_put(KEY, [1.0, 2.0]), rf"entry '{KEY}' \(list\)"),
    "other name": (_put("lm_head.weight", torch.zeros(2)), "entry 'lm_head.weight'"),
    "no name": (_put(7, torch.zeros(2)), r"entry 7 \(Tensor\)"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("change", "named"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_bad_weights_are_refused_and_nothing_is_attached(
    change: Callable[[dict[str, Any]], None], named: str, tmp_path: Path
) -> None:
    shutil.copy(GOLDEN / "qwen3_tsw" / "adapter" / CONFIG_FILE, tmp_path)
    tensors: dict[str, Any] = {name: tensor.clone() for name, tensor in _golden().tensors.items()}
    change(tensors)
    torch.save(tensors, tmp_path / AUTHORS_FILE)
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "qwen3_tsw" / "base")
    with pytest.raises(AdapterError, match=named):
        SteeredModel.attach(model, adapter=load_adapter(tmp_path))
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_adapter_for_another_model_is_refused() -> None:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "smollm3_tsw" / "base")
    with pytest.raises(AdapterError, match=r"the adapter lacks .* and .* more; the config and this model need them"):
        SteeredModel.attach(model, adapter=_golden())


def test_what_has_no_effect_may_be_missing_or_there(tmp_path: Path) -> None:
    """Weights of inactive corrections may be left out, unused lambda weights may lie in the file."""
    adapter = _golden()
    lean = {n: t for n, t in adapter.tensors.items() if not n.endswith(("delta_k_proj", "delta_v_proj"))}
    lean[KEY.replace("memory_q_proj", "lambda_bias")] = torch.zeros(8)
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "qwen3_tsw" / "base")
    ids = random_ids(1, 7)
    with torch.no_grad():
        full = SteeredModel.attach(model, adapter=adapter)(ids)
        assert torch.equal(SteeredModel.attach(model, adapter=Adapter(adapter.config, lean))(ids).logits, full.logits)


# Refusals of files.


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "qwen3_tsw" / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def test_missing_files_are_named(directory: Path) -> None:
    (directory / AUTHORS_FILE).unlink()
    with pytest.raises(AdapterError, match=f"neither {SAFETENSORS_FILE} nor {AUTHORS_FILE}"):
        load_adapter(directory)
    (directory / CONFIG_FILE).unlink()
    with pytest.raises(ConfigError, match=f"{CONFIG_FILE} is missing: not an adapter directory"):
        load_adapter(directory)


class _RunsOnLoading:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran-on-loading",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(
    directory: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    content = {KEY: _RunsOnLoading()}
    torch.save(content, directory / AUTHORS_FILE, _use_new_zipfile_serialization=zipped)
    with pytest.raises(AdapterError, match=f"{AUTHORS_FILE} cannot be read"):
        load_adapter(directory)
    assert not (directory / "ran-on-loading").exists()


def test_what_holds_no_dict_is_refused_and_less_than_a_models_adapter_can_be_read(directory: Path) -> None:
    torch.save([torch.zeros(2)], directory / AUTHORS_FILE)
    with pytest.raises(AdapterError, match="must hold a dict of tensors; found list"):
        load_adapter(directory)
    (directory / AUTHORS_FILE).unlink()
    save_file({KEY: torch.zeros(8, 64)}, directory / SAFETENSORS_FILE)
    assert load_adapter(directory).tensors.keys() == {KEY}


@pytest.mark.parametrize("name", [AUTHORS_FILE, SAFETENSORS_FILE])
@pytest.mark.parametrize("bytes_", [b"", b"not an adapter", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(40), bytes(64)])
def test_unreadable_weights_are_refused(directory: Path, name: str, bytes_: bytes) -> None:
    (directory / AUTHORS_FILE).unlink()
    (directory / name).write_bytes(bytes_)
    with pytest.raises(AdapterError, match=f"{name} cannot be read"):
        load_adapter(directory)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_weights_of_the_authors_give_typed_errors_or_tensors(data: st.DataObject, directory: Path) -> None:
    """In their files a flipped bit of a number cannot be seen; all else is refused, whatever broke."""
    save_adapter(directory, Adapter(MemoryConfig(), {KEY: torch.arange(6.0)}), format="authors")
    content = bytearray((directory / AUTHORS_FILE).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] ^= data.draw(st.integers(1, 255))
    (directory / AUTHORS_FILE).write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        found = load_adapter(directory)
    except AdapterError:
        return
    assert all(isinstance(tensor, Tensor) for tensor in found.tensors.values())


@pytest.mark.parametrize("name", [SAFETENSORS_FILE, CONFIG_FILE])
def test_no_flipped_bit_of_an_adapter_of_ours_changes_it_unseen(name: str, tmp_path: Path) -> None:
    adapter = Adapter(MemoryConfig(), {KEY: torch.arange(6.0)}, base="of this model")
    save_adapter(tmp_path, adapter)
    content = (tmp_path / name).read_bytes()
    refused = 0
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (tmp_path / name).write_bytes(flipped)
        try:
            found = load_adapter(tmp_path)
        except (AdapterError, ConfigError):
            refused += 1
        else:  # white space, or an option without effect
            assert _same(found, adapter)
            assert found.base == adapter.base
    assert refused > len(content) // 3
    (tmp_path / name).write_bytes(content)
    assert _same(load_adapter(tmp_path), adapter)


def test_an_adapter_that_is_not_what_its_config_says_is_named(tmp_path: Path) -> None:
    adapter = _golden()
    save_adapter(tmp_path, adapter)
    tensors = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    tensors[KEY].view(-1)[3] += 1e-3
    save_file(tensors, tmp_path / SAFETENSORS_FILE)
    with pytest.raises(AdapterError, match=f"damaged, or was changed.*{DIGEST_KEY}"):
        load_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(adapter.config.to_json()))  # as adapters without a digest are read
    assert torch.equal(load_adapter(tmp_path).tensors[KEY], tensors[KEY])


# Refusals of configs.

BAD_CONFIGS: list[tuple[str, Any, str]] = [
    ("rank", 0, "rank must be an integer from 1 to 256; found 0"),
    ("rank", "8", "rank must be a int; found '8'"),
    ("rank", 8.0, "rank must be a int"),
    ("rank", True, "rank must be a int; found True"),
    ("num_state_heads", 0, "num_state_heads"),
    ("alpha", "16", "alpha must be a float"),
    ("alpha", None, "alpha must be a float; found None"),
    ("alpha", float("nan"), "alpha must be a finite number"),
    ("alpha", 10**400, "alpha must be a finite number"),
    ("normalize_qk", 1, "normalize_qk must be a bool; found 1"),
    ("state_update_mode", "fast", "state_update_mode must be standard, lambda_outside or no_lambda; found 'fast'"),
    ("delta_heads", "qo", "delta_heads must be a tuple"),
    ("delta_heads", [], "delta_heads"),
    ("delta_heads", ["q", "x"], "delta_heads must be a non-empty selection of q, k, v, o"),
    ("delta_heads", ["q", "q"], "delta_heads"),
    ("delta_heads", [["q"]], "delta_heads"),
    ("target_layers", ["0"], "target_layers must be distinct layer numbers"),
    ("target_layers", [-1], "target_layers"),
    ("target_layers", [1, 1], "target_layers"),
    ("target_layers", [[1]], "target_layers"),
    ("delta_scale_granularity", "token", "delta_scale_granularity"),
    ("delta_scale_max", 0, "delta_scale_max"),
    ("delta_o_rmsnorm_eps", -1.0, "delta_o_rmsnorm_eps"),
    ("base_slice_ref_width", 0, "base_slice_ref_width"),
    ("memory_write_granularity", "document", "memory_write_granularity must be one of .*found 'document'"),
    ("memory_write_granularity", ["token"], "memory_write_granularity"),
    ("write_strategy", "token", "unknown memory option 'write_strategy'"),
    ("memory_size", 3, "unknown memory option 'memory_size'; known options: .*rank"),
    ("num_memory_partitions", 2, "num_memory_partitions=2 belongs to an archived experiment.*only 1"),
    ("num_global_memory_partitions", 1, "num_global_memory_partitions=1"),
    ("slot_read_top_k", 4, "slot_read_top_k=4"),
    ("memory_reader_layers", [3], r"memory_reader_layers=\[3\]"),
    ("latent_memory_layers", [3], r"latent_memory_layers=\[3\]"),
    ("memory_readout_mode", "attention", "memory_readout_mode='attention'"),
    ("memory_write_source", "proposals", "memory_write_source='proposals'"),
    ("target_modules", ["mlp"], "target_modules"),
    ("delta_scale_parameterization", "tanh", "delta_scale_parameterization"),
]


@pytest.mark.parametrize(("name", "value", "named"), BAD_CONFIGS, ids=lambda x: str(x)[:30])
def test_bad_options_are_refused_by_name(name: str, value: Any, named: str, directory: Path) -> None:
    body = json.loads((directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps({**body, name: value}))
    with pytest.raises(ConfigError, match=named):
        load_adapter(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"rank": ', "[" * 100_000, "\udcff"])
def test_a_config_that_is_no_object_is_refused(text: str, directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=f"{CONFIG_FILE} (is not readable as json|must hold a json object)"):
        load_adapter(directory)


def test_idle_companions_of_archived_options_are_accepted(directory: Path) -> None:
    body = json.loads((directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps({**body, "latent_memory_slots": 9, "alpha": 16}))
    assert load_adapter(directory).fingerprint == _golden().fingerprint


def test_configs_are_checked_and_made_equal_in_code_too() -> None:
    with pytest.raises(ConfigError, match="rank must be a int; found '8'"):
        MemoryConfig(rank="8")  # type: ignore[arg-type]
    given = MemoryConfig(alpha=16, target_layers=[1, 0])  # type: ignore[arg-type]
    same = MemoryConfig(alpha=16.0, target_layers=(1, 0))
    assert given == same
    assert hash(given) == hash(same)
    assert json.dumps(given.to_json()) == json.dumps(same.to_json())
    assert MemoryConfig.from_json(given.to_json()) == given
    assert "lambda_bias_init" not in same.to_json()
    assert "steered_tokens" not in same.to_json()
    other = MemoryConfig(lambda_bias_init=2.0, write_strategy="sentence", steered_tokens="reply")
    assert MemoryConfig.from_json(other.to_json()) == other
    with pytest.raises(ConfigError, match="steered_tokens must be all or reply; found 'none'"):
        given.replace(steered_tokens="none")
    with pytest.raises(ConfigError, match="alpha must be a finite"):
        given.replace(alpha=float("inf"))
