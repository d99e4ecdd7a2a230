"""What a pass is, which order of passes is right, and what is noted of each that ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from arkv_fx.passes.context import Context
from torch.fx import GraphModule

from arkv_fx.errors import PassError


@dataclass(frozen=True)
class Pass:
    """One step over a graph: ``run`` returns how many sites or nodes it acted on.

    ``needs`` and ``gives`` are facts by name: "sites" are found, "markers" and then all "caches"
    recognised, "insertions" made where there is none, "plans" made, "operators" written, "masks"
    and "positions" moved on.
    """

    name: str
    run: Callable[[GraphModule, Context], int]
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()


def in_order(*passes: Pass) -> tuple[Pass, ...]:
    """The passes, checked: a fact is needed only when all passes that give it have run.

    Raises:
        PassError: for one that stands too early, with the pass that it waits for.
    """
    for place, step in enumerate(passes):
        for fact in step.needs:
            givers = [
                i for i, other in enumerate(passes) if fact in other.gives and other is not step
            ]
            if not givers:
                raise PassError(
                    f"the pass {step.name} needs {fact!r}, which no pass gives: add one that does "
                    "in front of it"
                )
            if givers[-1] >= place:
                raise PassError(
                    f"the pass {step.name} needs {fact!r} and stands in front of "
                    f"{passes[givers[-1]].name}, which gives it: move it behind"
                )
    return passes
