"""Train models. This package needs the extra `train`."""

from twotower.errors import require

require("train", "implicit", "tensorboard")
