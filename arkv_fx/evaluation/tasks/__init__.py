"""The tasks by name; a new one is a file here and its place in this list."""

from arkv_fx.evaluation.tasks.key_values import KEY_VALUES
from arkv_fx.evaluation.tasks.many_shot import MANY_SHOT
from arkv_fx.evaluation.tasks.pass_keys import NEEDLES, NEEDLES_AFTER, PASSKEY
from arkv_fx.evaluation.tasks.quotation import QUOTATION
from arkv_fx.evaluation.tasks.recall import RECALL
from arkv_fx.evaluation.tasks.task import Asked, Sample, Scored, Task, Turn
from arkv_fx.evaluation.tasks.variable_chains import VARIABLE_CHAINS
from arkv_fx.registry import Registry

__all__ = ["TASKS", "Asked", "Sample", "Scored", "Task", "Turn"]

TASKS: Registry[Task] = Registry(
    "task",
    [
        PASSKEY, NEEDLES, NEEDLES_AFTER, KEY_VALUES, VARIABLE_CHAINS, MANY_SHOT, QUOTATION, RECALL,
    ],
)  # fmt: skip
"""What ``arkv eval tasks`` can ask, in its order."""
