"""The status page and its chat box in headless Chromium, before a live cluster of two replicas."""

import asyncio
import contextlib
import os
import re
import shutil
import threading

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from deploy.ray_environment import free_port
from monitoring import Recorder
from serving.app import create_app
from serving.settings import ServingSettings
from serving.state import ReplicaState
from tests.e2e.conftest import MODEL
from tests.timed_engine import Speed, TimedEngine

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.model,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
DESKTOP = {"viewport": {"width": 1360, "height": 900}}
SIZES = pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
ANSWER_MS = 60_000
# Keeps how long the first answer was after each change: a test that looks may come when it is whole.
WATCH_ANSWER = """() => {
  window.lengths = new Set();
  const look = () => {
    const answer = document.querySelectorAll("#log p:not(.who)")[1];
    if (answer?.textContent) window.lengths.add(answer.textContent.length);
  };
  const changes = { subtree: true, childList: true, characterData: true };
  new MutationObserver(look).observe(document.getElementById("log"), changes);
}"""

# The lowest contrast of any text with what is behind it, and which text that is (WCAG 2.2, 1.4.3).
LOWEST_CONTRAST = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
  };
  let lowest = [21, ""];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility()) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < lowest[0]) lowest = [ratio, e.textContent.trim()];
  }
  return lowest;
}"""


@pytest.fixture(scope="module")
def browser():
    # Chromium's sandbox does not start for root, which containers of tests often are.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Browser, url: str, **options):
    """The page, live. Whatever the console says, an exception or a request to elsewhere fails the test."""
    context = browser.new_context(**options)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(f"{url}/") or wrong.append(request.url))
    try:
        page.goto(f"{url}/")
        expect(page.locator("#live-text")).to_have_text("live")
        yield page
        assert wrong == []
    finally:
        context.close()


def ask(page: Page, text: str, max_tokens: int) -> None:
    page.get_by_text("Options").click()
    page.get_by_label("Most tokens").fill(str(max_tokens))
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


@SIZES
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_shows_what_runs_and_fits(browser, cluster, size, scheme):
    with opened(browser, cluster, color_scheme=scheme, **size) as page:
        expect(page.locator("#what")).to_contain_text(MODEL)
        expect(page.locator("#what")).to_contain_text("bits a weight")
        expect(page.locator("#what")).to_contain_text("KV cache")
        expect(page.locator("#version")).to_contain_text("Peregrine")
        expect(page.locator("#replicas tr")).to_have_count(2, timeout=15_000)
        expect(page.locator("#replicas tr", has_text="ready")).to_have_count(2)
        expect(page.locator("#tiers tr")).to_have_count(5)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        overflowing = (
            "[...document.querySelectorAll('section')].filter(s => s.scrollWidth > s.clientWidth).length"
        )
        assert page.evaluate(overflowing) == 0
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(ground.split("(")[1].split(",")[0]) < 64) == (scheme == "dark")
        ratio, text = page.evaluate(LOWEST_CONTRAST)
        assert ratio >= 4.5, text


def test_figures_change_after_requests(browser, cluster):
    with opened(browser, cluster, **DESKTOP) as page:
        known = set(page.locator("#recent td:nth-child(2)").all_inner_texts())
        kept = "#tiers tr:has(td:text-is('agent')) td:nth-child(4)"
        before = int(page.locator(kept).inner_text())
        body = {
            "model": MODEL,
            "prompt": "The capital of France is",
            "max_tokens": 8,
            "service_tier": "agent",
        }
        for number in range(6):
            answer = httpx.post(
                f"{cluster}/v1/completions", json=body, headers={"x-request-id": f"look-{number}"}, timeout=60
            )
            assert answer.status_code == 200
        for number in range(6):
            expect(page.locator(f"#recent td[title=look-{number}]")).to_have_count(1)
        assert f"look-{number}" not in known
        late = int(page.locator(kept.replace("4)", "5)")).inner_text())
        assert int(page.locator(kept).inner_text()) + late >= before + 6
        for figure in ("#ttft-p50", "#ttft-p99", "#itl-p50", "#tokens-per-s"):
            expect(page.locator(figure)).to_have_text(re.compile(r"^[\d.,]+$"))
        assert float(page.locator("#tokens-per-s").inner_text().replace(",", "")) > 0


@SIZES
def test_the_chat_streams_an_answer_and_remembers(browser, cluster, size):
    with opened(browser, cluster, **size) as page:
        page.evaluate(WATCH_ANSWER)
        ask(page, "Tell me a long story about a river.", 1000)
        expect(page.locator("#log p:not(.who)").nth(1)).not_to_be_empty(timeout=ANSWER_MS)
        expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=ANSWER_MS)
        assert page.evaluate("window.lengths.size") > 3
        speed = page.locator("#speed")
        expect(speed).to_have_text(re.compile(r"^first token [\d.,]+ ms · [\d.,]+ tokens/s · \d+ tokens$"))
        tokens = int(speed.inner_text().split()[-2])
        assert 2 <= tokens <= 1000
        with page.expect_request("**/v1/chat/completions") as sent:
            page.get_by_label("Message").fill("And now?")
            page.get_by_role("button", name="Send").click()
        roles = [m["role"] for m in sent.value.post_data_json["messages"]]
        assert roles == ["user", "assistant", "user"]
        expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=ANSWER_MS)
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("#log p")).to_have_count(0)


def test_stop_ends_the_answer_on_the_server_too(browser, cluster):
    with opened(browser, cluster, **DESKTOP) as page:
        ask(page, "Tell me a very long story about a river.", 4000)
        answer = page.locator("#log p:not(.who)").nth(1)
        expect(answer).not_to_be_empty(timeout=ANSWER_MS)
        expect(page.locator("#running")).not_to_have_text("0")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=2_000)
        expect(page.locator("#speed")).to_contain_text("stopped")
        expect(page.locator("#running")).to_have_text("0", timeout=10_000)
        latest = page.locator("#recent tr").first
        expect(latest).to_contain_text("aborted")
        # The answer so far is kept.
        length = len(answer.inner_text())
        assert length > 0
        page.wait_for_timeout(300)
        assert len(answer.inner_text()) == length


def test_by_keyboard_alone_and_every_control_has_a_name(browser, cluster):
    with opened(browser, cluster, **DESKTOP) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the chat"
        page.keyboard.press("Enter")
        seen = []
        for _ in range(4):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert seen == ["log", "prompt", "send", "SUMMARY"]
        page.keyboard.press("Enter")
        controls = {
            "Message": "textbox",
            "Tier": "combobox",
            "Most tokens": "spinbutton",
            "Temperature": "spinbutton",
        }
        for name, role in controls.items():
            expect(page.get_by_role(role, name=name, exact=True)).to_be_visible()
        expect(page.get_by_role("log", name="Conversation")).to_be_visible()
        unnamed = "[...document.querySelectorAll('button')].filter(b => !b.textContent.trim()).length"
        assert page.evaluate(unnamed) == 0


def test_a_server_that_went_is_said_and_found_again(browser, cluster):
    with opened(browser, cluster, **DESKTOP) as page:
        page.route("**/status.json", lambda route: route.fulfill(status=200, body="not JSON"))
        expect(page.locator("#live-text")).to_contain_text("no answer since", timeout=10_000)
        page.unroute("**/status.json")
        expect(page.locator("#live-text")).to_have_text("live", timeout=10_000)


@pytest.fixture(scope="module")
def keyed():
    """A server that wants a key, on the engine double."""
    port, started, stop = free_port(), threading.Event(), threading.Event()

    async def serve() -> None:
        engine = TimedEngine("double", Speed(0.002, 0.0, 1e-5))
        state = ReplicaState(ServingSettings(api_keys=("open",)), Recorder(), replica="r0")
        state.ready(engine)
        server = uvicorn.Server(
            uvicorn.Config(create_app(state), host="127.0.0.1", port=port, log_level="error")
        )
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110  # uvicorn has no event for it
            await asyncio.sleep(0.05)
        started.set()
        await asyncio.to_thread(stop.wait)
        server.should_exit = True
        await task
        await engine.shutdown()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(60)
    yield f"http://127.0.0.1:{port}"
    stop.set()
    thread.join(30)


def test_a_key_is_asked_for_and_errors_are_shown_in_words(browser, keyed):
    context = browser.new_context(**PHONE)
    page = context.new_page()
    page.goto(f"{keyed}/")
    key = page.get_by_label("API key")
    expect(key).to_be_visible()
    assert key.get_attribute("type") == "password"
    key.fill("wrong")
    ask(page, "Hello", 4)
    expect(page.locator("#log .error")).to_have_text("Incorrect API key provided.")
    expect(page.get_by_label("Message")).to_have_value("Hello")  # not lost
    key.fill("open")
    page.get_by_label("Message").press("Enter")
    expect(page.locator("#log p:not(.who):not(.error)").last).to_have_text("word word word word")
    # In this tab's memory, nowhere else.
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    context.close()
