"""Takes the pictures of docs/status-page.md: python -m tests.e2e.status_screenshots URL DIR"""

import sys
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tests.e2e.test_status_page import CHROMIUM, DESKTOP, PHONE, opened

_QUESTIONS = ("Why is the sky blue? Answer in two sentences.", "And why is it red in the evening?")
_BACKGROUND = """async (model) => {
  for (let round = 0; round < 30; round++) {
    const tier = ["voice", "copilot", "agent", "default", "batch"][round % 5];
    const body = {model, prompt: `${round}: Once upon a time`, max_tokens: 24, service_tier: tier};
    await fetch("v1/completions", {method: "POST", headers: {"Content-Type": "application/json"},
                                   body: JSON.stringify(body)});
  }
}"""


def picture(page: Page, path: Path, *, full_page: bool) -> None:
    page.screenshot(path=path, full_page=full_page)
    # Few colours are in it: a palette is a third of the size.
    Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    url, directory = sys.argv[1].rstrip("/"), Path(sys.argv[2])
    directory.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, size, scheme in (("status-desktop", DESKTOP, "light"), ("status-phone", PHONE, "dark")):
            with opened(browser, url, color_scheme=scheme, **size) as page:
                page.evaluate(_BACKGROUND, page.locator("#what").inner_text().split(" · ")[0])
                for question in _QUESTIONS[: 2 if size is DESKTOP else 1]:
                    page.get_by_label("Message").fill(question)
                    page.get_by_label("Message").press("Enter")
                    page.get_by_role("button", name="Send").wait_for(timeout=60_000)
                page.locator("h1").click()  # no focus ring in the picture
                time.sleep(2.5)
                picture(page, directory / f"{name}.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
