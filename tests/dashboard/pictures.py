# SPDX-License-Identifier: GPL-2.0-or-later
"""Pictures of the dashboard: the page that draw.tsx draws in headless Chromium, and each of its panels."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from chromium import Chromium

WIDTH = 1600
DRAW_SECONDS = 60
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>msrtrace</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="draw.css">
<style>body {{ margin: 0 }}</style>
<body><div id="page"></div>
<script>
window.__grafana_public_path__ = "/public/"
const INPUT = {data}
</script>
<script src="draw.js"></script>
"""
_ELSEWHERE = {
    "/public/build/": "@grafana/ui/dist/public/",
    "/public/fonts/inter/Inter-Regular": "@fontsource/inter/files/inter-latin-400-normal",
    "/public/fonts/inter/Inter-Medium": "@fontsource/inter/files/inter-latin-500-normal",
    "/public/fonts/inter/Inter-Italic": "@fontsource/inter/files/inter-latin-400-italic",
    "/public/fonts/roboto/L0xTDF4xlVMF-BfR8bXMIhJHg45mwgGEFl0_3vrtSM1J-gEPT5Ese6hmHSh0mQ": (
        "@fontsource/roboto-mono/files/roboto-mono-latin-400-normal"
    ),
}


class _Files(SimpleHTTPRequestHandler):
    """Files, and Grafana's icons and fonts where its components look for them."""

    def translate_path(self, path: str) -> str:
        for theirs, ours in _ELSEWHERE.items():
            path = path.replace(theirs, f"/node_modules/{ours}")
        return super().translate_path(path)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def _served(directory: Path) -> Iterator[str]:
    """Serve a directory; yields its URL. Grafana's icons are fetched, which a page from a file may not do."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(directory))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def draw(data: dict[str, Any], built: Path, out: Path) -> list[str]:
    """Draw the data for draw.tsx with the built bundle, light and dark. Returns errors."""
    page = built / "page.html"
    page.write_text(_PAGE.format(data=json.dumps(data).replace("</", "<\\/")))
    out.mkdir(parents=True, exist_ok=True)
    complaints = []
    profile = built / "profile"
    profile.mkdir(exist_ok=True)
    with _served(built) as url, Chromium(profile) as browser:
        for theme in ("light", "dark"):
            browser.complaints = []
            _resize(browser, 1000)
            browser.send("Page.navigate", url=f"{url}/{page.name}?{theme}")
            height = _drawn(browser)
            _resize(browser, height)  # or tables below the first screen stay empty
            found = _panels(browser)
            complaints += [f"{theme}: {text}" for text in browser.complaints]
            complaints += [f"{theme}: {panel['id']} shows nothing" for panel in found if not panel["shows"]]
            (out / f"dashboard-{theme}.png").write_bytes(_shot(browser, 0, 0, WIDTH, height))
            for panel in found:
                box = (panel[side] for side in ("x", "y", "width", "height"))
                name = f"{int(panel['id'].removeprefix('panel-')):02}-{theme}.png"
                (out / name).write_bytes(_shot(browser, *box))
    return complaints


#: Where the panels are, and whether each has anything in it: a canvas with something drawn on it, or a text.
_SEEN = """[...document.querySelectorAll('.panel')].map((panel) => {
    const {x, y, width, height} = panel.getBoundingClientRect();
    const text = panel.innerText.replace(panel.querySelector('h2').innerText, '').trim();
    const canvas = panel.querySelector('.uplot canvas');
    const copy = Object.assign(document.createElement('canvas'), {width: 99, height: 99});
    const context = copy.getContext('2d', {willReadFrequently: true});
    if (canvas && canvas.width && canvas.height) context.drawImage(canvas, 0, 0, 99, 99);
    const drawn = context.getImageData(0, 0, 99, 99).data.some((value) => value);
    return {id: panel.id, x, y: y + scrollY, width, height, shows: canvas ? drawn : text.length > 0};
})"""


def _resize(browser: Chromium, height: int) -> None:
    size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.send("Emulation.setDeviceMetricsOverride", **size)


def _drawn(browser: Chromium) -> int:
    """The height of the page, once there is one."""
    deadline = time.monotonic() + DRAW_SECONDS
    while not (drawn := browser.value("document.body?.getAttribute('data-drawn')")):
        assert time.monotonic() < deadline, f"the page does not draw: {browser.complaints}"
        time.sleep(0.1)
    assert drawn == "yes", drawn
    return int(browser.value("document.getElementById('page').scrollHeight"))


def _panels(browser: Chromium) -> list[dict[str, Any]]:
    """The panels, once nothing changes any more and each shows something, or after a timeout."""
    seen: list[dict[str, Any]] = []
    for _ in range(20):
        time.sleep(0.5)
        before, seen = seen, browser.value(_SEEN)
        if seen == before and all(panel["shows"] for panel in seen):
            break
    return seen


def _shot(browser: Chromium, x: float, y: float, width: float, height: float) -> bytes:
    clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
    return base64.b64decode(browser.send("Page.captureScreenshot", clip=clip)["data"])
