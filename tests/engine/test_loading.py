"""Loading from disk: a saved model, its tokenizer and its adapter, and what is missing named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import agentmem
from agentmem import MemoryConfig, Message, Sampling, SteeredModel, Window, loading
from agentmem.delta.adapter import load_adapter, save_adapter
from agentmem.delta.fingerprint import DIGESTS_FILE, write_digests
from agentmem.delta.published import PublishedAdapter
from agentmem.errors import AdapterError, ConfigError, MemoryWarning, MissingAdapterError, ModelNotFoundError
from tests.helpers.core_models import build
from tests.helpers.transcript_templates import QWEN, SMOLLM
from tests.helpers.transcript_templates import tokenizer as transcript_tokenizer

ASK = [Message("user", "How are you?")]


@pytest.fixture
def saved(make_engine: Any, tmp_path: Path) -> tuple[Any, Path]:
    engine = make_engine()
    engine.model.save_pretrained(tmp_path / "model")
    engine.tokenizer.save_pretrained(tmp_path / "model")
    engine.steered.save(tmp_path / "model" / "adapter")
    return engine, tmp_path / "model"


def test_a_saved_model_with_its_own_adapter(saved: tuple[Any, Path]) -> None:
    engine, place = saved
    with agentmem.load(place, device="cpu") as loaded:
        assert loaded.model_fingerprint == engine.model_fingerprint
        sampling = Sampling(max_tokens=6)
        expected, turn = engine.turn(ASK, sampling=sampling), loaded.turn(ASK, sampling=sampling)
        assert turn.token_ids == expected.token_ids
        # A state made on one survives on the other, whose dtype may differ.
        with agentmem.load(place, device="cpu", dtype="bfloat16", adapter=place / "adapter") as half:
            assert half.turn([*ASK, turn.message, *ASK], turn.state, sampling=sampling).state.record.count == 4


def test_an_adapter_of_its_own_or_elsewhere_or_none(saved: tuple[Any, Path]) -> None:
    _, place = saved
    (place / "adapter").rename(place.parent / "elsewhere")
    with pytest.raises(MissingAdapterError, match="adapter="):
        agentmem.load(place)
    with agentmem.load(place, adapter=place.parent / "elsewhere") as engine:
        assert engine.has_memory
    with agentmem.load(place, adapter=False) as engine:
        assert not engine.has_memory
        assert engine.turn(ASK, sampling=Sampling(max_tokens=3)).state is None


PUBLISHED = "declare-lab/delta-mem_qwen3_4b-instruct"
QWEN_4B = "Qwen/Qwen3-4B-Instruct-2507"


@pytest.mark.parametrize("name", [PUBLISHED, PUBLISHED.split("/")[1]])
def test_a_published_adapter_is_found_by_its_name(
    saved: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine, place = saved
    (tmp_path / "Qwen3-4B-Instruct-2507").symlink_to(place)
    asked = []

    def download(repository: str, **_: Any) -> str:
        asked.append(repository)
        return str(place / "adapter")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with agentmem.load(tmp_path / "Qwen3-4B-Instruct-2507", name) as loaded:
        assert loaded.adapter_fingerprint == engine.adapter_fingerprint
    assert asked == [PUBLISHED]


def test_a_missing_adapter_names_the_published_ones(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, place = saved
    (place / "adapter").rename(place / "elsewhere")
    with pytest.raises(MissingAdapterError, match=rf"published ones: '{PUBLISHED}' for {QWEN_4B} \(CC-BY-4.0"):
        agentmem.load(place)
    monkeypatch.setattr(loading, "_read", lambda *_, **__: None)
    with pytest.raises(MissingAdapterError, match=f"published for it: '{PUBLISHED}'"):
        agentmem.load(QWEN_4B)


def test_an_adapter_beside_the_model_or_known_for_it_is_found(
    saved: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, place = saved
    model = tmp_path / "models" / "tuned"
    shutil.copytree(place, model)
    (model / "adapter").rename(model.parent / "tuned-adapter")
    with agentmem.load(model) as beside:
        assert beside.adapter_fingerprint == engine.adapter_fingerprint
    known = PublishedAdapter("mine", "Some/Tuned", "Apache-2.0", "us", model.parent / "known")
    (model.parent / "tuned-adapter").rename(model.parent / "known")
    with pytest.raises(MissingAdapterError):
        agentmem.load(model)
    monkeypatch.setattr("agentmem.delta.published.PUBLISHED", (known,))
    with agentmem.load(model) as by_table:
        assert by_table.adapter_fingerprint == engine.adapter_fingerprint
    with agentmem.load(model, "mine") as by_name:
        assert by_name.has_memory
    # Not for one that is only named after it: it may have been trained on since.
    model.rename(model.parent / "tuned-further")
    with pytest.raises(MissingAdapterError, match="'mine' for Some/Tuned"):
        agentmem.load(model.parent / "tuned-further")


def test_smollm2_stands_for_the_directory_that_make_lays_out(
    saved: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, place = saved
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelNotFoundError, match=r"build/smollm2 or .*cache/agentmem/smollm2.*`make smollm2`.*93 MB"):
        agentmem.load("smollm2")
    assert agentmem.context_limit("smollm2") is None
    shutil.copytree(place, tmp_path / "cache" / "agentmem" / "smollm2")
    with agentmem.load("smollm2") as cached:
        assert cached.name == "smollm2"
        assert cached.model_fingerprint == engine.model_fingerprint
    assert agentmem.context_limit("smollm2") == engine.max_tokens_limit
    # The working directory's comes first; it records where it is from, and so finds the adapter that ships.
    shutil.copytree(place, tmp_path / "build" / "smollm2")
    (tmp_path / "build" / "smollm2" / "adapter").rename(tmp_path / "shipped")
    (tmp_path / "build" / "smollm2" / "source.json").write_text('{"hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct"}')
    shipped = PublishedAdapter(
        "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0", "us", tmp_path / "shipped"
    )
    monkeypatch.setattr("agentmem.delta.published.PUBLISHED", (shipped,))
    with agentmem.load("smollm2") as built:
        assert built.adapter_fingerprint == engine.adapter_fingerprint


@pytest.fixture
def authors(saved: tuple[Any, Path]) -> Path:
    """The adapter as its authors publish theirs: it names no model."""
    place = saved[1].parent / "authors"
    save_adapter(place, load_adapter(saved[1] / "adapter"), format="authors")
    return place


def test_an_adapter_that_names_no_model_is_taken_with_a_warning(saved: tuple[Any, Path], authors: Path) -> None:
    _, place = saved
    with pytest.warns(MemoryWarning, match="does not say which model it was made for"):
        engine = agentmem.load(place, authors)
    with engine:
        engine.steered.save(authors.parent / "bound")
    agentmem.load(place, authors.parent / "bound").close()  # a warning would be an error here


NAMED_BY: dict[str, tuple[str, str]] = {
    "PEFT's config": ("adapter_config.json", '{"base_model_name_or_path": "some/Model-4B"}'),
    "its card": ("README.md", "---\nlicense: mit\nbase_model: some/Model-4B\n---\n# A\nbase_model: other\n"),
    "a list in its card": ("README.md", '---\nbase_model:\n- "some/Model-4B"\ntags: [a]\n---\n'),
}


@pytest.mark.parametrize(("file", "text"), NAMED_BY.values(), ids=NAMED_BY.keys())
def test_the_model_that_an_adapter_names_is_compared(
    saved: tuple[Any, Path], authors: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str
) -> None:
    _, place = saved
    (authors / file).write_text(text)
    with pytest.warns(MemoryWarning, match=r"was made for some/Model-4B, the model is .*/model"):
        agentmem.load(place, authors).close()
    (place.parent / "model-4b-bnb-4bit").symlink_to(place)
    agentmem.load(place.parent / "model-4b-bnb-4bit", authors).close()
    body = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(body | {"_name_or_path": "some/Model-4B"}))
    agentmem.load(place, authors).close()
    monkeypatch.setattr(loading, "_read", lambda *_, **__: None)
    with pytest.raises(AdapterError, match="was made for some/Model-4B, the model is other/Model-4"):
        agentmem.load("other/Model-4", authors)


def test_a_published_adapter_is_refused_on_another_model(authors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(authors))
    monkeypatch.setattr(loading, "_read", lambda *_, **__: None)
    with pytest.raises(AdapterError, match=f"{PUBLISHED}' was made for {QWEN_4B}, the model is Qwen/Qwen3-4B;"):
        agentmem.load("Qwen/Qwen3-4B", PUBLISHED)


def test_what_cannot_be_found_is_named(saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, place = saved
    with pytest.raises(AdapterError, match="no/such adapter"):
        agentmem.load(place, adapter="no/such adapter")
    with pytest.raises(ModelNotFoundError, match="nothing-here"):
        agentmem.load(tmp_path / "nothing-here", adapter=False)
    with pytest.raises(ModelNotFoundError, match="nothing-here"):
        agentmem.load(tmp_path / "nothing-here")
    (place / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="chat template"):
        agentmem.load(place)


def test_what_is_wrong_is_said_before_weights_are_loaded(
    saved: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, place = saved
    (tmp_path / "empty").mkdir()

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    with pytest.raises(ConfigError, match=r"empty.*not an adapter"):
        agentmem.load(place, adapter=tmp_path / "empty")
    with pytest.raises(ConfigError, match="dtype"):
        agentmem.load(place, dtype="float17")
    for device in ("abacus", "cuda:77", "xpu:77", 5):
        with pytest.raises(ConfigError, match=f"device takes.*found {device!r}"):
            agentmem.load(place, device=device)
    with pytest.raises(ConfigError, match="template_options are a mapping"):
        agentmem.load(place, template_options=5)


BROKEN: dict[str, Any] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "other json": lambda data: b"[1, 2]",
    "nulls": lambda data: b"{}",
    "no text": lambda data: bytes(range(256)) * 4,
}


@pytest.mark.parametrize("way", BROKEN)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_broken_model_directory_is_named(saved: tuple[Any, Path], name: str, way: str) -> None:
    _, place = saved
    file = place / name
    file.write_bytes(BROKEN[way](file.read_bytes()))
    with pytest.raises(ModelNotFoundError, match=re.escape(str(place))):
        agentmem.load(place)


def test_a_model_that_is_not_what_its_digests_say_is_refused(saved: tuple[Any, Path]) -> None:
    _, place = saved
    write_digests(place)
    agentmem.load(place, device="cpu").close()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(ModelNotFoundError, match=f"{name} has another content"):
            agentmem.load(place)
        (place / name).unlink()
        with pytest.raises(ModelNotFoundError, match=re.escape(str(place))):
            agentmem.load(place)
        (place / name).write_bytes(content)
    for text in ("[1]", "[" * 100_000):
        (place / DIGESTS_FILE).write_text(text)
        with pytest.raises(ModelNotFoundError, match=f"{DIGESTS_FILE} cannot be read"):
            agentmem.load(place)
    (place / DIGESTS_FILE).unlink()
    agentmem.load(place, device="cpu").close()


def test_a_directory_without_a_vocabulary_or_with_end_tokens_of_text_is_refused(saved: tuple[Any, Path]) -> None:
    _, place = saved
    (place / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ModelNotFoundError, match=r"eos_token_id .* found '</s>'"):
        agentmem.load(place)
    (place / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"its tokenizer has no vocabulary|cannot be read"):
        agentmem.load(place)


def test_weights_that_are_missing_are_not_made_up(saved: tuple[Any, Path]) -> None:
    from safetensors.torch import load_file, save_file

    _, place = saved
    tensors = load_file(place / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=r"layers\.1\.mlp\.up_proj"):
        agentmem.load(place)


def test_an_adapter_of_another_model_is_refused_with_both_fingerprints(make_engine: Any, tmp_path: Path) -> None:
    made, other = make_engine(), make_engine(model_seed=1)
    made.steered.save(tmp_path)
    with pytest.raises(AdapterError) as refused:
        SteeredModel.attach(other.model, adapter=tmp_path)
    assert made.model_fingerprint in str(refused.value)
    assert other.model_fingerprint in str(refused.value)


def test_a_directory_of_the_authors_is_compared_when_it_is_attached_too(make_engine: Any, authors: Path) -> None:
    """All that is known of its model is a name; a loaded adapter has no directory that could name one."""
    model = make_engine().model
    with pytest.warns(MemoryWarning, match="does not say which model it was made for"):
        SteeredModel.attach(model, adapter=authors).detach()
    (authors / "README.md").write_text("---\nbase_model: some/Model-4B\n---\n")
    with pytest.warns(MemoryWarning, match="was made for some/Model-4B, the model is one without a name"):
        SteeredModel.attach(model, adapter=str(authors)).detach()
    model.config.name_or_path = "other/Model-4"
    with pytest.raises(AdapterError, match="was made for some/Model-4B, the model is other/Model-4"):
        SteeredModel.attach(model, adapter=authors)
    model.config.name_or_path = "quantised/Model-4B-bnb-4bit"
    SteeredModel.attach(model, adapter=authors).detach()  # a warning would be an error here
    model.config.name_or_path = ""
    SteeredModel.attach(model, adapter=load_adapter(authors)).detach()


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(("family", "template"), [("qwen3", QWEN), ("smollm3", SMOLLM)])
def test_models_that_reason_are_told_whether_to(family: str, template: str, thinking: bool, tmp_path: Path) -> None:
    """Saved and loaded as users do; two turns with memory, whose replies are found again in the next prompt."""
    tok = transcript_tokenizer(template)
    model = build(family, seed=0, vocab_size=len(tok), num_hidden_layers=2, eos_token_id=1)
    control = [token for token in range(len(tok)) if tok.decode([token])[:1] in ("<", "[")]
    with torch.no_grad():  # a reply that spells none
        model.lm_head.weight[control] = 0.0
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    SteeredModel.attach(model, config=MemoryConfig(rank=4)).save(tmp_path / "adapter")
    options, sampling = {"enable_thinking": thinking}, Sampling(max_tokens=3)
    with agentmem.load(tmp_path, template_options=options) as engine:
        first = engine.turn(ASK, sampling=sampling)
        talk = [*ASK, first.message, *ASK]
        second = engine.turn(talk, first.state, sampling=sampling)
        for messages, turn in ((ASK, first), (talk, second)):
            plain = [{"role": message.role, "content": message.content} for message in messages]
            prompt = tok.apply_chat_template(plain, add_generation_prompt=True, **options)["input_ids"]
            assert turn.usage.input_tokens == len(prompt)
        closed = tok.convert_tokens_to_ids("</think>")
        assert (closed in prompt[-3:]) is not thinking
        assert second.state is not None
        assert second.state.record.count == 4


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_model_takes_the_same_adapter_and_states(bits: str) -> None:
    told, ask = Message("user", "My favorite color is teal."), Message("user", "What is my favorite color?")
    with agentmem.load("nano", quantize=bits) as quantised, agentmem.load("nano") as whole:
        kinds = {type(module).__name__ for module in quantised.model.modules()}
        assert kinds & {"Linear4bit", "Linear8bitLt"}
        assert quantised.model_fingerprint == whole.model_fingerprint
        one, other = (quantised, whole) if bits == "4bit" else (whole, quantised)
        turn = one.turn([told])
        window = Window(messages=1)
        after = other.turn([told, turn.message, ask], turn.state, window=window)
        assert after.message.content == "Your favorite color is teal."


def test_layers_are_placed_by_a_device_map(saved: tuple[Any, Path]) -> None:
    engine, place = saved
    with agentmem.load(place, device_map={"": "cpu"}) as mapped:
        sampling = Sampling(max_tokens=4)
        assert mapped.turn(ASK, sampling=sampling).token_ids == engine.turn(ASK, sampling=sampling).token_ids
    with pytest.raises(ConfigError, match="device= or device_map="):
        agentmem.load(place, device="cpu", device_map="auto")


def test_a_library_that_is_missing_is_named(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, place = saved
    with pytest.raises(ConfigError, match=r"'4bit', '8bit'.*'2bit'"):
        agentmem.load(place, quantize="2bit")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[quant\]'"):
        agentmem.load(place, quantize="8bit")
    with pytest.raises(ConfigError, match=r"pip install '\.\[quant\]'"):
        agentmem.load(place, device_map="auto")


def test_code_that_comes_with_a_model_is_run_only_if_asked_for(saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, place = saved
    marker = tmp_path / "was run"
    (place / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnModel(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((place / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        agentmem.load(place, adapter=False)
    assert not marker.exists()
    with agentmem.load(place, adapter=False, trust_remote_code=True) as engine:
        assert type(engine.model).__name__ == "OwnModel"
    assert marker.exists()


@pytest.mark.parametrize(("progress", "shown"), [(None, True), (True, True), (False, False)])
def test_progress_is_shown_while_loading(
    saved: tuple[Any, Path], capfd: pytest.CaptureFixture[str], progress: bool | None, shown: bool
) -> None:
    _, place = saved
    capfd.readouterr()
    with agentmem.load(place, progress=progress):
        assert ("100%" in capfd.readouterr().err) is shown


def test_a_revision_from_the_hub_that_lies_here(
    make_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's own cache keeps it: one folder a commit, and a name for it."""
    home = tmp_path / "models--some--model"
    engines = {name: make_engine(model_seed=seed) for seed, name in enumerate(("main", "v1"))}
    for name, engine in engines.items():
        commit = name.encode().hex().ljust(40, "0")
        place = home / "snapshots" / commit
        engine.model.save_pretrained(place)
        engine.tokenizer.save_pretrained(place)
        engine.steered.save(place)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    for name, engine in engines.items():
        revision = None if name == "main" else name
        with agentmem.load("some/model", "some/model", revision=revision, adapter_revision=revision) as loaded:
            assert loaded.model_fingerprint == engine.model_fingerprint
            assert loaded.adapter_fingerprint == engine.adapter_fingerprint
    with pytest.raises(AdapterError, match=engines["v1"].model_fingerprint):
        agentmem.load("some/model", "some/model", adapter_revision="v1")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_the_same_model_in_every_dtype(
    make_engine: Any, tmp_path: Path, stored: torch.dtype, loaded: torch.dtype
) -> None:
    engine = make_engine()
    engine.model.to(stored)
    engine.model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    engine.steered.save(tmp_path / "adapter")
    with agentmem.load(tmp_path, device="cpu", dtype=loaded) as other:
        assert other.model.dtype == loaded
        assert other.model_fingerprint == engine.model_fingerprint


def test_offloaded_weights_are_refused(make_engine: Any) -> None:
    model = make_engine(memory=False).model
    model.model.layers[1].self_attn.q_proj.to("meta")
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj\.weight offloaded"):
        SteeredModel.attach(model, config=MemoryConfig(rank=4))
