"""Values that a user gives: of the kind that an option means, or refused by its name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from reprlib import Repr
from typing import Any, NoReturn

from arkv_fx.errors import ConfigError, UnknownOptionError

MOST_TOKENS = 2**31 - 1  # positions are int32
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def short(value: Any) -> str:
    """What a value looks like, in a line."""
    return " ".join(_SHORT.repr(value).split())


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    """Raise a ``ConfigError`` that names the option, its value and what is allowed."""
    raise ConfigError(f"{name}={short(value)}: must be {allowed}")


@dataclass(frozen=True)
class Whole:
    """Whole numbers from ``least`` (or above it) to ``most``, of Python, numpy or torch."""

    least: int = 1
    most: int = MOST_TOKENS
    above: bool = False
    unit: str = ""

    def read(self, name: str, value: Any) -> int:
        """The number as an int; raises ``ConfigError`` for anything else."""
        number = _number(value)
        inside = isinstance(number, numbers.Integral) and self.least <= int(number) <= self.most
        if not inside or (self.above and number == self.least):
            least = f"{'>' if self.above else '>='} {self.least}"
            refuse(name, value, f"{least} and <= {self.most}, a whole number{self.unit}")
        return int(number)


@dataclass(frozen=True)
class Real:
    """Finite numbers that are at least ``least``, or above it, and at most ``most``."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    @property
    def allowed(self) -> str:
        """In words."""
        if self.most < math.inf:
            return f"between {self.least:g} and {self.most:g}"
        if self.least == -math.inf:
            return "a finite number"
        return f"{'>' if self.above else '>='} {self.least:g}, a finite number"

    def read(self, name: str, value: Any) -> float:
        """The number as a float; raises ``ConfigError`` for anything else."""
        number = _number(value)
        try:
            found = float(number) if isinstance(number, numbers.Real) else math.nan
        except OverflowError:  # a whole number that no float reaches
            found = math.nan
        inside = self.least <= found <= self.most and not (self.above and found == self.least)
        if not (math.isfinite(found) and inside):
            refuse(name, value, self.allowed)
        return found


def in_a_row(name: str, value: Any, allowed: str) -> tuple[Any, ...]:
    """The things of an ordered collection, which a text is not."""
    if isinstance(value, (str, bytes, Mapping, Set)) or not isinstance(value, Iterable):
        refuse(name, value, allowed)
    try:
        return tuple(value)
    except TypeError:  # of no dimension
        refuse(name, value, allowed)


def require_one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is none of the ``choices``.

    Raises:
        UnknownOptionError: naming the option, its value and the choices.
    """
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise UnknownOptionError(f"{name}={short(value)}: choose {', '.join(others)} or {last}")


def require_type(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Refuse what is of another type.

    Raises:
        ConfigError: naming the argument, its type and what is ``wanted``.
    """
    if not isinstance(value, kind):
        kept = f"{name}={short(value)} is of type {type(value).__name__}"
        raise ConfigError(f"{kept}: give {wanted}")


def _number(value: Any) -> Any:
    """A plain number for a scalar of any library; whatever else as it is, no number for a bool."""
    try:
        value = value.item() if hasattr(value, "item") and not value.ndim else value
    except Exception:  # such as a tensor without numbers
        return None
    return None if isinstance(value, bool) else value
