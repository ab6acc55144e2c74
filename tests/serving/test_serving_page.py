"""The page at /, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import PROGRAM, Browser
from conftest import Application, held_out
from gateways import gateway, serve
from running import Running

import moeshard
from moeshard import Plan
from moeshard.serving.auth import Keys
from moeshard.serving.settings import Settings

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs chromium")


def say(browser: Browser, text: str) -> None:
    n = browser.run("document.querySelectorAll('.assistant').length")
    browser.run(f"document.getElementById('prompt').value = {text!r}; document.getElementById('send').click()")
    done = f"document.querySelectorAll('.assistant').length > {n} && !document.getElementById('send').disabled"
    browser.wait(done)


def test_a_gateway_has_the_page_too(model: moeshard.Model, plan: Plan, tmp_path: Path) -> None:
    full = serve(model, plan)
    running, _ = gateway(plan, dict.fromkeys(("de", "en", "py"), full.url), full.url)
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(running.url)
        rows = "[...document.querySelectorAll('#nodes tr')].map((row) => row.cells[0].textContent)"
        browser.wait(f"{rows}.length === 4")
        browser.run("document.getElementById('max').value = 20")
        say(browser, held_out("de").replace("\n", " "))
        assert browser.run("document.querySelector('.why').textContent").startswith("de placed · fit 0.")
        full.stop()
        browser.wait(f"{rows}.every((name) => name.endsWith('(down)'))")
        say(browser, "Und?")
        assert "cannot" in browser.run("document.querySelector('.error').textContent") and browser.errors == []
        browser.screenshot(tmp_path / "page.png")
    finally:
        browser.close()
        running.stop()
        full.stop()


def test_a_chat_on_the_page(application: Application, tmp_path: Path) -> None:
    running = Running(lambda: application(settings=Settings(keys=Keys(["secret"])))[0])
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(running.url)
        browser.wait("document.getElementById('state').textContent.includes('API key')")
        browser.run("const key = document.getElementById('key'); key.value = 'secret';"
                    "key.dispatchEvent(new Event('change'))")  # fmt: skip
        rows = "[...document.querySelectorAll('#nodes tr')].map((row) => row.cells[0].textContent)"
        browser.wait(f"{rows}.length === 4")
        assert browser.run(rows) == ["full", "de", "en", "py"]
        assert browser.run("document.getElementById('model').options.length") == 5
        browser.run("document.getElementById('max').value = 20")
        say(browser, held_out("de").replace("\n", " "))
        assert browser.run("document.querySelector('.assistant .text').textContent.length") > 10
        why = browser.run("document.querySelector('.why').textContent")
        assert why.startswith("de placed · fit 0.") and "predicts the prompt best" in why
        # What is asked again belongs to the same session; by force it goes elsewhere.
        say(browser, "Und?")
        browser.run("document.getElementById('model').value = 'tinymoe@full'")
        say(browser, "<img src=x onerror=\"document.title='run'\">")
        nodes = browser.run("[...document.querySelectorAll('.why b')].map((node) => node.textContent)")
        assert nodes == ["de", "de", "full"]
        assert browser.run("document.querySelectorAll('#chat img').length") == 0
        assert browser.run("document.querySelectorAll('.error').length") == 0 and browser.errors == []
        # No text that could get into the page runs there.
        browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
        assert browser.run("document.title") == "moeshard"
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        browser.run("document.getElementById('new').click()")
        assert browser.run("document.querySelectorAll('.turn').length") == 0
    finally:
        browser.close()
        running.stop()
