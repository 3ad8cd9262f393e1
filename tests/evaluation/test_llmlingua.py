"""The arm llmlingua: its package with a small token classifier of random weights, and what is refused without any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast
from typer.testing import CliRunner

from agentmem import Message
from agentmem.errors import ConfigError
from agentmem.training.compression import LLMLingua2
from agentmem.training.contexts import compressed
from agentmem_cli.app import app
from tests.helpers.chatterer import save_chatterer
from tests.helpers.task_data import write_lines

pytest.importorskip("llmlingua")
tiktoken = pytest.importorskip("tiktoken")
pytestmark = pytest.mark.filterwarnings("ignore")  # of llmlingua's own calls

TOLD = "my cat is called mia . the dog lives in oslo . it rains in lima today ."


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model of the package's first family. The encoding that it counts with is one of bytes, not a download."""
    ranks = {bytes([number]): number for number in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _: encoding)
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # the package sets it, and these two
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    directory = tmp_path / "bert-base-multilingual-cased-small"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = dict.fromkeys([*special, *TOLD.split(), "user", "assistant", ":", "i", "see"])
    vocabulary = {word: number for number, word in enumerate(words)}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(directory)
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForTokenClassification(BertConfig(vocab_size=len(words), num_labels=2, **sizes)).save_pretrained(directory)
    yield directory
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def test_a_conversation_is_compressed_until_it_fits(weights: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": TOLD}, {"role": "assistant", "content": "i see ."}]
    write_lines(tmp_path / "mine.jsonl", [{"messages": messages, "question": "My cat?", "answers": ["mia"]}])
    model = save_chatterer(tmp_path / "model")
    command = [
        "evaluate",
        "--model",
        model,
        "--task",
        "own",
        "--data",
        tmp_path / "mine.jsonl",
        "--out",
        tmp_path / "out",
    ]
    command += ["--arms", "bare,llmlingua", "--max-tokens", 2, "--context-tokens", 48, "--llmlingua", weights]
    finished = CliRunner().invoke(app, [str(part) for part in command])
    assert finished.exit_code == 0, finished.output
    (task,) = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["tasks"]
    bare, compressed_arm = task["arms"]["bare"], task["arms"]["llmlingua"]
    assert bare["prompt_tokens"] < compressed_arm["prompt_tokens"] <= bare["prompt_tokens"] + 48
    lines = (tmp_path / "out" / "predictions" / "own.jsonl").read_text("utf-8").splitlines()
    (row,) = (json.loads(line) for line in lines if json.loads(line)["arm"] == "llmlingua")
    left = row["context"].partition("\n")[2].replace(".", " . ").replace(":", " : ").split()
    assert 0 < len(left) < len(TOLD.split())
    assert set(left) <= {*TOLD.split(), "user", "assistant", ":", "i", "see"}
    assert compressed_arm["kept_bytes"] == len(row["context"].encode())


async def test_it_compresses_under_inspect_ai(weights: Path, tmp_path: Path) -> None:
    inspect_model = pytest.importorskip("inspect_ai.model")
    from agentmem.evaluation.inspect_provider import AgentmemAPI

    options = {"adapter": "none", "llmlingua": str(weights), "context_tokens": 48}
    api = AgentmemAPI(str(save_chatterer(tmp_path / "model")), arm="llmlingua", **options)
    said = [inspect_model.ChatMessageUser(content=text) for text in (TOLD, "My cat?")]
    output = await api.generate(said, [], "none", inspect_model.GenerateConfig(max_tokens=2))
    api.close()
    left = output.metadata["context"].partition("\n")[2]
    assert 0 < len(left) < len(TOLD)


def test_what_fits_is_left_whole_and_what_never_does_is_left_out() -> None:
    told = [Message("system", "Be brief."), Message("user", "one two"), Message("assistant", "three")]
    asked: list[float] = []

    def halves(passages: object, share: float) -> str:
        asked.append(share)
        return "x" * round(100 * share)

    whole = compressed(told, 0.5, lambda _: True, halves)
    assert whole is not None
    assert whole.content.endswith("user: one two\nassistant: three")
    assert not whole.write
    assert asked == []
    found = compressed(told, 0.5, lambda quoted: 0 < quoted.content.count("x") <= 35, halves)
    assert found is not None
    assert found.content.count("x") == 32
    assert asked == pytest.approx([0.5, 0.4, 0.32])
    assert compressed(told, 0.5, lambda _: False, halves) is None
    assert compressed(told[:1], 0.5, lambda _: True, halves) is None


def test_weights_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tells its models by their names"):
        LLMLingua2(str(tmp_path))
    encoding = tiktoken.Encoding("none", pat_str=r"\S+", mergeable_ranks={b"a": 0}, special_tokens={})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _: encoding)
    with pytest.raises(ConfigError, match="cannot be read or downloaded"):
        LLMLingua2(str(tmp_path / "xlm-roberta-large"))(["some text"], 0.5)
