"""The training loop. It needs the extra `train`."""

from twotower.errors import require

require("train", "implicit", "tensorboard")
