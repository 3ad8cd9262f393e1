"""What LangChain asks of a model before it is used: its ``profile``.

Known without loading weights: how long a context the model takes stands in its config file. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from langchain_core.language_models import ModelProfile

import agentmem

if TYPE_CHECKING:
    from agentmem import Engine


def profile_of(engine: Engine | None, model: str | Path) -> ModelProfile:
    """The profile of an engine, or of a model that is not loaded yet."""
    profile = ModelProfile(
        name=str(model),
        text_inputs=True,
        image_inputs=False,
        audio_inputs=False,
        video_inputs=False,
        pdf_inputs=False,
        text_outputs=True,
        tool_calling=True,
        tool_choice=True,
        structured_output=True,
    )
    limit = engine.max_tokens_limit if engine is not None else agentmem.context_limit(model)
    if limit is not None:
        profile["max_input_tokens"] = profile["max_output_tokens"] = limit
    return profile
