"""Pages in a real browser: headless Chromium, driven by selenium; tests are skipped without it.

The browser reaches localhost only, so a page that needs the network fails.
"""

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

_WAIT = 60  # seconds for a page, on a machine that is busy


@contextmanager
def chromium(*, width: int = 1400, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """A Chromium with a window of this many CSS pixels, closed afterwards: a selenium driver.

    Skips the test where Chromium, its driver or selenium is missing.

    Args:
        width: of the page, scroll bar included; it may be as small as a phone's.
        height: of the visible part.
        dark: whether the reader prefers dark colours.
    """
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"no {' and no '.join(missing)}: install chromium and chromium-driver")
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = programs["chromium"]
    flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"]
    flags += ["--disable-background-networking", "--no-first-run", "--force-color-profile=srgb"]
    if os.geteuid() == 0:
        flags += ["--no-sandbox"]  # Chromium refuses root otherwise
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(programs["chromedriver"])
    driver = selenium.Chrome(options=options, service=service)
    try:
        driver.set_page_load_timeout(_WAIT)
        driver.set_script_timeout(_WAIT)
        resize(driver, width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


def resize(driver: Any, width: int, height: int = 900) -> None:
    """Gives the page another size, in CSS pixels; a window itself cannot be as small as a phone."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def console_errors(driver: Any) -> list[str]:
    """Errors and warnings in the console since the last call."""
    return [f"{e['level']}: {e['message']}" for e in driver.get_log("browser") if _bad(e)]


def _bad(entry: dict[str, Any]) -> bool:
    return entry["level"] in ("WARNING", "SEVERE")


def screenshot(driver: Any, path: Path) -> None:
    """The whole page, not only what is visible of it, as PNG."""
    import base64

    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder, as `python -m http.server` serves it; its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
