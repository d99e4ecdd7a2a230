"""A calibration: what each layer is given of a budget, from the attention of a prefill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arkv_fx.allocation import SHARES, allocate_few, options
from arkv_fx.errors import CalibrationError
from arkv_fx.files import write_text
from arkv_fx.options import require_type

if TYPE_CHECKING:
    from torch import nn

SCHEMA_VERSION = 4
READABLE = (3, SCHEMA_VERSION)
"""Schema 3 lacks ``costs``: its shares are used as they are."""
UNITS = ("bytes", "tokens")
MODES = ("output", "measured", "normalised", "paper")


@dataclass(frozen=True)
class LayerStatistics:
    """Attention statistics of one layer (``calibrating.attention_statistics``) and what follows.

    ``share`` is the layer's budget in units of the configured one (1 under "normalised" and
    "paper"). ``divergence`` is what compressing this layer alone did: under "output" the relative
    error of its attention's output, under "measured" to the predictions, KL in nats.

    ``costs`` are (size, OQ ratio, error) of all that "output" tried; sizes are budgets as fractions
    of the full cache in 16 bits, or of its tokens under a budget of tokens.
    """

    layer: int
    entropy: float
    variance: float
    kurtosis: float
    score: float
    oq_ratio: float
    share: float = 1.0
    divergence: float | None = None
    costs: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Calibration:
    """Shares of the budget and OQ ratios of a model's layers.

    ``fingerprint`` names the model's weights, ``mode`` is one of ``MODES``, ``samples`` the prompt
    lengths in tokens, ``unit`` whether the sizes of costs are of "bytes" or of "tokens". The rows
    say what suits the configuration that was calibrated; ``at`` what suits another budget.

    Example:
        >>> import tempfile, torch, arkv_fx
        >>> from arkv_fx.models import random_model
        >>> model, prompt = random_model("llama"), torch.randint(1, 128, (1, 60))
        >>> config = arkv_fx.ArkvConfig(budget=40, window=8, calibration="normalised")
        >>> found = arkv_fx.calibrate(model, prompt, config)
        >>> file = f"{tempfile.mkdtemp()}/calibration.json"
        >>> found.save(file)
        >>> arkv_fx.Calibration.load(file) == found
        True
    """

    fingerprint: str
    mode: str
    taus: tuple[float, float, float]
    samples: tuple[int, ...]
    layers: tuple[LayerStatistics, ...]
    unit: str = "bytes"

    def at(self, size: float, unit: str = "bytes") -> Calibration:
        """The rows solved again for a budget of ``size``, see ``LayerStatistics.costs``.

        Itself, where nothing tells what another budget would cost: without costs, or if they are
        of the other unit.
        """
        return _solved(self, size) if unit == self.unit else self

    def row(self, layer: int | None) -> LayerStatistics | None:
        """What was found for a layer, None if it was not calibrated."""
        return next((row for row in self.layers if row.layer == layer), None)

    def shares(self, sliding: Sequence[int]) -> tuple[float, ...]:
        """Those of all layers that attend without a window; ``sliding`` are windows by layer.

        Only such layers share the budget out: the others have bounds of their own.
        """
        whole = (r for r in self.layers if r.layer >= len(sliding) or not sliding[r.layer])
        return tuple(row.share for row in whole)

    def check(self, fingerprint: str, layers: int | None = None) -> None:
        """Refuse a calibration made for another model, or for other weights; or of other layers.

        ``layers`` is how many the model caches, if that is known.

        Weights that are quantized or merged with an adapter after calibrating are others: calibrate
        what will run.

        Raises:
            CalibrationError: if the fingerprints differ, or a row is of no layer or says what no
                calibration does.
        """
        if fingerprint != self.fingerprint:
            raise CalibrationError(
                f"this calibration was made for {self.fingerprint}, the model is {fingerprint}; "
                "run arkv_fx.calibrate on this model"
            )
        try:
            self._check_values()
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"this calibration cannot be: {error}") from error
        if not self.layers:
            raise CalibrationError("this calibration has not one layer; run arkv_fx.calibrate")
        beyond = [row.layer for row in self.layers if layers is not None and row.layer >= layers]
        if beyond:
            raise CalibrationError(
                f"the calibration has rows of layers {beyond}; the model caches {layers} layers"
            )

    def save(self, path: str | Path) -> None:
        """Write JSON; a file that is there is replaced when the new one is complete."""
        write_text(path, self.to_json())

    def to_json(self) -> str:
        """What ``save`` writes."""
        data = {"schema": SCHEMA_VERSION, "count": len(self.layers), **asdict(self)}
        rows = [json.dumps(row) for row in data.pop("layers")]
        text = json.dumps(data, indent=1).removesuffix("\n}")
        return f'{text},\n "layers": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read JSON written by ``save``.

        Raises:
            CalibrationError: if the file is missing, is no calibration, has another schema, or says
                what no calibration does; naming the row.
            ConfigError: if ``path`` is none.
        """
        require_type(
            "path", path, (str, PathLike), "the path of a file that Calibration.save wrote"
        )
        try:
            text = Path(path).read_text()
        except (OSError, ValueError) as error:
            raise CalibrationError(f"{path}: cannot be read as a calibration: {error}") from error
        return cls.from_json(text, path)

    @classmethod
    def from_json(cls, text: str, path: str | Path) -> Calibration:
        """What ``to_json`` wrote, found in the file ``path``; errors as of ``load``."""
        try:
            data: dict[str, Any] = json.loads(text, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}: cannot be read as a calibration: {error}") from error
        if not isinstance(data, dict) or data.get("schema") not in READABLE:
            found = data.get("schema") if isinstance(data, dict) else None
            raise CalibrationError(
                f"{path}: schema {found!r} is not the {SCHEMA_VERSION} this version reads; "
                "calibrate again"
            )
        try:
            layers = tuple(
                LayerStatistics(**{**row, "costs": tuple(map(tuple, row.get("costs", ())))})
                for row in data["layers"]
            )
            found = cls(
                str(data["fingerprint"]), data["mode"], tuple(data["taus"]),
                tuple(data["samples"]), layers, data.get("unit", "bytes"),
            )  # fmt: skip
            if data["count"] != len(layers):
                raise ValueError(f"{data['count']} layers were written, {len(layers)} are there")
            found._check_values()
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path}: damaged calibration: {error}") from error

    def _check_values(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r}: there are {', '.join(MODES)}")
        if self.unit not in UNITS:
            raise ValueError(f"unit {self.unit!r}: there are {', '.join(UNITS)}")
        if len(self.taus) != 3 or not all(_is_number(tau) and tau > 0 for tau in self.taus):
            raise ValueError(f"taus {self.taus!r}: three numbers > 0")
        if not all(type(n) is int and n > 0 for n in self.samples):
            raise ValueError(f"samples {self.samples!r}: numbers of tokens")
        known: set[int] = set()
        for row in self.layers:
            if type(row.layer) is not int or row.layer < 0:
                raise ValueError(f"layer {row.layer!r}: a whole number is needed")
            if row.layer in known:
                raise ValueError(f"layer {row.layer} is there twice")
            known.add(row.layer)
            for each in row.costs:
                good = len(each) == 3 and all(_is_number(x) and x >= 0 for x in each)
                if not good or each[0] == 0 or each[1] > 1:
                    raise ValueError(f"layer {row.layer}, costs {each!r}: size, OQ ratio and error")
            for name, value in vars(row).items():
                if name == "costs" or (name == "divergence" and value is None):
                    continue
                if not _is_number(value):
                    raise ValueError(f"layer {row.layer}, {name} {value!r}: a number is needed")
            if not 0 <= row.oq_ratio <= 1:
                raise ValueError(f"layer {row.layer}, oq_ratio {row.oq_ratio}: between 0 and 1")
            if row.share <= 0:
                raise ValueError(f"layer {row.layer}, share {row.share}: above 0")
        total = sum(row.share for row in self.layers)
        least, most = SHARES[0] * len(self.layers), float(len(self.layers))
        if not least * (1 - 1e-6) <= total <= most * (1 + 1e-6):
            raise ValueError(
                f"shares sum to {total:g} where {len(self.layers)} were to be given: between "
                f"{least:g} and {most:g} is what measuring gives"
            )


