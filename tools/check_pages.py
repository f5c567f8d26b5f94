"""Check report pages in a headless Chromium with axe-core, light and dark, at the widths of a laptop and of a phone.

Prints one line per problem: an error on the console, a request that leaves the page, a page wider than its window, a
violation of an accessibility rule. Needs `pip install playwright`, a Chromium and axe-core's `axe.min.js` (npm pack
axe-core). `python tools/check_pages.py --browser chromium --axe axe.min.js out/*/report.html`
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
LOCAL = ("file:", "data:", "about:")

# axe cannot tell the contrast of text on a gradient; those of the pages only shade the edges of tables
FLAT = "* { background-image: none !important }"


def problems(page: Any, path: Path, axe: str, screenshot: Path | None) -> Iterator[str]:
    """Every problem of a file in a page of the browser; saves a screenshot of it."""
    messages: list[str] = []
    page.on("console", lambda message: messages.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: messages.append(f"script: {error}"))
    page.on(
        "request",
        lambda request: None if request.url.startswith(LOCAL) else messages.append(f"request: {request.url}"),
    )
    page.goto(path.resolve().as_uri())
    page.wait_for_load_state("networkidle")
    yield from messages
    room, width = page.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")
    if width > room:
        yield f"wider than the window: {width} pixels"
    if screenshot:
        page.screenshot(path=screenshot, full_page=True)
    page.add_style_tag(content=FLAT)
    page.evaluate(axe)
    for violation in page.evaluate("axe.run()")["violations"]:
        targets = [" ".join(map(str, node["target"])) for node in violation["nodes"]]
        more = f" and {len(targets) - 1} more" if len(targets) > 1 else ""
        yield f"{violation['id']} ({violation['impact']}): {violation['help']}: {targets[0]}{more}"


def main() -> int:
    """Check the pages of the command line; the number of problems decides the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE", help="HTML files")
    parser.add_argument("--browser", default=os.environ.get("CHROMIUM"), help="path of Chromium (or set CHROMIUM)")
    parser.add_argument("--axe", type=Path, default=os.environ.get("AXE"), help="path of axe.min.js (or set AXE)")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="save a picture of every page here")
    options = parser.parse_args()
    if not options.browser or not options.axe:
        parser.error("--browser and --axe are needed")
    from playwright.sync_api import sync_playwright

    axe = Path(options.axe).read_text(encoding="utf-8")
    count = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        for path in options.pages:
            for width in WIDTHS:
                for scheme in SCHEMES:
                    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
                    name = f"{path.resolve().parent.name}-{width}-{scheme}.png"
                    screenshot = options.screenshots / name if options.screenshots else None
                    for problem in problems(page, path, axe, screenshot):
                        print(f"{path} ({width}, {scheme}): {problem}")
                        count += 1
                    page.close()
        browser.close()
    print(f"{count} problems in {len(options.pages)} pages")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
