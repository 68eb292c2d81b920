"""Those who come to the operator's page: a browser of few words, and a person at a real one."""

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

TOKEN = "a-long-token-of-43-characters-for-this-test"  # noqa: S105
ORIGIN = "http://127.0.0.1:9094"
FORM = {"Sec-Fetch-Site": "same-origin"}
SCREENSHOTS = os.environ.get("HANSE_SCREENSHOTS")
"""A folder to put pictures of the pages into, for people to look at."""

CHROMIUM = Path("/usr/bin/chromium")


class Visitor:
    """A browser of few words, at `address`."""

    def __init__(self, app: ASGIApp, address: str = "127.0.0.1") -> None:
        self._app = app
        self._address = address
        self.cookies = httpx.Cookies()

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, client=(self._address, 1))
            async with httpx.AsyncClient(
                transport=transport, base_url=ORIGIN, cookies=self.cookies
            ) as client:
                answer = await client.request(method, path, **options)
                self.cookies = client.cookies
                return answer

        return asyncio.run(ask())

    def get(self, path: str = "/", **options: Any) -> httpx.Response:
        return self.ask("GET", path, **options)

    def log_in(self, token: str = TOKEN, **headers: str) -> httpx.Response:
        return self.ask("POST", "/login", data={"token": token}, headers=FORM | headers)

    def bearer(self, token: str = TOKEN, path: str = "/metrics") -> httpx.Response:
        return self.get(path, headers={"Authorization": f"Bearer {token}"})


FAULTS = """() => {
  const found = [];
  const text = element => (element.textContent || "").trim();
  const all = selector => [...document.querySelectorAll(selector)];
  if (!/^(en|zh-Hans)$/.test(document.documentElement.lang)) found.push("no language");
  if (!document.title.trim()) found.push("no title");
  if (all("main").length !== 1) found.push("not one main");
  if (all("h1").length !== 1) found.push("not one h1");
  let level = 0;
  for (const heading of all("h1, h2, h3, h4")) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) found.push(`heading ${text(heading)}: h${next} after h${level}`);
    level = next;
  }
  for (const field of all("input:not([type=hidden]), select, textarea")) {
    if (!field.labels.length || !text(field.labels[0])) found.push(`no label: ${field.outerHTML}`);
  }
  for (const control of all("a, button, summary")) if (!text(control)) found.push(`no name: ${control.outerHTML}`);
  const names = all("main form:not(.questions) button").map(text);
  if (new Set(names).size !== names.length) found.push(`buttons of one name: ${names}`);
  for (const image of all("svg:not([aria-hidden])")) {
    if (!image.getAttribute("aria-label")) found.push(`no name: ${image.outerHTML}`);
  }
  for (const table of all("table")) if (!table.querySelector("th[scope=col]")) found.push("table without headers");
  for (const nav of all("nav")) if (!nav.getAttribute("aria-label")) found.push("nav without a name");
  const ids = all("[id]").map(element => element.id);
  if (new Set(ids).size !== ids.length) found.push(`an id twice: ${ids}`);
  for (const element of all("[aria-describedby], [aria-labelledby]")) {
    const wanted = `${element.getAttribute("aria-describedby") ?? ""} ${element.getAttribute("aria-labelledby") ?? ""}`;
    for (const id of wanted.trim().split(/ +/)) if (!document.getElementById(id)) found.push(`no element ${id}`);
  }
  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) found.push(`wider than the window: ${width}`);
  return found;
}"""

CONTRASTS = """() => {
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const found = [];
  for (const element of document.querySelectorAll("body *:not(noscript)")) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    let behind = element;
    while (behind && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const pair = [getComputedStyle(element).color, getComputedStyle(behind ?? document.body).backgroundColor];
    const [dark, light] = pair.map(c => luminance(numbers(c))).sort((a, b) => a - b);
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < 4.5) found.push([element.outerHTML.slice(0, 80), contrast]);
  }
  return found;
}"""


class Person:
    """Somebody at a browser, who notes what it complains of and whatever it asks elsewhere."""

    def __init__(self, browser: Any, origin: str, **options: Any) -> None:
        self.origin = origin
        self.context = browser.new_context(**({"viewport": {"width": 1000, "height": 800}} | options))
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._watch(request.url))
        self.page.on("requestfailed", self._failed)

    def _watch(self, url: str) -> None:
        if not url.startswith((f"{self.origin}/", "data:")):
            self.complaints.append(f"asked elsewhere: {url}")

    def _failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # by leaving the page
            self.complaints.append(f"failed: {request.url}")

    def log_in(self) -> None:
        self.page.goto(f"{self.origin}/")
        self.page.get_by_label("Admin token").fill(TOKEN)
        self.press("Log in")
        self.page.wait_for_url(f"{self.origin}/")

    def look(self, name: str) -> None:
        """Check the page that is open, and keep a picture of it when somebody wants one."""
        assert self.page.evaluate(FAULTS) == []
        assert self.page.evaluate(CONTRASTS) == []
        if SCREENSHOTS:
            self.page.screenshot(path=f"{SCREENSHOTS}/operator-{name}.png", full_page=True)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name).click()
        self.page.wait_for_load_state()

    def follow(self, name: str) -> None:
        self.page.get_by_role("link", name=name, exact=True).first.click()
        self.page.wait_for_load_state()

    def text(self) -> str:
        found: str = self.page.inner_text("body")
        return found
