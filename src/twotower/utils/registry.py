"""Define registries, whose entries settings choose by name, and check such names without loading PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from twotower.errors import ConfigError, nearest

T = TypeVar("T")

_REGISTRIES: dict[str, Registry[Any]] = {}


class Registry(dict[str, T]):
    """A dict of functions or classes by name, to which you can add your own.

    Parameters
    ----------
    kind
        What an entry is, in errors: "loss", "pooling".
    built_in
        Entries of the package.

    Examples
    --------
    >>> GREETINGS = Registry("greeting", {"hello": "Hello!"})
    >>> GREETINGS.register("mine")("Good morning!")
    'Good morning!'
    >>> sorted(GREETINGS)
    ['hello', 'mine']
    >>> del GREETINGS["mine"]
    """

    def __init__(self, kind: str, built_in: Mapping[str, T]) -> None:
        super().__init__(built_in)
        self.kind, self._built_in = kind, frozenset(built_in)
        _REGISTRIES[kind] = self

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds its function or class under a name; your own later entry replaces an earlier one.

        Raises
        ------
        ConfigError
            An entry of the package has the name.
        """
        if name in self._built_in:
            raise ConfigError(f"The {self.kind} {name!r} is part of the package. Choose another name.")

        def add(entry: T) -> T:
            self[name] = entry
            return entry

        return add

    def __missing__(self, name: str) -> T:
        raise ConfigError(f"Unknown {self.kind} {name!r}.{nearest(str(name), self)}")


@dataclass(frozen=True, slots=True)
class Names:
    """Mark a text setting as the name of a registry's entry.

    Attributes
    ----------
    kind
        The registry.
    built_in
        Names of the package's own entries. They stand here so that a mistyped one is refused before the registry is imported.
    """

    kind: str
    built_in: tuple[str, ...]

    def known(self) -> list[str]:
        """Return the built-in names and those that were registered. Who registers has imported the registry."""
        return list(dict.fromkeys([*self.built_in, *_REGISTRIES.get(self.kind, {})]))

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Return the schema of a text, which editors complete with the built-in names."""
        return {**handler(core_schema), "examples": list(self.built_in)}


def names_in(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Names]]:
    """Yield the dotted name of every setting that names a registry's entry, and its `Names`."""
    for key, field in model.model_fields.items():
        place = f"{path}.{key}".lstrip(".")
        yield from ((place, mark) for mark in field.metadata if isinstance(mark, Names))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from names_in(field.annotation, place)


def check_names(settings: BaseModel) -> None:
    """Check that each setting which names a registry's entry names a known one.

    Raises
    ------
    ConfigError
        One is unknown; the nearest known name is in the message.
    """
    for place, mark in names_in(type(settings)):
        value: Any = settings
        for part in place.split("."):
            value = getattr(value, part)
        if value not in mark.known():
            raise ConfigError(f"Setting {place!r}: unknown {mark.kind} {value!r}.{nearest(value, mark.known())}")
