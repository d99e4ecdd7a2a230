"""What the methods of a run are calibrated on: what is given, else what ``transform`` would do."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from arkv_fx.calibrating import calibrate
from arkv_fx.calibration import Calibration
from arkv_fx.config import ArkvConfig
from arkv_fx.evaluation.methods import get_method
from arkv_fx.huggingface.first_prompt import tells
from arkv_fx.kept import options_of


def calibrations(
    model: nn.Module,
    prompts: Tensor,
    configs: Mapping[str, ArkvConfig],
    methods: Mapping[str, str],
    given: Calibration | None,
) -> dict[str, Calibration | None]:
    """The calibration of each entry of ``configs`` whose method takes one; else None.

    Without one that is ``given`` a method is calibrated as ``transform(model)`` does it by itself:
    on the prompts [B, T] that it meets first.

    Args:
        methods: name of the method by entry.
    """
    made: dict[str, Calibration | None] = dict.fromkeys(configs)
    alike: dict[str, Calibration] = {}  # by the options that a calibration hangs on
    for entry in (e for e in configs if get_method(methods[e]).calibrated):
        made[entry], config = given, configs[entry]
        if given is None and tells(config, prompts):
            kind = str(options_of(config))
            if kind not in alike:
                alike[kind] = calibrate(model, prompts, config)
            made[entry] = alike[kind]
    return made
