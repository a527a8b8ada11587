"""Look at pages in a real browser, headless Chromium: screenshots, wide and on a small screen, and what is broken.

    python tests/browser.py --out FOLDER PAGE.html [...]        pages of `sdtrain report`
    python tests/browser.py --out FOLDER --tensorboard RUN      what TensorBoard shows of a run, and of its pictures

A page is broken where a picture does not load, a link leads nowhere, it is wider than the screen, or text of it was run
as a program. Exits 1 for a broken page, 77 where there is no Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import argparse
import html
import json
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


def browse(*words: str) -> str:
    """What Chromium prints; it has a profile of its own, and no network but this machine."""
    program = chromium()
    assert program, "there is no Chromium"
    with tempfile.TemporaryDirectory() as profile:
        plain = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        outside = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
        done = subprocess.run([program, *plain, outside, *words], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE.html")
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
