"""Readers of raw files. They need the extra `train`."""

from twotower.errors import require

require("train", "duckdb", "ibis")
