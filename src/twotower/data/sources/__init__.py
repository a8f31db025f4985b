"""Read raw files. This package needs the extra `train`."""

from twotower.errors import require

require("train", "duckdb", "ibis")
