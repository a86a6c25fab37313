"""A headless Chromium, driven by its own DevTools protocol; no driver has to be installed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from websockets.sync.client import connect

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
         "--remote-debugging-port=0", "--disable-component-update",
         "--disable-background-networking")  # fmt: skip
PATIENCE_SECONDS = 60


def find_browser() -> str | None:
    """Path of a browser; the variable ``CHROMIUM`` comes first."""
    found = map(shutil.which, (os.environ.get("CHROMIUM", ""), *NAMES))
    return next((path for path in found if path), None)


class Browser:
    """One page of a browser, as a context manager.

    Args:
        path: of the browser.
        folder: empty, for what the browser keeps.

    Attributes:
        requests: URLs that pages asked for.
        complaints: errors and warnings of pages, whatever they come from.
    """

    def __init__(self, path: str, folder: Path) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._events: list[str] = []
        self._folder, self._numbers = folder, itertools.count(1)
        command = [path, *FLAGS, f"--user-data-dir={folder}"]
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen([*command, "about:blank"], stdout=log, stderr=log)
        self._closing = ExitStack()
        self._closing.callback(self._process.wait)
        self._closing.callback(self._process.kill)

    def __enter__(self) -> Browser:
        try:
            port, path = self._wait_for_port()
            url = f"ws://127.0.0.1:{port}{path}"
            self._socket = self._closing.enter_context(connect(url, max_size=None))
            self._session: str | None = None
            pages = [
                t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page"
            ]
            target = {"targetId": pages[0]["targetId"], "flatten": True}
            self._session = self._call("Target.attachToTarget", **target)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self._call(f"{domain}.enable")
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def open(self, url: str) -> None:
        """Go to a page, until it has loaded."""
        self._events.clear()
        self._call("Page.navigate", url=url)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "Page.loadEventFired" not in self._events:
            assert time.monotonic() < deadline, f"{url} did not load"
            self._take()

    def ask(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str, number: int = 0) -> None:
        """Press and release the mouse over the middle of an element."""
        self.move(selector, number)
        for kind in ("mousePressed", "mouseReleased"):
            self._mouse(kind, button="left", clickCount=1)

    def move(self, selector: str, number: int = 0) -> None:
        """Move the mouse over the middle of an element, which is scrolled into view."""
        element = f"document.querySelectorAll({json.dumps(selector)})[{number}]"
        self.ask(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.ask(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
                       f"({element}.getClientRects()[0])")  # fmt: skip
        self._place = box
        self._mouse("mouseMoved")

    def press(self, key: str) -> None:
        """Press and release a key, such as ``ArrowDown``."""
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def prefer(self, scheme: str) -> None:
        """The colours that the user wants, ``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", features=features)

    def resize(self, width: int, height: int) -> None:
        """Size of what the page sees, in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def _mouse(self, kind: str, **more: Any) -> None:
        x, y = self._place
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while (answer := self._take()).get("id") != number:
            pass
        assert "error" not in answer, answer["error"]
        found: dict[str, Any] = answer["result"]
        return found

    def _take(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(timeout=PATIENCE_SECONDS))
        name, params = message.get("method", ""), message.get("params", {})
        self._events.append(name)
        if name == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
        elif name == "Runtime.consoleAPICalled":
            self.complaints.append(str(params["args"]))
        elif name == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        return message

    def _wait_for_port(self) -> tuple[str, str]:
        file, deadline = self._folder / "DevToolsActivePort", time.monotonic() + PATIENCE_SECONDS
        while not file.exists() or len(lines := file.read_text().split()) < 2:
            log = (self._folder / "log").read_text()[-2000:]
            assert self._process.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.02)
        return lines[0], lines[1]
