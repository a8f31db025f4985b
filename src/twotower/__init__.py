"""Two-tower retrieval: from a table of events to recommendations, evaluated on the full catalogue.

import twotower as tt
model = tt.Model(seed=0).fit(orders, items=products)    # pandas, polars, Arrow, DuckDB
model.report
model.recommend(["C0001", "C0002"], k=10)
model.save("shop")                                      # tt.load("shop"), `twotower serve shop`
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twotower.api.compare import compare as compare
    from twotower.api.model import Model as Model
    from twotower.api.model import load as load
    from twotower.api.register import register_baseline as register_baseline
    from twotower.api.register import register_index as register_index
    from twotower.api.register import register_interaction as register_interaction
    from twotower.api.register import register_loss as register_loss
    from twotower.api.register import register_metric as register_metric
    from twotower.api.register import register_pooling as register_pooling
    from twotower.api.register import register_source as register_source
    from twotower.api.register import register_tower as register_tower
    from twotower.api.report import Report as Report
    from twotower.api.roles import describe as describe
    from twotower.trainers.callbacks import Callback as Callback
    from twotower.trainers.callbacks import Training as Training
    from twotower.trainers.loggers import MLflowLogger as MLflowLogger
    from twotower.trainers.loggers import TensorBoardLogger as TensorBoardLogger
    from twotower.trainers.loggers import WandbLogger as WandbLogger

    __version__: str

_HOMES = {
    "twotower.api.compare": ("compare",),
    "twotower.api.model": ("Model", "load"),
    "twotower.api.register": (
        "register_baseline",
        "register_index",
        "register_interaction",
        "register_loss",
        "register_metric",
        "register_pooling",
        "register_source",
        "register_tower",
    ),
    "twotower.api.report": ("Report",),
    "twotower.api.roles": ("describe",),
    "twotower.trainers.callbacks": ("Callback", "Training"),
    "twotower.trainers.loggers": ("MLflowLogger", "TensorBoardLogger", "WandbLogger"),
}
"""Modules of the public names. They load when a name is used, so that `import twotower` is light."""
_MODULE = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of the reference
    "Model",
    "load",
    "describe",
    "Report",
    "compare",
    "Callback",
    "Training",
    "TensorBoardLogger",
    "MLflowLogger",
    "WandbLogger",
    "register_loss",
    "register_pooling",
    "register_interaction",
    "register_tower",
    "register_baseline",
    "register_metric",
    "register_source",
    "register_index",
    "__version__",
]

# Large pages for large tensors on Linux; PyTorch reads it once. Random rows of a long table then miss less (benchmarks/tables.py).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:

    def __getattr__(name):
        """Load a public name from its module when it is used; look `__version__` up, which takes longer than the import."""
        if name in _MODULE:
            return getattr(import_module(_MODULE[name]), name)
        if name != "__version__":
            raise AttributeError(f"module 'twotower' has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("two-tower-rec")
        except PackageNotFoundError:  # a source folder that is not installed
            return "unknown"
