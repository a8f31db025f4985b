"""Define the JSON files that the stages write and read: manifests and the report."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Document(BaseModel):
    """Base class of every JSON file and its parts: immutable, an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RefitSettings(Document):
    """What a refit takes from the run that it repeats."""

    stop_frac: float = Field(gt=0, le=1)
    """Share of the steps after which training ends; the learning rate follows the full schedule."""
    baseline_settings: dict[str, dict[str, int | float]] = {}
    """Settings by name of the baseline; these baselines are not tuned."""
    priors: dict[str, Any] = {}
    """Fitted weights of the scores, by name of the tensor; see `models.priors`."""
