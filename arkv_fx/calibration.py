"""A calibration: one OQ ratio per layer, from the statistics of a prefill's attention."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arkv_fx.errors import CalibrationError

if TYPE_CHECKING:
    from torch import nn

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class LayerStatistics:
    """Attention statistics of one layer (``calibrating.attention_statistics``) and what follows.

    ``share`` is the layer's budget in units of the configured one (1 unless "measured"), and
    ``divergence`` what compressing this layer alone did to the predictions, KL in nats.
    """

    layer: int
    entropy: float
    variance: float
    kurtosis: float
    score: float
    oq_ratio: float
    share: float = 1.0
    divergence: float | None = None


@dataclass(frozen=True)
class Calibration:
    """OQ ratios of a model's layers.

    ``fingerprint`` names the model's shape, ``mode`` is "measured", "normalised" or "paper",
    ``samples`` the prompt lengths in tokens.

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

    def row(self, layer: int | None) -> LayerStatistics | None:
        """What was found for a layer, None if it was not calibrated."""
        return next((row for row in self.layers if row.layer == layer), None)

    def check(self, fingerprint: str) -> None:
        """Refuse a calibration made for another model.

        Raises:
            CalibrationError: if the fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise CalibrationError(
                f"this calibration was made for {self.fingerprint}, the model is {fingerprint}; "
                "run arkv_fx.calibrate on this model"
            )

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        data = {"schema": SCHEMA_VERSION, **asdict(self)}
        Path(path).write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read JSON written by ``save``.

        Raises:
            CalibrationError: if the file is missing, is no calibration or has another schema.
        """
        try:
            data: dict[str, Any] = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise CalibrationError(f"{path}: cannot be read as a calibration: {error}") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA_VERSION:
            found = data.get("schema") if isinstance(data, dict) else None
            raise CalibrationError(
                f"{path}: schema {found!r} is not the {SCHEMA_VERSION} this version reads; "
                "calibrate again"
            )
        try:
            layers = tuple(LayerStatistics(**row) for row in data["layers"])
            taus = tuple(float(t) for t in data["taus"])
            if len(taus) != 3 or not all(
                0 <= row.oq_ratio <= 1 and row.share > 0 for row in layers
            ):
                raise ValueError("taus, OQ ratios or shares out of range")
            return cls(
                str(data["fingerprint"]), str(data["mode"]), taus,
                tuple(data["samples"]), layers,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path}: damaged calibration: {error}") from error


def fingerprint(model: nn.Module) -> str:
    """Class and shape of a model: names, shapes of its parameters, and a sample of the weights."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        # A few numbers tell two trainings of one architecture apart, in whatever dtype.
        sample = parameter.detach().flatten()[:4].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(sample.numpy().tobytes())
    return f"{type(model).__name__}-{digest.hexdigest()[:16]}"
