"""Add losses, towers, baselines and so on of your own, which settings then choose by name.

Register before a model is made, and again before a saved model that uses the entry is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from twotower.errors import ConfigError

if TYPE_CHECKING:
    from twotower.utils.registry import Registry

T = TypeVar("T")


class Add(Protocol):
    """Register a function or class, and return it."""

    def __call__(self, entry: T, /) -> T:
        """Register `entry`."""


def register_loss(name: str) -> Add:
    """Add a loss, a function that returns the `Candidates` of a batch; `training.loss` chooses it.

    Parameters
    ----------
    name
        Name in the settings.

    Returns
    -------
    decorator
        Registers the function or class under it, and returns it.

    Raises
    ------
    ConfigError
        An entry of the package has the name.

    Examples
    --------
    >>> @register_loss("all_items")
    ... def all_items(target_row, pool, draws, rng): ...
    """
    from twotower.data.candidates import LOSSES

    return _adder(LOSSES, name)


def register_pooling(name: str) -> Add:
    """Add a subclass of `Pooling`: the encoded events of a history become one vector. `model.user_tower.pooling` chooses it."""
    from twotower.models.layers.pooling import POOLINGS, Pooling

    return _adder(POOLINGS, name, Pooling)


def register_interaction(name: str) -> Add:
    """Add an interaction layer: embedded fields [n, F, d] become [n, width]. `interaction` of a tower chooses it."""
    from twotower.models.layers.interaction import INTERACTIONS, Interaction

    return _adder(INTERACTIONS, name, Interaction)


def register_tower(name: str) -> Add:
    """Add a tower: an `nn.Module` class, whose `tower` setting in `model.user_tower` or `model.item_tower` chooses it.

    The class is called with the number of fields F and the settings of the tower. Its `forward` takes the embedded fields, float
    [n, F, d], and returns vectors [n, D], where d is `config.embedding_dim` and D is `config.hidden_dims[-1]`. Field 0 is the id;
    the last field of the user tower is the encoded history. The package normalises the vectors. Rows must not depend on each other.
    """
    from torch import nn

    from twotower.models.towers.head import TOWERS

    return _adder(TOWERS, name, nn.Module)


def register_baseline(name: str) -> Add:
    """Add a subclass of `Baseline` with `scores`; `evaluation.baselines` lists it."""
    from twotower.baselines.base import Baseline
    from twotower.baselines.baselines import BASELINES

    return _adder(BASELINES, name, Baseline)


def register_metric(name: str) -> Add:
    """Add a function of a hit matrix; every evaluation computes it, and `training.eval_metric` can choose NAME@K."""
    from twotower.utils.metrics import METRICS

    return _adder(METRICS, name)


def register_source(name: str) -> Add:
    """Add a reader of raw files: a function from settings, engine and rejects to `RawTables`. `data.source` chooses it."""
    from twotower.data.prepare import SOURCES

    return _adder(SOURCES, name)


def register_index(name: str) -> Add:
    """Add a subclass of `Index` with `build`, `search`, `save` and `load`; `twotower tune-index --kinds` tries it."""
    from twotower.search.index import Index
    from twotower.search.registry import INDEXES

    return _adder(INDEXES, name, Index)


def _adder(registry: Registry[Any], name: str, base: type | None = None) -> Add:
    """Return the decorator that registers a function or class under a name, after checks of both."""
    if not isinstance(name, str) or not name:
        text = getattr(name, "__name__", repr(name))
        raise ConfigError(f"The name of a {registry.kind} is {text}. It must be a text: @register_{registry.kind}('mine').")
    add: Add = registry.register(name)

    def checked(entry: T, /) -> T:
        if not callable(entry):
            raise ConfigError(f"The {registry.kind} {name!r} is a {type(entry).__name__}. It must be a function or a class.")
        if base is not None and isinstance(entry, type) and not issubclass(entry, base):
            raise ConfigError(
                f"The {registry.kind} {name!r} is the class {entry.__name__}. It must be a subclass of {base.__name__}."
            )
        add(entry)
        return entry

    return checked
