"""A real browser without a window, driven over the pipe of its own debugging protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROGRAM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
_KEYS = {"Tab": (9, None), "Enter": (13, "\r"), " ": (32, " "), "Escape": (27, None)}


class Browser:
    """One page. Use it as a context manager."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        commands, self._commands = os.pipe()
        self._events, events = os.pipe()
        flags = [*_FLAGS, f"--user-data-dir={profile}", "--window-size=900,700", "about:blank"]
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{commands} 4>&{events}', PROGRAM, *flags]
        nothing = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, pass_fds=(commands, events), **nothing)
        os.close(commands)
        os.close(events)
        self._numbers, self._rest, self._session = itertools.count(1), b"", None
        self.console: list[str] = []

    def __enter__(self) -> Self:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait(30)
        os.close(self._commands)
        os.close(self._events)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result. Complaints of the page that come meanwhile are kept in ``console``."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                data = os.read(self._events, 1 << 16)
                assert data, "the browser ended"
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\0")
            found = json.loads(line)
            events = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
            if found.get("method") in events and found["params"].get("entry", {}).get("level") != "verbose":
                self.console.append(json.dumps(found["params"])[:500])
            if found.get("id") == number:
                assert "error" not in found, found["error"]
                return dict(found["result"])

    def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never: {expression}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release a key."""
        code, text = _KEYS[key]
        pressed = {"key": key, "code": {" ": "Space"}.get(key, key), "windowsVirtualKeyCode": code}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **down, **pressed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def write(self, text: str) -> None:
        """Write text where the focus is."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Save what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def nodes(self) -> list[tuple[str, str]]:
        """Roles and names of what a screen reader finds."""
        found = self.call("Accessibility.getFullAXTree")["nodes"]
        seen = [node for node in found if not node["ignored"]]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in seen]
