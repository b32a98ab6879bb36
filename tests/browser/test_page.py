"""A report opened in a real browser: everything is seen, nothing is loaded, on any screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from moco_dist.report.run import run
from tests.browser.chromium import Chromium
from tests.report_pages import hostile
from tests.test_report import page, runs

__all__ = ["page", "runs"]

pytestmark = pytest.mark.browser

SCREENS = {"desk": (1200, 800, False), "phone": (360, 780, True)}


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Chromium]:
    with Chromium(tmp_path / "profile") as browser:
        yield browser


def check_quiet(chromium: Chromium, page: Path) -> None:
    """Check that the browser complains of nothing and asks for nothing but the page."""
    events = "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"
    for event in (*events, "Page.javascriptDialogOpening"):
        assert chromium.told(event) == [], event
    asked = [request["request"]["url"] for request in chromium.told("Network.requestWillBeSent")]
    assert asked[0] == page.as_uri()
    assert all(url == page.as_uri() or url.startswith("data:image/png;base64,") for url in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_all_pictures_are_seen_and_nothing_is_loaded(
    chromium: Chromium, page: Path, tmp_path: Path, screen: str, scheme: str
) -> None:
    width, height, phone = SCREENS[screen]
    chromium.show_as(width, height, scheme, phone)
    chromium.open(page.as_uri())
    sizes = chromium.script(
        "[...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.clientWidth])"
    )
    assert len(sizes) == len(list(page.parent.glob("*.png")))
    assert all(natural > 0 and high > 0 and shown > 0 for natural, high, shown in sizes)
    # Closed and open, nothing makes the page wider than the screen.
    for state in ("false", "true"):
        chromium.script(f"document.querySelectorAll('details').forEach(d => d.open = {state})")
        assert chromium.script("document.documentElement.scrollWidth") <= width
        assert chromium.script("innerWidth") == width
    check_quiet(chromium, page)
    chromium.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        corner = image.convert("L").getpixel((2, 2))
    assert isinstance(corner, int)
    assert corner > 240 if scheme == "light" else corner < 40


def test_a_dark_page_shows_dark_figures(chromium: Chromium, page: Path) -> None:
    shown = {}
    for scheme in ("light", "dark"):
        chromium.show_as(1200, 800, scheme)
        chromium.open(page.as_uri())
        shown[scheme] = chromium.script("document.querySelector('#loss img').currentSrc")
    assert shown["light"] != shown["dark"]


def test_texts_of_a_stranger_do_nothing_in_a_browser(chromium: Chromium, tmp_path: Path) -> None:
    probe = hostile(tmp_path / "runs")
    assert run([str(probe), "--quick", "--output", str(tmp_path / "out")]) == 0
    page = tmp_path / "out" / "report.html"
    chromium.show_as(360, 780, "light", phone=True)
    chromium.open(page.as_uri())
    assert chromium.script("document.scripts.length") == 0
    assert chromium.script("document.querySelectorAll('details').length") > 0
    chromium.script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chromium.script("document.documentElement.scrollWidth") <= 360
    check_quiet(chromium, page)


def test_the_page_would_be_stopped_from_loading_anything(
    chromium: Chromium, page: Path, tmp_path: Path
) -> None:
    """The policy is a second lock: the browser refuses a foreign picture and complains."""
    broken = tmp_path / "broken.html"
    source = page.read_text(encoding="utf-8")
    broken.write_text(source.replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>'))
    chromium.ask("Page.navigate", url=broken.as_uri())
    for _ in range(100):
        if chromium.told("Log.entryAdded"):
            break
        chromium.script("new Promise(done => setTimeout(done, 50))")
    (complaint, *_) = chromium.told("Log.entryAdded")
    assert "Content Security Policy" in complaint["entry"]["text"]
