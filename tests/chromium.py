"""A headless Chromium, driven over a pipe by the Chrome DevTools Protocol: no driver, no socket, no package.

https://chromedevtools.github.io/devtools-protocol; with --remote-debugging-pipe the browser reads JSON from its
descriptor 3 and writes to 4, each message ended by a zero byte.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The browser wants its ends of the pipes as descriptors 3 and 4; copied upwards first, since one may be 3 or 4 already.
PLACING = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for place, end in zip((3, 4), ends): os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
SECONDS = 60  # for one answer; a loaded machine starts a browser in ten


def find_chromium() -> str | None:
    """The path of an installed Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab: it keeps every event that the browser told of it."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write
        self.rest, self.count, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The browser's answer to a method of the protocol."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next(SECONDS)
            if found.get("id") == self.count:
                assert "error" not in found, f"{method}: {found['error']}"
                result: dict[str, Any] = found["result"]
                return result
            self.events.append(found)

    def _next(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self.rest:
            if not select.select([self.read], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError(f"Chromium said nothing for {seconds} s")
            chunk = os.read(self.read, 1 << 16)
            if not chunk:
                raise EOFError("Chromium ended")
            self.rest += chunk
        text, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def open(self, path: Path) -> None:
        """Loads a file and waits until it is there."""
        self.events.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next(SECONDS))

    def run(self, expression: str) -> Any:
        """What a line of JavaScript comes to in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def emulate(self, *, scheme: str = "light", width: int = 1100, height: int = 900) -> None:
        """A screen of that size whose user prefers a light or a dark scheme."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def key(self, name: str, text: str = "") -> None:
        """A key that is pressed and let go."""
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=name, code=name, text=text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=name, code=name)

    def picture(self, path: Path) -> None:
        """Writes the whole page as PNG."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self, path: Path) -> None:
        """Writes the page as it is printed."""
        found = self.ask("Page.printToPDF", printBackground=False, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """What the console, the page's scripts and its security policy complained of since it was opened."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Every address that was asked for since the page was opened; images inside the page are none."""
        sent = (event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [url for params in sent if not (url := params["request"]["url"]).startswith("data:image/")]


@contextmanager
def browsing(chromium: str, profile: Path) -> Iterator[Page]:
    """A page of a browser of its own, with its profile in that folder."""
    to_browser, from_browser = os.pipe(), os.pipe()
    words = [
        sys.executable, "-c", PLACING, str(to_browser[0]), str(from_browser[1]), chromium, "--headless=new",
        "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-extensions", "--disable-background-networking", "--disable-dev-shm-usage", "about:blank",
    ]  # fmt: skip
    child = subprocess.Popen(
        words, pass_fds=(to_browser[0], from_browser[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        page = Page(from_browser[0], to_browser[1])
        target = page.ask("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        yield page
    finally:
        os.close(to_browser[1])  # the browser ends when its pipe does
        os.close(from_browser[0])
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
