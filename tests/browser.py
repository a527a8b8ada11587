"""Look at pages in a real browser, headless Chromium: screenshots, wide and on a small screen, and what is broken.

    python tests/browser.py --out FOLDER PAGE.html [...]        pages of `sdtrain report`
    python tests/browser.py --out FOLDER --tensorboard RUN      what TensorBoard shows of a run, and of its pictures

A page is broken where a picture does not load, a link leads nowhere, it is wider than the screen, or text of it was run
as a program. Exits 1 for a broken page, 77 where there is no Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny import free_port

SIZES = {"wide": (1300, 900), "small": (400, 800)}
LONGEST = 8000  # pixels of a screenshot
LOAD_MS = 20_000
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}
# a canary of the tests is called `pwned`; whatever a page defines under this name was run
PROBE = """<script>addEventListener('load', () => document.body.setAttribute('data-found', JSON.stringify({
  pictures: [...document.images].filter(i => !i.naturalWidth).map(i => i.alt || i.src.slice(0, 60)),
  links: [...document.links].map(a => a.getAttribute('href')),
  anchors: [...document.querySelectorAll('[id]')].map(e => e.id),
  wide: document.documentElement.scrollWidth - innerWidth, high: document.documentElement.scrollHeight,
  images: document.images.length, tables: document.querySelectorAll('table').length, ran: typeof pwned !== 'undefined'
})))</script>"""


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def command(profile: str) -> list[str]:
    """Chromium with a profile of its own, and no network but this machine."""
    program = chromium()
    assert program, "there is no Chromium"
    plain = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    return [program, *plain, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"]


def browse(*words: str) -> str:
    """What Chromium prints."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run([*command(profile), *words], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Tab:
    """A page of a running Chromium, used as a person uses it, through the DevTools protocol on two pipes."""

    def __init__(self, profile: str) -> None:
        self.asked: list[str] = []  # addresses
        self.said: list[str] = []  # on the console: what a policy has blocked, and errors
        ours, theirs = os.pipe(), os.pipe()
        shell = f'exec 3<&{theirs[0]} 4>&{ours[1]}; exec "$0" "$@"'
        words = [*command(profile), "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", shell, *words], pass_fds=(theirs[0], ours[1]), stderr=subprocess.DEVNULL
        )
        os.close(theirs[0])
        os.close(ours[1])
        self.to, self.of = os.fdopen(theirs[1], "wb"), os.fdopen(ours[0], "rb")
        self.number, self.session, self.rest = 0, "", b""
        [target] = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        joined = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = joined["sessionId"]
        for part in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{part}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one method; what is reported meanwhile is noted."""
        self.number += 1
        target = {"sessionId": self.session} if self.session else {}
        self.to.write(json.dumps({"id": self.number, "method": method, "params": params, **target}).encode() + b"\0")
        self.to.flush()
        while True:
            message = self.message()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return dict(message["result"])
            self.note(message)

    def message(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.of.fileno(), 1 << 16)
            assert part, "Chromium has ended"
            self.rest += part
        first, _, self.rest = self.rest.partition(b"\0")
        return dict(json.loads(first))

    def note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message["method"] == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        if message["method"] == "Log.entryAdded":
            self.said.append(params["entry"]["text"])
        if message["method"] == "Runtime.exceptionThrown":
            self.said.append(str(params["exceptionDetails"]))

    def run(self, script: str) -> Any:
        """The value of an expression, waited for where it is a promise."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script: str, sec: float = 20) -> Any:
        """The value of an expression, once it is true."""
        until = time.monotonic() + sec
        while not (value := self.run(script)):
            assert time.monotonic() < until, f"never true: {script}; {self.run('document.body.innerText')}; {self.said}"
            time.sleep(0.05)
        return value

    def open(self, url: str, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete'")

    def drop(self, file: Path, where: str) -> None:
        """Drop a file on the element that a selector finds."""
        x, y = self.middle(where)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def middle(self, where: str) -> tuple[float, float]:
        box = self.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({element(where)}.getBoundingClientRect())")
        return box[0], box[1]

    def press(self, key: str, where: str) -> None:
        """Press a key while an element has the focus."""
        self.run(f"{element(where)}.focus()")
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, file: Path) -> None:
        """A screenshot of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


def element(where: str) -> str:
    return f"document.querySelector({json.dumps(where)})"


@contextmanager
def tab() -> Iterator[Tab]:
    """A browser with one page."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        one = Tab(profile)
        try:
            yield one
        finally:
            one.process.kill()
            one.process.wait()
            one.to.close()
            one.of.close()


