"""Both pages in a real browser: no complaint, no request, and all of it by keyboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import headless
import measured_rows
import pytest
import tiny_model
from typer.testing import CliRunner

from arkv_fx.calibration import Calibration, LayerStatistics
from arkv_fx.cli import app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (headless.BROWSER and headless.DRIVER),
        reason="needs chromium and chromedriver (Debian: apt install chromium chromium-driver)",
    ),
]
WIDTHS = [380, 1200]
EVIL = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module", autouse=True)
def needed() -> None:
    pytest.importorskip("selenium")
    pytest.importorskip("plotly")


def run(*args: Any) -> None:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    sizes = {"evict": 900, "default": 1000, "uniform-int4": 1100}
    rows = [
        measured_rows.task(
            task=task, tokens=tokens, method=method, bytes=size * tokens, full_bytes=4000 * tokens
        )
        for task in ("quote", EVIL)
        for tokens in (512, 1024)
        for method, size in sizes.items()
    ]
    rows += [
        measured_rows.fidelity(text=text, method=method, bytes=size, kl_mean=size / 10**5)
        for text in ("esther", EVIL)
        for method, size in sizes.items()
    ]
    rows += [measured_rows.passkey(), measured_rows.passkey(method="evict", correct=0)]
    (folder / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    layers = tuple(LayerStatistics(i, 1, 1, 1, 1, 0.25 * i, 0.5 + i) for i in range(2))
    Calibration("Llama-0", "output", (1, 1, 1), (64,), layers).save(folder / "c.json")
    page = folder / "report.html"
    run("eval", "report", folder / "rows", "-o", page, "--calibration", folder / "c.json")
    return page


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    (folder / "p.txt").write_text(f"{EVIL} It is 5 \N{EURO SIGN}.\n" * 6)
    model = tiny_model.save(folder / "model")
    page = folder / "view.html"
    run(
        "view", "--model", model, "--prompt-file", folder / "p.txt", "--new-tokens", "6",
        "--budget", "64", "-o", page,
    )  # fmt: skip
    return page


def keys(driver: Any, *pressed: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*pressed).perform()


def tab_to(driver: Any, selector: str) -> Any:
    """Press Tab until an element has the focus."""
    from selenium.webdriver.common.keys import Keys

    for _ in range(60):
        keys(driver, Keys.TAB)
        found = driver.switch_to.active_element
        if driver.execute_script("return arguments[0].matches(arguments[1])", found, selector):
            return found
    raise AssertionError(f"Tab leads to no {selector}")


def is_fine(driver: Any) -> None:
    assert headless.complaints(driver) == []
    assert headless.overflow(driver) <= 0


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report(report: Path, width: int) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    with headless.opened(report, width) as driver:
        count = len(driver.find_elements("css selector", ".plot"))
        assert count == 4 + 3 + 1 + 2
        driver.execute_script("dispatchEvent(new Event('beforeprint'))")  # draws all
        drawn = "return document.querySelectorAll('.plot .main-svg').length"
        WebDriverWait(driver, 30).until(lambda d: d.execute_script(drawn) >= count)
        # A table by keyboard: bytes up, then down.
        head = tab_to(driver, "#tasks th button")
        while head.text.split()[0] != "bytes":
            keys(driver, Keys.TAB)
            head = driver.switch_to.active_element
        column = "return [...arguments[0].closest('table').tBodies[0].rows].map(r => " \
            "+r.cells[arguments[0].parentElement.cellIndex].dataset.number)"  # fmt: skip
        for key, order in ((Keys.ENTER, "ascending"), (Keys.SPACE, "descending")):
            keys(driver, key)
            numbers = driver.execute_script(column, head)
            assert numbers == sorted(numbers, reverse=order == "descending")
            sort = "return arguments[0].parentElement.getAttribute('aria-sort')"
            assert driver.execute_script(sort, head) == order
        status = driver.find_element("id", "announced")
        assert "Sorted by bytes, largest first" in status.get_attribute("textContent")
        # Another quality changes pictures and what is said of them.
        said = driver.find_element("css selector", "#fidelity figcaption")
        before = said.text
        Select(driver.find_element("css selector", "#fidelity select")).select_by_value("top1")
        assert "KL(full" in before and "same top token" in said.text
        for scheme in ("dark", "light"):
            feature = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
        is_fine(driver)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_view(view: Path, width: int) -> None:
    from selenium.webdriver.common.keys import Keys

    with headless.opened(view, width) as driver:
        shown = (
            "return [...document.querySelectorAll('#text .token')].filter(t => !t.hidden).length"
        )
        when = driver.find_element("id", "when")
        last = driver.execute_script(shown)
        assert when.text.startswith("after 5 generated tokens")
        slider = tab_to(driver, "#step")
        keys(driver, Keys.HOME)
        assert when.text.startswith("after the prompt")
        assert slider.get_attribute("aria-valuetext") == "after the prompt"
        assert driver.execute_script(shown) == last - 5
        keys(driver, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        assert when.text.startswith("after 2 generated tokens")
        # Counts are of all tokens, whatever the step and the layer.
        counts = driver.find_elements("css selector", "[data-count]")
        total = sum(float(count.text.split()[0]) for count in counts)
        assert total == pytest.approx(last - 4, abs=0.5)
        # From token to token.
        tab_to(driver, "#text .token")
        info = driver.find_element("id", "info")
        assert (
            info.text.startswith('Token 0, "<", of the prompt.') and "Held by 2 of 2" in info.text
        )
        keys(driver, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_UP)
        assert info.text.startswith('Token 1, "/", of the prompt.') and "Score" in info.text
        keys(driver, Keys.END)
        assert "Not read yet" in info.text
        text = driver.find_element("id", "text").get_attribute("textContent")
        assert EVIL in text and "\N{EURO SIGN}" in text
        keys(driver, Keys.ARROW_LEFT)
        assert "Window and sinks" in info.text
        is_fine(driver)


def test_a_bad_page_is_noticed(tmp_path: Path) -> None:
    """Negative control."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><div style='width: 900px'>x</div><script>console.error('no')</script>"
        "<script>fetch('http://127.0.0.1:9/x').catch(() => 0)</script>"
    )
    with headless.opened(page, 380) as driver:
        said = " ".join(headless.complaints(driver))
        assert "SEVERE" in said and "a request: http://127.0.0.1:9/x" in said
        assert headless.overflow(driver) > 500
