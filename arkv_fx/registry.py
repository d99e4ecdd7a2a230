"""Registries: the things of one kind by their names, one object each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from arkv_fx.errors import ConfigError, UnknownOptionError


class Named(Protocol):
    """What a registry holds: anything that says its own name."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)
F = TypeVar("F", bound=Callable[..., Any])

_forget: list[Callable[[], Any]] = []


def forgets(function: F) -> F:
    """A decorator for functions that remember by names (``lru_cache``): not beyond a change."""
    _forget.append(function.cache_clear)  # type: ignore[attr-defined]
    return function


def forget_with(clear: Callable[[], Any]) -> None:
    """Call ``clear`` whenever a registry changes."""
    _forget.append(clear)


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

    def __setitem__(self, name: str, thing: T) -> None:
        super().__setitem__(name, thing)
        for clear in _forget:
            clear()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        for clear in _forget:
            clear()

    def find(self, name: str) -> T:
        """The thing called ``name``.

        Raises:
            UnknownOptionError: if there is none, with the names that there are.
        """
        if not isinstance(name, str) or name not in self:
            raise UnknownOptionError(
                f"unknown {self.kind} {name!r}; the {self.kind}s are {', '.join(self)}"
            )
        return self[name]
