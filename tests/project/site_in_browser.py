"""The documentation as a reader sees it, in Chromium, served on loopback. Not collected unless it is named.

    python -m tools docs && pytest -n 0 tests/project/site_in_browser.py

Chromium is the system's; playwright's own download is never used. Without either of them, or without the built site,
the tests fail and say what is missing.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin

import pytest

SITE = Path(__file__).parents[2] / "docs/_build/html"
SCREENSHOTS = SITE.parent / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"desktop": 1280, "phone": 390}
STATE = """() => ({
    sideways: document.documentElement.scrollWidth - window.innerWidth,
    broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src),
    links: [...document.querySelectorAll("a[href]")].map(link => link.href),
    dead: [...document.querySelectorAll("a[href^='#']")].map(link => link.getAttribute("href").slice(1))
        .filter(id => id && !document.getElementById(decodeURIComponent(id))),
    colours: [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor],
})"""
COLOURS = "() => [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if not (SITE / "index.html").is_file():
        pytest.fail(f"There is no built documentation in {SITE}. Build it: python -m tools docs")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail('playwright is not installed: pip install -e ".[browser]"')
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.fail(f"None of {', '.join(BROWSERS)} is on the path. Install one: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """A page of the browser that remembers what went wrong in it."""

    def __init__(self, browser: Any, address: str, width: int) -> None:
        self.wrong: list[str] = []
        self.address = address
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="light")
        self.page = self.context.new_page()
        self.page.on("request", self._request)
        self.page.on("response", self._response)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.wrong.append(f"{self.page.url}: {error}"))

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:")):
            self.wrong.append(f"{self.page.url} asks for {request.url}")

    def _response(self, response: Any) -> None:
        if response.status >= 400:
            self.wrong.append(f"{response.url}: status {response.status}")

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.wrong.append(f"{self.page.url}: {message.text} {message.location}")

    def look(self, url: str) -> dict[str, Any]:
        """Open a page, and note what is wrong with how it looks."""
        self.page.goto(url, wait_until="load")
        state = self.page.evaluate(STATE)
        self.page.emulate_media(color_scheme="dark")
        dark = self.page.evaluate(COLOURS)
        self.page.emulate_media(color_scheme="light")
        if state["sideways"] > 0:
            self.wrong.append(f"{url} scrolls sideways by {state['sideways']} pixels")
        self.wrong += [f"{url}: the picture {source} does not load" for source in state["broken"]]
        self.wrong += [f"{url}: nothing is called #{name}" for name in state["dead"]]
        if not brightness(state["colours"][1]) > 200 > 100 > brightness(state["colours"][0]):
            self.wrong.append(f"{url}: light is {state['colours']}")
        if not brightness(dark[1]) < 60 < 150 < brightness(dark[0]):
            self.wrong.append(f"{url}: dark is {dark}")
        return state


def brightness(colour: str) -> float:
    """Return the mean of red, green and blue of what a browser says, as ``rgb(1, 2, 3)``."""
    parts = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(parts) / len(parts)


@pytest.mark.parametrize("screen", WIDTHS)
def test_every_page_is_reached_and_looks_right(screen: str, browser: Any, address: str) -> None:
    visit = Visit(browser, address, WIDTHS[screen])
    waiting, seen = [f"{address}index.html"], set()
    while waiting:
        url = waiting.pop()
        if url in seen:
            continue
        seen.add(url)
        links = [urldefrag(urljoin(url, link))[0] for link in visit.look(url)["links"]]
        waiting += [link for link in links if link.startswith(address) and link.endswith(".html")]
    for name in ("index", "methods/index", "methods/rsc", "reference/api", "generated/tutorials/first_graft"):
        visit.page.goto(f"{address}{name}.html")
        visit.page.screenshot(path=str(SCREENSHOTS / f"{screen}-{name.replace('/', '-')}.png"))
    visit.context.close()
    assert visit.wrong == []
    reached = {url.removeprefix(address) for url in seen}
    assert reached >= {str(file.relative_to(SITE)) for file in SITE.rglob("*.html")} - {"search.html"}


def test_the_search_finds_an_option_on_its_card(browser: Any, address: str) -> None:
    visit = Visit(browser, address, WIDTHS["desktop"])
    visit.page.goto(f"{address}index.html")
    visit.page.fill("input.sidebar-search", "spatial_drop")
    visit.page.press("input.sidebar-search", "Enter")
    found = visit.page.locator("#search-results a[href*='methods/rsc.html']").first
    found.wait_for()
    found.click()
    assert "Representation Self-Challenging" in visit.page.inner_text("h1")
    visit.context.close()
    assert visit.wrong == []


def test_code_can_be_copied(browser: Any, address: str) -> None:
    visit = Visit(browser, address, WIDTHS["desktop"])
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.page.goto(f"{address}generated/tutorials/first_graft.html")
    block = visit.page.locator("div.highlight-Python").first
    block.hover()
    block.locator("button.copybtn").click()
    visit.page.wait_for_selector("button.copybtn.success")
    copied = visit.page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == block.locator("pre").inner_text().strip()
    assert copied.startswith("import copy")
    visit.context.close()
    assert visit.wrong == []
