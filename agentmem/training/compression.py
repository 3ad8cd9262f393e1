"""Compression of a conversation by LLMLingua-2 (Pan et al., 2024), as a baseline: its package, with weights you name.

A token classifier says which words of a text matter, and the rest is left out. The weights are on the hub
(`microsoft/llmlingua-2-xlm-roberta-large-meetingbank` is the authors' own); none come with agentmem.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from agentmem.errors import ConfigError, MissingExtraError

_FAMILIES = ("bert-base-multilingual-cased", "xlm-roberta-large")


class LLMLingua2:
    """Leaves out the words of a text that matter least; the weights are loaded when it is first used.

    May be called from several threads, one after another. A text that was compressed is not compressed again.

    Args:
        model: a directory or a hub id. The package tells from the name which of its two families it is, so the name of
            a directory has to have it.
        device: where it runs: "cpu", "cuda", "mps"; "auto" takes CUDA where there is one.

    Raises:
        ConfigError: the name says no family.
        MissingExtraError: llmlingua is not installed.
    """

    def __init__(self, model: str, device: str = "auto") -> None:
        if find_spec("llmlingua") is None:
            raise MissingExtraError("llmlingua", "eval")
        if not any(family in model for family in _FAMILIES):
            raise ConfigError(
                f"llmlingua tells its models by their names, which have {' or '.join(_FAMILIES)} in them; found "
                f"{model!r}; name the directory so"
            )
        self.name = model
        self._device = device
        self._compressor: Any = None
        self._done: dict[tuple[str, float], str] = {}
        self._lock = threading.Lock()

    def __call__(self, passages: Sequence[str], share: float) -> str:
        """About this share of the words of some passages, in their order.

        Raises:
            ConfigError: the weights, or the encoding of tiktoken that the package counts with, cannot be had.
        """
        key = ("\n".join(passages), round(share, 4))
        with self._lock:
            if key not in self._done:
                if self._compressor is None:
                    self._compressor = self._loaded()
                found = self._compressor.compress_prompt_llmlingua2(list(passages), rate=key[1])
                self._done[key] = "\n".join(text for text in found["compressed_prompt_list"] if text.strip())
            return self._done[key]

    def _loaded(self) -> Any:
        from llmlingua import PromptCompressor

        device = self._device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return PromptCompressor(self.name, device_map=device, use_llmlingua2=True)
        except OSError as error:  # of transformers, and of the download that tiktoken makes
            raise ConfigError(
                f"LLMLingua-2's weights {self.name!r}, or tiktoken's encoding that it counts with, cannot be read or "
                f"downloaded ({error}); fetch them, or leave the arm llmlingua out"
            ) from error