def screenshot(url: str, file: Path, width: int, height: int) -> None:
    size = f"--window-size={width},{height}"
    browse(f"--screenshot={file.resolve()}", size, f"--virtual-time-budget={LOAD_MS}", url)
    assert file.exists(), f"no screenshot of {url}"


def seen(page: Path, width: int, height: int) -> dict[str, Any]:
    """What a browser window of this size has made of a page."""
    with tempfile.TemporaryDirectory(dir=page.parent) as folder:
        probed = Path(folder) / page.name
        probed.write_text(page.read_text() + PROBE)
        shown = browse("--dump-dom", f"--window-size={width},{height}", probed.as_uri())
    found = re.search(r'data-found="([^"]*)"', shown)
    assert found, f"{page} has not been loaded"
    told: dict[str, Any] = json.loads(html.unescape(found[1]))
    return told


def broken(page: Path, found: dict[str, Any]) -> list[str]:
    """What is wrong with it, in words."""
    said = [f"picture {name} does not load" for name in found["pictures"]]
    for link in found["links"]:
        inside = link.startswith("#") and link[1:] in found["anchors"]
        if not inside and (link.startswith("#") or "://" not in link and not (page.parent / link).exists()):
            said.append(f"link {link} leads nowhere")
    said += [f"{found['wide']} px wider than the screen"] if found["wide"] > 0 else []
    return said + (["text of it was run as a program"] if found["ran"] else [])


def look(page: Path, out: Path) -> list[str]:
    """Screenshots of a page, and what is broken in it on either screen."""
    problems = []
    for name, (width, height) in SIZES.items():
        found = seen(page, width, height)
        file = out / f"{page.stem}_{name}.png"
        screenshot(page.resolve().as_uri(), file, width, min(max(found["high"], height), LONGEST))
        bad = broken(page, found)
        print(
            f"{file}: {found['tables']} tables, {found['images']} pictures, {found['high']} px high: {bad or 'whole'}"
        )
        problems += [f"{name}: {one}" for one in bad]
    return problems


@contextmanager
def tensorboard(run: Path) -> Iterator[str]:
    """The address of TensorBoard over a run."""
    port = free_port()
    words = ["--logdir", str(run / "tensorboard"), "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *words], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            try:
                if tags(address, "scalars"):
                    break
            except OSError:
                pass
            assert server.poll() is None, "TensorBoard has ended"
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def tags(address: str, plugin: str) -> list[str]:
    """Names of the curves or pictures that TensorBoard has found."""
    with urllib.request.urlopen(f"{address}data/plugin/{plugin}/tags", timeout=10) as answer:
        return sorted(name for run in json.load(answer).values() for name in run)


def look_at_board(run: Path, out: Path) -> list[str]:
    """Screenshots of curves and of pictures, and what TensorBoard does not have."""
    with tensorboard(run) as address:
        found = {plugin: tags(address, plugin) for plugin in ("scalars", "images")}
        for plugin, names in found.items():
            file = out / f"tensorboard_{plugin}.png"
            screenshot(f"{address}?darkMode=false#{plugin}", file, *SIZES["wide"])
            print(f"{file}: {len(names)} {plugin}: {', '.join(names)[:300]}")
    return [f"TensorBoard has no {plugin} of {run}" for plugin, names in found.items() if not names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=lambda page: Path(page).resolve(), metavar="PAGE.html")
    parser.add_argument("--tensorboard", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the screenshots")
    args = parser.parse_args()
    if chromium() is None:
        print("there is no Chromium here: apt-get install chromium", file=sys.stderr)
        return 77
    args.out.mkdir(parents=True, exist_ok=True)
    problems = [f"{page}: {one}" for page in args.pages for one in look(page, args.out)]
    problems += look_at_board(args.tensorboard, args.out) if args.tensorboard else []
    print("\n".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
