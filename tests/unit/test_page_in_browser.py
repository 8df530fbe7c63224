"""The report as a browser shows it: opens offline, complains of nothing, and fits a telephone and a desk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to run as root without
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=sandbox)
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_shows_everything_and_asks_for_nothing(
    browser: Any, full: tuple[Path, Path], width: int, scheme: str
) -> None:
    page = full[1]
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    assert tab.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [width, width]
    figures = tab.locator("figure img")
    assert figures.count() > 8
    for figure in figures.all():
        figure.scroll_into_view_if_needed()
        assert figure.evaluate("image => image.complete && image.naturalWidth > 600")
        box = figure.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["width"] > 0.7 * min(width, 1000)
        assert box["height"] > 100
    if width > 1000:  # no column of an open table is out of sight
        inside = "table => table.scrollWidth <= table.parentElement.clientWidth + 1"
        assert all(table.evaluate(inside) for table in tab.locator("div.broad > .scroll > table").all())
    for folded in tab.locator("summary").all():
        folded.click()
    assert tab.evaluate("document.documentElement.scrollWidth") == width  # wide tables scroll by themselves
    wrong = [url[:80] for url in asked if url != page.as_uri() and not url.startswith("data:")]
    assert (said, wrong) == ([], [])
    context.close()
