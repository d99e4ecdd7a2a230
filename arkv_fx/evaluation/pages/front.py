"""Who is beaten by nobody: the Pareto front of bytes against quality."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]], *, higher: bool) -> list[int]:
    """Numbers of the points that no other one beats, the smallest first.

    A point beats another if it takes no more bytes and is no worse, and not both are equal. So
    points that are alike are on the front together.

    Args:
        points: (bytes, quality) of each, finite.
        higher: whether a larger quality is the better one.

    >>> front([(1, 0.5), (2, 0.9), (3, 0.7)], higher=True)
    [0, 1]
    """
    sign = -1.0 if higher else 1.0
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    found: list[int] = []
    best: tuple[float, float] | None = None
    for index in order:
        size, quality = points[index][0], sign * points[index][1]
        if best is None or quality < best[1] or (size, quality) == best:
            found.append(index)
            best = (size, quality)
    return found
