"""Provide the baselines that models are compared with. This package needs the extra `train`."""

from twotower.errors import require

require("train", "implicit", "scipy", "sklearn")
