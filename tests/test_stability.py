"""What ARCHITECTURE.md calls stable says its version, and an older one is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arkv_fx import Calibration
from arkv_fx.calibration import READABLE, SCHEMA_VERSION
from arkv_fx.errors import CalibrationError, EngineError
from arkv_fx.runtime import read_sidecar
from arkv_fx.runtime.manifest import VERSION

PAGE = (Path(__file__).parent.parent / "ARCHITECTURE.md").read_text()


def test_the_page_names_the_versions() -> None:
    assert f"`calibration.SCHEMA_VERSION`, {SCHEMA_VERSION})" in PAGE
    assert f"`runtime.manifest.VERSION`, {VERSION})" in PAGE


@pytest.mark.parametrize("schema", [min(READABLE) - 1, SCHEMA_VERSION + 1, None])
def test_calibrations_of_another_schema(schema: int | None, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    Calibration("Llama-0", "paper", (1.0, 1.0, 1.0), (8,), ()).save(file)
    content = json.loads(file.read_text())
    assert content["schema"] == SCHEMA_VERSION
    Calibration.load(file)
    file.write_text(json.dumps({**content, "schema": schema}))
    says = f"schema {schema} is not the {SCHEMA_VERSION} this version reads; calibrate again"
    with pytest.raises(CalibrationError, match=says):
        Calibration.load(file)


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, None])
def test_exports_of_another_version(version: int | None, tmp_path: Path) -> None:
    (tmp_path / "arkv.json").write_text(json.dumps({"version": version}))
    says = f"format version {version}; this arkv_fx reads version {VERSION}: export again"
    with pytest.raises(EngineError, match=says):
        read_sidecar(tmp_path)
