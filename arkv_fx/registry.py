"""Registries: the things of one kind by their names, one object each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from arkv_fx.errors import ConfigError, UnknownOptionError


class Named(Protocol):
    """What a registry holds: anything that says its own name."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


class Registry(dict[str, T]):
    """Things of one kind by name, in the order in which they came.

    >>> from arkv_fx.formats import FORMATS
    >>> FORMATS["k8v4"].key.name, FORMATS["k8v4"].value.name
    ('int8', 'int4')
    >>> FORMATS.find("int5")
    Traceback (most recent call last):
    ...
    arkv_fx.errors.UnknownOptionError: unknown format 'int5'; the formats are native, bf16, ...
    """

    def __init__(self, kind: str, things: Iterable[T] = ()) -> None:
        super().__init__()
        self.kind = kind
        for thing in things:
            self.add(thing)

    def add(self, thing: T) -> T:
        """Take one more thing in, under its own name; gives it back, so that it decorates.

        Raises:
            ConfigError: if another thing has that name.
        """
        if self.get(thing.name, thing) is not thing:
            raise ConfigError(
                f"there is another {self.kind} called {thing.name!r}: give yours its own name"
            )
        self[thing.name] = thing
        return thing

    def find(self, name: str) -> T:
        """The thing called ``name``.

        Raises:
            UnknownOptionError: if there is none, with the names that there are.
        """
        if name not in self:
            raise UnknownOptionError(
                f"unknown {self.kind} {name!r}; the {self.kind}s are {', '.join(self)}"
            )
        return self[name]
