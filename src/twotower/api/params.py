"""Hold the settings of a model by the habits of scikit-learn: get, set, clone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from twotower.errors import ConfigError, DataError, nearest
from twotower.utils.config import Config, load_config, merged, parse_config
from twotower.utils.registry import check_names

Section = Mapping[str, Any]
CALLS = ("on_start", "on_step", "on_log", "on_validation", "on_end")
SECTIONS = ("data", "prepare", "model", "training", "evaluation", "updating")
TABLES = ("interactions", "items", "users")
Self = TypeVar("Self", bound="Params")


def path_of(value: Any, what: str) -> Path:
    """Return a path that the caller gave.

    Raises
    ------
    DataError
        It is no path.
    """
    if not isinstance(value, str | PathLike) or not str(value):
        raise DataError(f"{what} is {value!r}. It must be a path, such as 'shop'.")
    return Path(value)


def check_callbacks(given: Any) -> tuple[Any, ...]:
    """Return callbacks as a tuple.

    Raises
    ------
    ConfigError
        It is no list, or one of them lacks the methods of a `Callback`: a class instead of an object, for instance.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConfigError(f"callbacks is a {type(given).__name__}. It must be a list of callbacks: callbacks=[MyCallback()].")
    for one in given:
        if isinstance(one, type) or not all(callable(getattr(one, name, None)) for name in CALLS):
            description = f"the class {one.__name__}" if isinstance(one, type) else f"a {type(one).__name__}"
            raise ConfigError(f"One of the callbacks is {description}. It must be an object of a subclass of twotower.Callback.")
    return tuple(given)


class Params:
    """Base of `Model`: the arguments of its constructor are attributes, and sections of the settings are dicts."""

    seed: int | None
    config: Path | str | Config | Section | None

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments of the constructor; with `deep`, also single settings as "training__num_epochs"."""
        params = {name: getattr(self, name) for name in inspect.signature(type(self).__init__).parameters if name != "self"}
        if deep:
            sections = {name: params[name] for name in SECTIONS if isinstance(params[name], Mapping)}
            params |= {f"{name}__{key}": value for name, section in sections.items() for key, value in section.items()}
        return params

    def set_params(self: Self, **params: Any) -> Self:
        """Set arguments of the constructor, or single settings as `training__num_epochs=4`. Return the model.

        Raises
        ------
        ConfigError
            An argument or setting is unknown or invalid; then nothing has changed.
        """
        values = self.get_params(deep=False)
        for name, value in params.items():
            top, *keys = name.split("__")
            if top not in values or (keys and top not in SECTIONS):
                raise ConfigError(f"Model has no parameter {name!r}.{nearest(top, values)}")
            for key in reversed(keys):
                value = {key: value}
            values[top] = merged(values[top] or {}, value) if keys else value
        type(self)(**values)  # raises for wrong settings
        for name, value in values.items():
            setattr(self, name, value)
        return self

    def settings(self, data: Section | None = None) -> Config:
        """Return all settings, checked, with `data` as the section of that name."""
        values = _values(self.config)
        for name in SECTIONS:
            section = getattr(self, name)
            values[name] = merged(values.get(name, {}), _values(section))
        if self.seed is not None:
            values["seed"] = self.seed
        values["data"] = dict(data if data is not None else values["data"])
        for name in TABLES if data is None else ():  # the path of a frame is known when it is there
            if isinstance(values["data"].get(name), Mapping):
                values["data"][name] = {"path": name, **values["data"][name]}
        config = parse_config({name: section for name, section in values.items() if section != {}})
        check_names(config)
        return config


def _values(given: Any) -> dict[str, Any]:
    """Return settings as plain values, with those alone that were set."""
    if given is None:
        return {}
    if isinstance(given, str | Path):
        given = load_config(Path(given))
    if hasattr(given, "model_dump"):
        found: dict[str, Any] = given.model_dump(mode="json", exclude_unset=True)
        return found
    if not isinstance(given, Mapping):
        raise ConfigError(f"Settings are a {type(given).__name__}. Expected a dict, such as training={{'num_epochs': 4}}.")
    return dict(given)
