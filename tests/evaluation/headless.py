"""A real browser without a screen, and what a page did in it that it should not have done."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or ""
DRIVER = shutil.which("chromedriver") or ""


@contextmanager
def opened(page: Path, width: int, height: int = 900) -> Iterator[Any]:
    """The page in a window of so many pixels; `complaints` says what went wrong."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tempfile.mkdtemp()
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage",
                     f"user-data-dir={profile}"):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # As little of this machine as it needs: Debian's script reads the environment.
    service = Service(DRIVER, env={"PATH": os.environ["PATH"], "HOME": profile})
    driver = webdriver.Chrome(options=options, service=service)
    try:
        # A window is never narrower than 500 pixels; what a page sees may be.
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        driver.get("about:blank")
        driver.get_log("performance")  # the browser's own first page
        driver.get(page.as_uri())
        yield driver
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


def complaints(driver: Any) -> list[str]:
    """What the console has said since the last call, and every request but that for the page."""
    said = [f"{entry['level']}: {entry['message']}" for entry in driver.get_log("browser")]
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            own = url == driver.current_url.partition("#")[0]
            if not own and not url.startswith(("data:", "blob:")):
                said.append(f"a request: {url}")
    return said


def overflow(driver: Any) -> int:
    """By how many pixels the page is wider than the window."""
    return int(
        driver.execute_script(
            "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
        )
    )
