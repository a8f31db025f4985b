"""Define names and constants of the whole package: columns, reserved rows, splits, and feature declarations.

External ids are strings (`user_id`, `item_id`). Rows are int64 positions in the id tables (`user_row`, `item_row`), never mixed
with ids. Row 0 is PAD, row 1 UNKNOWN; real rows start at 2, those seen in training first. So a row has a trained
embedding if `row < n_train_item_rows`. `n_items` counts items, `n_item_rows` also the two reserved rows. Times are int64
seconds since 1970 (in Yelp data: local time, without zone).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAD = 0
UNKNOWN = 1
FIRST_ROW = 2
FORMAT_VERSION = 9  # of datasets and runs
BUNDLE_FORMAT = 11
TRUTH_FILE = "town_truth.safetensors"  # of a simulated town

# Raw tables (what a source returns) and prepared tables.
USER_ID = "user_id"
ITEM_ID = "item_id"
TIME = "time_s"
ORDER = "order"  # int64, unique: breaks ties between equal times, in the order of the source
EVENT_TYPE = "event_type"
STARS = "stars"
TEXT = "text"
PART = "part"  # "train" | "test" if the source has its own split, else null
USER_ROW = "user_row"
ITEM_ROW = "item_row"
WEIGHT = "weight"
POSITIVE = "positive"
NEGATIVE = "negative"  # an explicit negative or an impression
SPLIT = "split"

TRAIN, VALID, TEST = 0, 1, 2
NEIGHBOURS = "neighbours"  # co-visited items: the only item feature that comes from no column
WITHHELD = 3  # of the training period but hidden from training: used only as history
SPLITS = {"train": TRAIN, "valid": VALID, "test": TEST}

TIMES_END_S = 1 << 36  # all times are before it: the year 4147
DAY_S = 86_400
HOURS_PER_WEEK = 168

Side = Literal["item", "user"]
Kind = Literal["categorical", "multi", "number", "geo", "hours", "text", "vector"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpec:
    """One static feature of a user or an item: its raw columns and its encoding.

    Attributes
    ----------
    name
        Unique per side; also the name of its embedding.
    side
        "item" or "user".
    kind
        Kind of the raw column and its encoding:
        "categorical" string or integer → vocabulary row; "multi" list of strings → set of vocabulary rows; "number" →
        standardised float and a "missing" flag; "geo" (latitude, longitude in degrees) → cells and smooth coordinates; "hours"
        string of 168 characters 0/1, hour 0 = Monday 00:00 → bits; "text" string → TF-IDF + SVD vector; "vector" floats.
    columns
        Raw columns; one, or (latitude, longitude) for "geo".
    """

    name: str
    side: Side
    kind: Kind
    columns: tuple[str, ...]
