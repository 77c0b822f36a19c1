"""The page in a real browser: used by keyboard alone, read by a screen reader, and looked at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from support.browser import PROGRAM, Browser
from support.fake_executor import FakeSession, fake_session
from support.server import Running, drafting, serving
from support.text import decode, encode

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> FakeSession:
    made = drafting(fake_session(1, text_folder=tmp_path_factory.mktemp("text")))
    run = made.executor.run
    made.executor.run = lambda plan: (time.sleep(0.005), run(plan))[1]  # type: ignore[method-assign]
    return made


@pytest.fixture(scope="module")
def server(session: FakeSession) -> Iterator[Running]:
    with serving(session) as running:
        yield running


@pytest.fixture
def browser(server: Running, tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as made:
        made.call("Page.navigate", url=server.url)
        made.until("document.readyState === 'complete' && document.getElementById('model').textContent === 'tiny'")
        yield made


def test_a_chat_by_keyboard_alone(browser: Browser, session: FakeSession, tmp_path: Path) -> None:
    assert browser.evaluate("document.activeElement.id") == "text", "one can write at once"
    browser.evaluate("document.getElementById('limit').value = 40")
    browser.write("hello")
    browser.press("Enter")
    browser.until("document.querySelectorAll('.assistant .run').length > 3")
    browser.until("document.getElementById('chat').getAttribute('aria-busy') === 'false'")
    assert {("group", "You"), ("group", "Answer")} <= set(browser.nodes())
    answer = "".join(browser.evaluate("[...document.querySelectorAll('.assistant .run')].map(e => e.textContent)"))
    assert answer == decode(session.language.greedy(encode("user:hello;>"), 40))
    assert browser.evaluate("document.getElementById('facts').textContent").startswith("40 tokens")
    assert browser.evaluate("document.querySelectorAll('.assistant .more').length") > 0
    browser.screenshot(tmp_path / "chat.png")
    assert (tmp_path / "chat.png").stat().st_size > 5000
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing lies beside the page"
    assert browser.console == [], "the page's own policy forbids nothing that it does"


def test_a_long_answer_is_stopped_by_keyboard(browser: Browser, session: FakeSession) -> None:
    browser.write("a")
    browser.press("Enter")
    browser.until("!document.getElementById('stop').disabled")
    browser.press("Tab")
    while browser.evaluate("document.activeElement.id") != "stop":
        assert browser.evaluate("document.activeElement.tagName") != "BODY", "Stop can't be reached"
        browser.press("Tab")
    browser.press(" ")
    browser.until("document.getElementById('stop').disabled")
    end = time.monotonic() + 20
    while session.slots.free == 0:
        assert time.monotonic() < end, "the stopped request goes on"
    assert browser.evaluate("document.activeElement.id") == "text", "one can go on writing"


def test_everything_has_a_name_and_a_role(browser: Browser) -> None:
    browser.evaluate("document.querySelector('details').open = true")
    nodes = browser.nodes()
    names = {role: {name for found, name in nodes if found == role} for role, _ in nodes}
    assert {"Message", "API key"} <= names["textbox"] and {"Send", "Stop", "New chat"} <= names["button"]
    assert {"temperature", "new tokens"} <= names["spinbutton"] and names["log"] == {"Conversation"} and "main" in names
    interactive = ("button", "textbox", "spinbutton", "DisclosureTriangle", "checkbox", "combobox")
    assert all(name for role, name in nodes if role in interactive)
    assert browser.evaluate("document.documentElement.lang") == "en" and browser.evaluate("document.title")
    reached = []
    for _ in range(9):
        browser.press("Tab")
        reached.append(browser.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"send", "SUMMARY", "temperature", "limit", "key", "clear"} <= set(reached)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser: Browser, scheme: str) -> None:
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.evaluate("add('error', 'something went wrong')")
    colours = """(e => { const on = document.createElement('canvas').getContext('2d'); const of = c => { on.fillStyle = 'Canvas';
        on.fillStyle = c; on.fillRect(0, 0, 1, 1); return [...on.getImageData(0, 0, 1, 1).data].slice(0, 3) };
        return [of(getComputedStyle(e).color), of('light' === '%s' ? '#fff' : '#121212')] })(document.querySelector('%s'))"""
    for element in (".error", "#facts", "summary"):
        text, ground = browser.evaluate(colours % (scheme, element))
        assert contrast(text, ground) >= 4.5, f"{element} in {scheme}: {text} on {ground}"


def contrast(one: list[int], other: list[int]) -> float:
    """The contrast of two colours, 1 to 21."""

    def light(colour: list[int]) -> float:
        parts = [each / 255 for each in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
