"""The systems that a model is compared with. They need the extra `train`."""

from twotower.errors import require

require("train", "implicit", "scipy", "sklearn")
