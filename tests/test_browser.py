"""Pages of reports as Chromium shows them. Without these a picture inside a page could be missing, a table could push
the page off a small screen, or the name of a run could run as a program, and no test of the text would tell."""

from __future__ import annotations

from pathlib import Path

import browser
import pytest
from PIL import Image
from test_report import STRANGE, command, gan

pytestmark = pytest.mark.skipif(browser.chromium() is None, reason="there is no Chromium: apt-get install chromium")


def test_a_page_of_strange_names_is_whole_on_both_screens_and_runs_nothing(tmp_path: Path) -> None:
    canary = "<script>var pwned = 1</script><img src=x onerror='pwned = 1'>".replace("/", "")
    runs = [gan(tmp_path / name, [3.0, 2.0]) for name in (STRANGE, canary)]
    page = tmp_path / "report.html"
    command("report", *runs, "--out", page)
    assert browser.look(page, tmp_path) == []
    found = browser.seen(page, *browser.SIZES["small"])
    assert (found["images"], found["tables"]) == (1, 1)
    for name, (width, _) in browser.SIZES.items():
        assert Image.open(tmp_path / f"report_{name}.png").width == width


def test_what_is_broken_in_a_page_is_told(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><p style="width: 2000px">wide</p><img src="absent.png" alt="curves">'
        '<a href="#nowhere">a</a><a href="absent.csv">b</a><a href="bad.html">c</a><script>var pwned = 1</script>'
    )
    told = browser.broken(page, browser.seen(page, *browser.SIZES["small"]))
    assert told[:3] == ["picture curves does not load", "link #nowhere leads nowhere", "link absent.csv leads nowhere"]
    assert told[3].endswith("px wider than the screen") and told[4:] == ["text of it was run as a program"]