@lru_cache(maxsize=64)  # each layer of each graph asks
def _solved(found: Calibration, size: float) -> Calibration:
    costs = {row.layer: options(row.costs, size) for row in found.layers if row.costs}
    if not costs:
        return found
    chosen, rows = allocate_few(costs), []
    for row in found.layers:
        if (option := chosen.get(row.layer)) is not None:
            cost = costs[row.layer][option]
            row = replace(row, oq_ratio=option.oq_ratio, share=option.share, divergence=cost)
        rows.append(row)
    return replace(found, layers=tuple(rows))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key stands there twice, of {[key for key, _ in pairs]}")
    return found


CHUNK = 1 << 20


def fingerprint(model: nn.Module) -> str:
    """Class of a model, and names, shapes and all weights of its parameters.

    In bfloat16, so that a checkpoint has one fingerprint whatever dtype it is loaded in: what that
    does not show is no change. Each number counts with an odd factor by its place, so a change of
    one of them is always seen. Parameters that are made of several tensors (quantized ones) count
    by these, integers by their bytes, and so do integers that are buffers (GPTQ, AWQ).
    """
    import torch

    digest = hashlib.sha256()
    whole = [(n, x) for n, x in model.named_buffers() if not x.is_floating_point() and x.dim() > 1]
    for name, parameter in sorted([*model.named_parameters(), *whole]):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        for plain in tensors_inside(parameter.detach()):
            sums = []
            for part in plain.reshape(-1).split(CHUNK):
                floats = part.is_floating_point()
                number = part.to(torch.bfloat16).view(torch.int16) if floats else _bytes(part)
                bits = number.to(torch.int64)
                sums.append((bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum())
            digest.update(torch.stack(sums).cpu().numpy().tobytes() if sums else b"")
    return f"{type(model).__name__}-{digest.hexdigest()[:16]}"


def _bytes(x: Any) -> Any:
    import torch

    return x if x.dtype == torch.bool else x.contiguous().view(torch.uint8)


def tensors_inside(x: Any) -> list[Any]:
    """The tensors that a tensor is made of: itself, but of subclasses those inside."""
    if not hasattr(x, "__tensor_flatten__"):
        return [x]
    names, _ = x.__tensor_flatten__()
    return [plain for name in names for plain in tensors_inside(getattr(x, name))]
