"""Every page of the built book in headless chromium, at desktop and phone width (`make test-browser`).

The browser is driven over its DevTools pipe: console errors, requests and an exact viewport are plain
messages there, and it needs no driver binary, no port and no package beyond chromium itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rsparse import book
from rsparse.paths import HERE

pytestmark = pytest.mark.browser

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --remote-debugging-pipe""".split()
WIDTHS = {"desktop": 1280, "phone": 390}
INSPECT = """
(async () => {
    document.querySelectorAll("details").forEach(details => { details.open = true; });
    const sets = [...document.querySelectorAll(".sd-tab-set")];
    const rounds = Math.max(1, ...sets.map(set => set.querySelectorAll(":scope > label").length));
    const found = [];
    for (let round = 0; round < rounds; round++) {
        sets.forEach(set => set.querySelectorAll(":scope > label")[round]?.click());
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
        const width = document.documentElement.scrollWidth;
        if (width > WIDTH) found.push(`tab ${round}: the page is ${width} pixels wide`);
    }
    for (const image of document.images) {
        await image.decode().catch(() => found.push(`broken image ${image.src}`));
        if (!image.alt.trim()) found.push(`no alt text: ${image.src}`);
    }
    return found;
})()
"""


class Browser:
    """A chromium process and one tab of it."""

    def __init__(self, profile: Path) -> None:
        ours, its_output = os.pipe()
        its_input, self.pipe_in = os.pipe()
        command = [shutil.which("chromium") or "chromium", *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(  # the protocol is spoken on descriptors 3 and 4
            ["bash", "-c", f'exec "$@" 3<&{its_input} 4>&{its_output}', "bash", *command],
            pass_fds=(its_input, its_output),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input)
        os.close(its_output)
        self.messages = os.fdopen(ours, "rb")
        self.received = self._receive()
        self.session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        self.last_id = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.session = {}
        self.call("Browser.close")
        self.process.wait(30)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.last_id += 1
        request = {"id": self.last_id, "method": method, "params": parameters} | self.session
        os.write(self.pipe_in, json.dumps(request).encode() + b"\0")
        for message in self.received:
            if message.get("id") == self.last_id:
                assert "error" not in message, message["error"]
                return message["result"]
            self.events.append(message)
        raise AssertionError("chromium has gone")

    def open(self, page: Path, width: int) -> list[str]:
        """What is wrong with the page at this width: one line each."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(next(self.received))
        script = INSPECT.replace("WIDTH", str(width))
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return result["result"]["value"] + [problem for event in self.events if (problem := _problem(event))]

    def _receive(self) -> Iterator[dict[str, Any]]:
        buffer = b""
        while chunk := self.messages.read1():
            *complete, buffer = (buffer + chunk).split(b"\0")
            yield from map(json.loads, complete)


def _problem(event: dict[str, Any]) -> str | None:
    method, about = event["method"], event["params"]
    if method == "Runtime.exceptionThrown":
        return f"exception: {about['exceptionDetails']}"
    if method == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
        return f"console: {about['args']}"
    if method == "Log.entryAdded" and about["entry"]["level"] == "error":
        return f"console: {about['entry']['text']} {about['entry'].get('url', '')}"
    if method == "Network.requestWillBeSent" and not about["request"]["url"].startswith(
        ("file:", "data:", "blob:")
    ):
        return f"asks another machine: {about['request']['url']}"
    return None


@pytest.fixture(scope="session")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder named by BOOK_HTML, or else the published pages, built now."""
    named = os.environ.get("BOOK_HTML")
    return Path(named).resolve() if named else book.build(HERE, out=tmp_path_factory.mktemp("book"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("device", WIDTHS)
def test_no_page_has_a_console_error_an_overflow_or_a_broken_image(
    device: str, html: Path, browser: Browser
) -> None:
    pages = [*html.glob("*.html"), *html.glob("exhibits/*.html")]
    pages.remove(html / "index.html")  # it only forwards to intro.html
    assert html / "intro.html" in pages
    problems = {page.name: found for page in pages if (found := browser.open(page, WIDTHS[device]))}
    assert not problems


def test_the_check_sees_what_it_looks_for(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><div style="width: 900px">wide</div>'
        '<img src="absent.png"><script>console.error("told"); nowhere()</script>'
        '<script src="http://127.0.0.1:9/x.js"></script>'
    )
    problems = "\n".join(browser.open(page, WIDTHS["phone"]))
    for sign in (
        "pixels wide",
        "broken image",
        "no alt text",
        "console:",
        "exception:",
        "asks another machine",
    ):
        assert sign in problems
