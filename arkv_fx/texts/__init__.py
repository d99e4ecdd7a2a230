"""Four public-domain English texts, long enough to measure a cache on (see README.md here)."""

from importlib.resources import files

from arkv_fx.errors import UnknownOptionError


def names() -> list[str]:
    """The names that `read` knows, sorted."""
    return sorted(
        entry.name.removesuffix(".txt")
        for entry in files(__name__).iterdir()
        if entry.name.endswith(".txt")
    )


def read(name: str) -> str:
    """Return the text of that name."""
    if name not in names():
        raise UnknownOptionError(f"unknown text {name!r}; known: {', '.join(names())}")
    return (files(__name__) / f"{name}.txt").read_text(encoding="utf-8")
