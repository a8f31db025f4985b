"""Define registries, whose entries settings choose by name, and check such names without loading PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel

from twotower.errors import ConfigError, nearest

T = TypeVar("T")

_REGISTRIES: dict[str, Registry[Any]] = {}


class Registry(dict[str, T]):
    """A dict of functions or classes by name, to which you can add your own.

    Parameters
    ----------
    kind
        Name of an entry in errors, such as "loss" or "pooling".
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
    """Mark a text, or each text of a list, as the name of a registry's entry.

    Attributes
    ----------
    kind
        The registry.
    built_in
        Names of the package's own entries. They stand here so that a mistyped one is refused before the registry is imported.
    at_k
        The text is a name and a list length: "NDCG@10".

    Examples
    --------
    >>> Names("colour", ("red", "green")).check("red")
    """

    kind: str
    built_in: tuple[str, ...]
    at_k: bool = False

    def known(self) -> list[str]:
        """Return the built-in names and those that were registered. Who registers has imported the registry."""
        return list(dict.fromkeys([*self.built_in, *_REGISTRIES.get(self.kind, {})]))

    def examples(self) -> list[str]:
        """Return texts with the built-in names."""
        return [f"{name}@10" if self.at_k else name for name in self.built_in]

    def check(self, text: str) -> None:
        """Check that the text has a known name.

        Raises
        ------
        ConfigError
            The name is unknown, or its list length is missing; the nearest known name is in the message.
        """
        if self.at_k:
            parse_at_k(text, self.kind, self.known())
        elif text not in self.known():
            raise ConfigError(f"Unknown {self.kind} {text!r}.{nearest(text, self.known())}")

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Return the schema of a text, which editors complete with the built-in names."""
        return {**handler(core_schema), "examples": self.examples()}


def parse_at_k(text: str, kind: str, known: Collection[str]) -> tuple[str, int]:
    """Split a name and a list length, such as "NDCG@10", into ("NDCG", 10).

    Raises
    ------
    ConfigError
        The name is not a known one (the nearest is in the message), or the length is missing or below 1.

    Examples
    --------
    >>> parse_at_k("NDCG@10", "metric", ["NDCG", "Recall"])
    ('NDCG', 10)
    """
    name, _, k = text.partition("@")
    if name not in known:
        raise ConfigError(f"Unknown {kind} {text!r}. Use a known name and a list length, as in 'NDCG@10'.{nearest(name, known)}")
    if not (k.isascii() and k.isdigit() and int(k) > 0):
        raise ConfigError(f"The {kind} {text!r} has no list length of at least 1. Write it as in '{name}@10'.")
    return name, int(k)


def names_in(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Names]]:
    """Yield the dotted name of every setting that names a registry's entry, and its `Names`."""
    for key, field in model.model_fields.items():
        setting = f"{path}.{key}".lstrip(".")
        inner = [mark for part in get_args(field.annotation) for mark in getattr(part, "__metadata__", ())]  # of a list's entries
        yield from ((setting, mark) for mark in [*field.metadata, *inner] if isinstance(mark, Names))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from names_in(field.annotation, setting)


def check_names(settings: BaseModel) -> None:
    """Check that each setting which names a registry's entry names a known one.

    Raises
    ------
    ConfigError
        One is unknown; the nearest known name is in the message.

    Examples
    --------
    >>> from twotower.utils.config import parse_config
    >>> check_names(parse_config({"evaluation": {"baselines": ["popular"]}}))
    """
    for setting, mark in names_in(type(settings)):
        value: Any = settings
        for part in setting.split("."):
            value = getattr(value, part)
        for text in value if isinstance(value, list) else [value]:
            try:
                mark.check(text)
            except ConfigError as error:
                raise ConfigError(f"Setting {setting!r}: {str(error)[0].lower()}{str(error)[1:]}") from None
