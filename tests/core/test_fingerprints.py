"""Which forms of a model count as the same one: dtypes, quantisations, and fingerprints that older versions wrote."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agentmem import MemoryConfig, MemoryState, SteeredModel
from agentmem.delta.adapter import load_adapter, save_adapter
from agentmem.delta.fingerprint import model_fingerprint
from agentmem.errors import AdapterError, StateMismatchError
from agentmem.state import same_model
from tests.helpers.core_models import build, tiny


def published(architecture: str = "llama", seed: int = 11) -> Any:
    """A model as it is published: in bfloat16, with norms that training has changed."""
    return tiny(architecture, seed=seed, vocab_size=1024).to(torch.bfloat16)


def _q4_1(weight: Tensor) -> Tensor:
    """As GGUF's Q4_1 stores a matrix: 4 bits a number, a scale and a smallest number for each 32 of them."""
    blocks = weight.float().reshape(-1, 32)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-8)
    return (((blocks - low) / step).round() * step + low).reshape(weight.shape).to(weight.dtype)


def gguf(model: Any) -> Any:
    """All matrices rounded to 4 bits, embeddings too; norms in float32."""
    model = model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(_q4_1(parameter))
    return model


FORMS: dict[str, Callable[[Any], Any]] = {
    "float32": lambda model: model.float(),
    "float16": lambda model: model.half(),
    "float16, then bfloat16": lambda model: model.half().bfloat16(),
    "gguf": gguf,
    "gguf, saved in bfloat16": lambda model: gguf(model).bfloat16(),
    "gguf, loaded in float16": lambda model: gguf(model).half(),
}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_model_are_the_same_model(form: str, architecture: str) -> None:
    whole = model_fingerprint(published(architecture))
    assert same_model(model_fingerprint(FORMS[form](published(architecture))), whole)
    assert not same_model(model_fingerprint(FORMS[form](published(architecture, seed=12))), whole)


def test_rounding_to_four_bits_changes_signs_and_leaves_the_norms() -> None:
    """So that the forms above are no easier than real ones."""
    signs, norms = model_fingerprint(published()).split(".")
    rounded_signs, rounded_norms = model_fingerprint(gguf(published())).split(".")
    assert signs != rounded_signs
    assert norms == rounded_norms


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_weights_leave_it_alone(library: str, bits: str, tmp_path: Path) -> None:
    if find_spec(library) is None or (library == "torchao" and bits == "4bit" and find_spec("mslk") is None):
        pytest.skip(f"{library} is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from agentmem.loading import _torchao

    whole = published()
    whole.save_pretrained(tmp_path)
    bnb = {"4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8bit": {"load_in_8bit": True}}[bits]
    config = BitsAndBytesConfig(**bnb) if library == "bitsandbytes" else _torchao(bits)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
        )
        assert same_model(model_fingerprint(loaded), model_fingerprint(whole))


def test_models_that_were_not_trained_are_told_apart_by_their_embeddings() -> None:
    """Their norms are all one and say nothing."""
    one, other = model_fingerprint(build("llama")), model_fingerprint(build("llama", seed=12))
    assert "." not in one
    assert not same_model(one, other)
    assert not same_model(one, model_fingerprint(tiny("llama", seed=12)))


def test_a_model_whose_norms_were_trained_on_is_another_one() -> None:
    tuned = published()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "embed" in name:
                parameter.neg_()
            elif "norm" in name:
                parameter.mul_(1.02)
    assert not same_model(model_fingerprint(tuned), model_fingerprint(published()))


def test_adapters_and_states_of_older_versions_stay_readable(tmp_path: Path) -> None:
    """They carry the first part only, and are compared by it."""
    model = published()
    steered = SteeredModel.attach(model, config=MemoryConfig(rank=2))
    adapter = steered.adapter
    assert adapter.base is not None
    old, _ = adapter.base.split(".")
    assert len(old) == 64
    save_adapter(tmp_path / "old", replace(adapter, base=old))
    save_adapter(tmp_path / "new", adapter)
    state = MemoryState.zeros(steered.state_shape, old, steered.adapter_fingerprint)
    state.require(model_fingerprint(model), steered.adapter_fingerprint, steered.state_shape)
    steered.detach()
    assert load_adapter(tmp_path / "old").base == old
    for name in ("old", "new"):
        SteeredModel.attach(copy.deepcopy(model), adapter=tmp_path / name)
        with pytest.raises(AdapterError, match="was made for the model of fingerprint"):
            SteeredModel.attach(published(seed=12), adapter=tmp_path / name)
    # What they do not record is not known: embeddings that were rounded are another model's by the old rule.
    SteeredModel.attach(gguf(copy.deepcopy(model)), adapter=tmp_path / "new")
    with pytest.raises(AdapterError):
        SteeredModel.attach(gguf(copy.deepcopy(model)), adapter=tmp_path / "old")
    with pytest.raises(StateMismatchError, match="model '"):
        state.require(model_fingerprint(published(seed=12)), steered.adapter_fingerprint, steered.state_shape)


def test_an_adapter_in_bfloat16_runs_in_the_models_dtype(tmp_path: Path) -> None:
    model = published().float()
    steered = SteeredModel.attach(model, config=MemoryConfig(rank=2))
    adapter = steered.adapter
    steered.detach()
    save_adapter(tmp_path, replace(adapter, tensors={name: t.bfloat16() for name, t in adapter.tensors.items()}))
    loaded = SteeredModel.attach(model, adapter=tmp_path)
    assert {p.dtype for p in loaded.memory.parameters()} == {torch.float32}
    assert loaded.adapter_fingerprint == load_adapter(tmp_path).fingerprint
    key = "model.layers.1.self_attn.memory_q_proj"
    assert load_adapter(tmp_path).tensors[key].dtype == torch.bfloat16
    assert torch.equal(loaded.memory[1].get_parameter("memory_q_proj"), adapter.tensors[key].bfloat16().float())
