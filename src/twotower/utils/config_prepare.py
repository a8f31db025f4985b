"""Settings of `prepare`, which makes a dataset from the raw files."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field, model_validator

from twotower.utils.config_data import Settings


class SplitConfig(Settings):
    """Choice of held-out events. With any kind of split, a part of 0 does not exist and its events go into training."""

    kind: Literal["time", "leave_one_out", "predefined"] = "time"
    """Kind of split. "time": the same cut dates for all users; "leave_one_out": the last positive event of a user is test,
    the one before it validation (users with at least 3); "predefined": the source's test part, and a random share of the rest."""
    valid: float | date = 0.1
    """Validation part. "time": share of the events, or first day of the period; "predefined": share of each user's events;
    "leave_one_out": any share above 0. 0: no validation, training runs its full schedule."""
    test: float | date = 0.1
    """Test part. "time": share of the events, or first day of the period (the same day as `valid`: no validation part); other
    kinds: any share above 0. 0: no test part and no evaluation."""

    withhold_user_frac: float = Field(0.0, ge=0, lt=1)
    """Share of users, drawn at random, that are hidden from training to simulate new users: their events serve as history only."""
    withhold_item_frac: float = Field(0.0, ge=0, lt=1)
    """Share of items, drawn at random, whose training events are hidden from training, to simulate new items."""

    @property
    def has_valid(self) -> bool:
        """Return True if the settings define a validation part."""
        return bool(self.valid) and not (isinstance(self.valid, date) and self.valid == self.test)

    @model_validator(mode="after")
    def _same_type(self) -> SplitConfig:
        if isinstance(self.valid, date) != isinstance(self.test, date):
            raise ValueError(f"valid and test must both be fractions or both be dates; got {self.valid} and {self.test}")
        if isinstance(self.valid, date) and isinstance(self.test, date) and self.valid > self.test:
            raise ValueError(f"valid must not be later than test; got {self.valid} and {self.test}")
        if isinstance(self.valid, float) and isinstance(self.test, float):
            if not (0 <= self.valid < 1 and 0 <= self.test < 1):
                raise ValueError(f"valid and test must be at least 0 and below 1; got {self.valid} and {self.test}")
            if self.valid + self.test >= 1:
                raise ValueError(f"valid + test must be below 1 to leave training events; got {self.valid} and {self.test}")
        return self


class PrepareConfig(Settings):
    """Steps from raw tables to a dataset."""

    engine: Literal["duckdb", "spark"] = "duckdb"
    """Engine that computes the tables. "duckdb": in this process; "spark": on a cluster (extra `spark`). The rows are the same."""
    spark_master: str = "local[*]"
    """Address of the Spark master. Used only with `engine: spark`."""

    positive_min_stars: float | None = Field(None, ge=0, le=5)
    """Fewest stars of a target; events with fewer are history only. Events without stars can be targets. null: no minimum."""
    negative_max_stars: float | None = Field(None, ge=0, le=5)
    """Most stars of an explicit negative, as if its event type had the weight -1; below `positive_min_stars`. null: none."""
    event_weights: dict[str, float] = Field({})
    """Weight of each event type in the loss; types that are not listed have weight 1. 0: history only, never a target. Below 0:
    explicit negatives such as dislikes, which are no history and are learned from as `training.negative_weight` says."""
    impression_types: list[str] = Field(["impression"])
    """Event types that say that an item was shown. An item that was shown and not chosen is a negative of its user, but may be
    recommended. Impressions are no history."""

    @model_validator(mode="after")
    def _one_meaning(self) -> PrepareConfig:
        for name in self.impression_types:
            if name in self.event_weights:
                raise ValueError(
                    f"{name!r} is in event_weights and in impression_types; an impression has no weight of its own. Remove it from "
                    "one of them"
                )
        least, most = self.positive_min_stars, self.negative_max_stars
        if least is not None and most is not None and most >= least:
            raise ValueError(f"negative_max_stars must be below positive_min_stars; got {most:g} and {least:g}")
        return self

    @property
    def negative_types(self) -> list[str]:
        """Return the event types that are never history: explicit negatives and impressions, sorted."""
        return sorted({name for name, weight in self.event_weights.items() if weight < 0} | {*self.impression_types})

    def is_negative(self, event_type: str | None, stars: float | None = None) -> bool:
        """Return True if an event is an explicit negative: its item is not recommended again. Impressions are none.

        Examples
        --------
        >>> PrepareConfig(event_weights={"dislike": -1}).is_negative("dislike")
        True
        """
        if event_type in self.impression_types:
            return False
        most = self.negative_max_stars
        return self.event_weights.get(event_type or "", 1.0) < 0 or (most is not None and stars is not None and stars <= most)

    def is_history(self, event_type: str | None, stars: float | None = None) -> bool:
        """Return True if an event is part of the history: it is neither an explicit negative nor an impression."""
        return event_type not in self.impression_types and not self.is_negative(event_type, stars)

    duplicates: Literal["keep", "keep_first"] = "keep"
    """Repeated events of a user with the same item. "keep": keep all; "keep_first": keep the first only."""
    min_user_events: int = Field(1, ge=1)
    """Fewest events of a user in the training period; users with fewer are dropped. Details: `min_item_events`."""
    min_item_events: int = Field(1, ge=1)
    """Fewest events of an item in the training period; items with fewer are dropped. Users and items first seen after that period
    are new and kept. With leave_one_out all events count, as in the literature."""
    k_core: bool = False
    """Repeat both filters until nothing changes (k-core)."""
    split: SplitConfig = SplitConfig()
    text_dim: int = Field(32, ge=0)
    """Width of the text vectors; 0: no text features."""
    text_encoder: str = Field("tfidf", pattern=r"^(tfidf|sentence-transformers/.+)$")
    """Encoder of texts. "tfidf": TF-IDF and truncated SVD; "sentence-transformers/NAME": a model of the Hugging Face hub or of a
    folder (extra `text`), reduced to `text_dim` numbers. Its vectors are computed once, and cached by content in
    ~/.cache/twotower or the folder TWOTOWER_CACHE."""
    text_max_chars: int = Field(2000, ge=0)
    """Characters of review text kept per item, from the training period. 0: only the name."""
    co_visited_items: int = Field(20, ge=0)
    """Number of co-visited items per item (items that have events of the same users in training), used as a feature; as many are
    stored that come after it, and before it, in the histories of training. 0: none."""
    exclude_features: list[str] = Field([])
    """Names of features that are not prepared."""
