"""A headless browser: Debian's Chromium, or the one that Playwright brings."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class NoBrowser(Exception):
    pass


@contextmanager
def browser() -> Iterator[Any]:
    """NoBrowser says what to install."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise NoBrowser("Playwright is not installed: make .venv/ecosystem") from None
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            shown = error.message.splitlines()[0]
            raise NoBrowser(f"no Chromium here (apt-get install chromium): {shown}") from None
        try:
            yield opened
        finally:
            opened.close()
