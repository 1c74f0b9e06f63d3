"""A headless Chromium, driven over the two pipes of its DevTools protocol."""
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

class Browser:
    """`with Browser(folder) as browser`: one page, its profile in a folder."""
    def __init__(self, folder, width=1200, height=900):
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        pipes = f"exec 3<&{to_read} 4>&{to_write}; exec \"$0\" \"$@\""
        self.process = subprocess.Popen(
            ["bash", "-c", pipes, CHROMIUM, *options, "about:blank"], pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.answers, self.number, self.session = os.fdopen(self.read_end, "rb"), 0, {}
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(page["targetId"] for page in pages if page["type"] == "page")
        found = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = dict(sessionId=found["sessionId"])
        self.resize(width, height)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)
        os.close(self.write_end)
        self.answers.close()

    def call(self, method, **params):
        self.number += 1
        message = dict(id=self.number, method=method, params=params) | self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            text = b""
            while not text.endswith(b"\0"):
                text += self.answers.read(1) or b'{"error": "the browser has ended"}\0'
            answer = json.loads(text[:-1])
            if answer.get("id", self.number) == self.number and "method" not in answer:
                assert "error" not in answer, answer
                return answer["result"]

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)

    def dark(self, on=True):
        scheme = dict(name="prefers-color-scheme", value="dark" if on else "light")
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                           returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition, seconds=60):
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"not true after {seconds} s: {condition}"
            time.sleep(0.05)

    def press(self, key, code=0, text=""):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                      text=text if kind == "keyDown" else "")

    def click(self, selector, nth=0):
        """A real click on an element that a selector finds."""
        x, y = self.run(f"""(() => {{ const e = document.querySelectorAll({json.dumps(selector)})
            [{nth}]; e.scrollIntoView({{block: "center"}}); const r = e.getClientRects()[0];
            return [r.x + Math.min(r.width / 2, 8), r.y + r.height / 2]; }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
