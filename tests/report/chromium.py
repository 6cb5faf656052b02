"""A page in Chromium, driven by its debugging protocol."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"),
    *("--remote-debugging-port=0", "--remote-allow-origins=*"),
)
WIDTH, PHONE = 1200, 390


class Chromium:
    """One tab. ``errors`` collects what its console said of the pages."""

    def __init__(self):
        websocket = pytest.importorskip("websocket")
        program = shutil.which("chromium")
        if program is None:
            pytest.skip("chromium is not installed")
        self.profile = Path(tempfile.mkdtemp())
        command = [program, *QUIET, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        told = self.profile / "DevToolsActivePort"
        self._wait(lambda: told.exists() and len(told.read_text().split()) == 2)
        port, path = told.read_text().split()
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=30)
        self.number, self.session, self.errors, self.loaded = 0, None, [], 0
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            self._hear(answer)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def _hear(self, event):
        method, said = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self.loaded += 1
        elif method == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"].get("exception", said["exceptionDetails"]).get("description", str(said)))
        elif method == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(said["entry"]["text"] + " " + said["entry"].get("url", "")[:40])

    def open(self, page, *, width=WIDTH, dark=False):
        """Shows the file ``page``; ``width`` in pixels."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        before = self.loaded
        self.ask("Page.navigate", url=Path(page).as_uri())
        self._wait(lambda: self.run("document.readyState") == "complete" and self.loaded > before)

    def run(self, script):
        """The value of the expression ``script``; of a promise, what it comes to."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, path, top=0, height=None):
        """Writes the page, or ``height`` pixels of it from ``top``, as a PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"] - top, "scale": 1}
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        Path(path).write_bytes(base64.b64decode(found["data"]))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)
        shutil.rmtree(self.profile, ignore_errors=True)

    @staticmethod
    def _wait(ready):
        until = time.monotonic() + 30
        while not ready():
            assert time.monotonic() < until, "Chromium does not answer"
            time.sleep(0.02)
