"""Joining a league in a browser: the card and its words, the photos, the shop, and then the request to be a member.

    wizard = Wizard(Path("alder"), "en")
    app = build(wizard, port, token)

It is for who has no configuration yet, and asks what `hanse-client init` asks. What was typed is kept in memory until
the shop is set up, so that an error loses nothing. Everything is written at once, by `enrolment.enrol`. One person uses
it: two browser windows share what was typed.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hanse_client import templates
from hanse_client.catalog import is_clutter
from hanse_client.config import ClientConfig
from hanse_client.enrolment import Answers, enrol
from hanse_client.explanation import SUSPICION, posterior_bound, upward
from hanse_client.keys import MAX_PASSPHRASE_BYTES
from hanse_client.page_access import Gate, deed
from hanse_common import signing
from hanse_common.config import load
from hanse_common.credentials import load_node_key, node_point
from hanse_common.errors import ConfigError, HanseError
from hanse_common.files import PUBLIC, read_bounded, write_atomically
from hanse_common.fingerprint import words
from hanse_common.league_card import LeagueCard
from hanse_common.membership import Request as Membership
from hanse_common.membership import SignedRequest
from hanse_common.vision.taxonomy import LabelMap, Taxonomy
from hanse_common.web.languages import Languages
from hanse_common.web.pages import Language
from hanse_common.web.security import Guarded
from hanse_common.web.serving import HOST, static_routes
from hanse_common.wire import NAME

HOSTS = (HOST, "localhost")
MAX_CARD_BYTES = 256 * 1024
MAX_CARD_FORM_BYTES = 3 * MAX_CARD_BYTES
"""A byte may be written as three."""

MAX_FORM_BYTES = 32 * 1024
MAX_FILES = 200_000
"""Files that are counted at most; the daemon reads all."""

MAX_FOLDERS = 500
EXPLAINED = (0.5, 1.0, 3.0, 8.0)
"""The ε whose meaning is shown."""

MAX_EPSILON = 1000.0
MAX_ENTITY = 128

STEPS = ("/card", "/words", "/photos", "/shop", "/request")

Take = Callable[[Request, Mapping[str, str]], Response]

_PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Folder:
    """A folder of photos by its name, how many files in it look like photos, and whether its name is a class."""

    name: str
    photos: int
    known: bool


@dataclass
class Draft:
    """What was typed so far, as it was typed, and what is known by it."""

    card_text: str = ""
    card_path: str = ""
    card: LeagueCard | None = None
    compared: bool = False
    photos: str = ""
    looked: tuple[Folder, ...] | None = None
    name: str = ""
    entity: str = ""
    epsilon: str = "3"
    passphrase: str = ""
    settings: ClientConfig | None = None
    request: SignedRequest | None = None
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def step(self) -> str:
        """The first page whose questions are not answered yet."""
        if self.request is not None:
            return "/request"
        if self.card is None:
            return "/card"
        if not self.compared:
            return "/words"
        return "/photos" if self.looked is None else "/shop"

    def reached(self, path: str) -> bool:
        """Return whether the page at `path` may be shown: none ahead, and none but the last once that is there."""
        turn = self.step
        return path == turn or (turn != STEPS[-1] and STEPS.index(path) < STEPS.index(turn))


class Wizard:
    """The pages by which a shop is set up in the new folder `folder`.

    `done` is set when its user says so; `idle` is for how many seconds nobody has asked for anything.
    """

    def __init__(self, folder: Path, language: Language) -> None:
        self.done = threading.Event()
        self.languages = Languages(templates.FOLDER, language)
        self._folder = folder
        self._draft = Draft()
        self._lock = threading.Lock()
        self._asked = time.monotonic()

    @property
    def idle(self) -> float:
        """Seconds since the last request."""
        return time.monotonic() - self._asked

    def app(self) -> ASGIApp:
        """Return the application, without what keeps strangers out."""
        steps = (
            ("/card", self._take_card, MAX_CARD_FORM_BYTES),
            ("/words", self._take_words, MAX_FORM_BYTES),
            ("/photos", self._take_photos, MAX_FORM_BYTES),
            ("/shop", self._take_shop, MAX_FORM_BYTES),
        )
        pages = Starlette(
            routes=[
                Route("/", lambda request: RedirectResponse(self._draft.step, 303)),
                *(Route(path, self._show) for path, *_ in steps),
                *(
                    Route(path, deed(self._in_turn(take), most), methods=["POST"])
                    for path, take, most in steps
                ),
                Route("/request", self._show),
                Route("/finish", deed(self._finish, MAX_FORM_BYTES), methods=["POST"]),
                Route(
                    "/language",
                    deed(lambda request, fields: self.languages.chosen(fields), MAX_FORM_BYTES),
                    methods=["POST"],
                ),
                *static_routes(),
            ],
            exception_handlers={
                HTTPException: lambda request, error: self._failed(request, error.status_code)
            },
        )

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self._asked = time.monotonic()
            await pages(scope, receive, send)

        return app

    def _page(self, request: Request, path: str, status: int = 200) -> HTMLResponse:
        draft, pages = self._draft, self.languages.of(request)
        values: dict[str, Any] = {
            "draft": draft,
            "errors": draft.errors,
            "folder": str(self._folder.absolute()),
        }
        if path == "/card":
            values["most"] = MAX_CARD_BYTES
        elif path == "/words":
            values["words"] = (draft.card.words("zh"), draft.card.words()) if draft.card else ("", "")
        elif path == "/shop":
            values["meanings"] = [(f"{each:g}", bound(each)) for each in EXPLAINED]
        elif path == "/request" and draft.request is not None:
            digest = draft.request.request.digest
            values |= {"words": (words(digest, "zh"), words(digest)), "lines": draft.request.to_text()}
        page = pages.render(
            f"wizard-{path[1:]}.html", served=True, key=request.state.key, here=path, **values
        )
        return HTMLResponse(page, status)

    def _failed(self, request: Request, status: int) -> Response:
        page = self.languages.of(request).render(
            "wizard-error.html", served=True, key=request.state.key, here="/", code_shown=status
        )
        return HTMLResponse(page, status)

    def _show(self, request: Request) -> Response:
        """Show a page whose turn it is, or one before it; else the one whose turn it is."""
        path = request.url.path
        return self._page(request, path) if self._draft.reached(path) else RedirectResponse("/", 303)

    def _in_turn(self, take: Take) -> Take:
        """Return `take` for one form at a time, and none ahead of its turn."""

        def taken(request: Request, fields: Mapping[str, str]) -> Response:
            with self._lock:
                if not self._draft.reached(request.url.path):
                    return RedirectResponse("/", 303)
                return take(request, fields)

        return taken

    def _taken(self, request: Request, errors: dict[str, str]) -> Response:
        """Go on when there is no error; else show the page again, with what is wrong."""
        self._draft.errors = errors
        if errors:
            return self._page(request, request.url.path, 422)
        return RedirectResponse("/", 303)

    # The steps. Each keeps what was typed, then judges it.

    def _take_card(self, request: Request, fields: Mapping[str, str]) -> Response:
        draft = self._draft
        draft.card_text, draft.card_path = fields.get("text", ""), fields.get("path", "").strip()
        draft.card, draft.compared = None, False
        try:
            draft.card = read_card(draft.card_text, draft.card_path)
        except ConfigError as error:
            return self._taken(request, {"card": str(error)})
        return self._taken(request, {})

    def _take_words(self, request: Request, fields: Mapping[str, str]) -> Response:
        self._draft.compared = fields.get("same") == "yes"
        return self._taken(request, {} if self._draft.compared else {"same": "missing"})

    def _take_photos(self, request: Request, fields: Mapping[str, str]) -> Response:
        draft = self._draft
        draft.photos, draft.looked = fields.get("photos", "").strip(), None
        path = typed_path(draft.photos)
        try:
            if draft.card is None or path is None or not path.exists():
                return self._taken(request, {"photos": "missing"})
            draft.looked = look(path, draft.card.taxonomy)
        except OSError:
            return self._taken(request, {"photos": "unreadable"})
        if path.is_dir() and not any(each.photos for each in draft.looked):
            draft.looked = None
            return self._taken(request, {"photos": "empty"})
        return self._taken(request, {})

    def _take_shop(self, request: Request, fields: Mapping[str, str]) -> Response:
        draft, errors = self._draft, {}
        draft.name, draft.entity = fields.get("name", "").strip(), fields.get("entity", "").strip()
        draft.epsilon = fields.get("epsilon", "").strip()
        if not NAME.fullmatch(draft.name):
            errors["name"] = "form"
        if not (0 < len(draft.entity) <= MAX_ENTITY and draft.entity.isprintable()):
            errors["entity"] = "form"
        epsilon = number(draft.epsilon)
        if epsilon is None or not 0 < epsilon <= MAX_EPSILON:
            errors["epsilon"] = "form"
        first, second = fields.get("passphrase", ""), fields.get("again", "")
        if first or second:
            errors |= judge_passphrase(first, second)
            draft.passphrase = "" if "passphrase" in errors else first
        if fields.get("open") == "yes":
            draft.passphrase = ""
        if errors or epsilon is None or draft.card is None:
            return self._taken(request, errors)
        answers = Answers(
            Path(draft.photos).expanduser(),
            draft.name,
            draft.entity,
            epsilon,
            draft.passphrase.encode(),
            self.languages.of(request).language,
        )
        try:
            if draft.settings is None:
                draft.settings = enrol(draft.card, answers, self._folder)
            asked = ask_in(draft.settings, answers.passphrase)
            path = self._folder / f"{asked.request.name}.request"
            write_atomically(path, asked.to_text().encode(), PUBLIC)
            draft.request = asked
        except HanseError as error:
            return self._taken(request, {"writing": str(error)})
        except OSError as error:
            return self._taken(request, {"writing": f"{self._folder}: {error.strerror}"})
        draft.passphrase = ""
        return self._taken(request, {})

    def _finish(self, request: Request, fields: Mapping[str, str]) -> Response:
        if self._draft.request is None:
            return RedirectResponse("/", 303)
        page = self.languages.of(request).render("wizard-finished.html", served=True)
        self.done.set()
        return HTMLResponse(page)


def read_card(text: str, path: str) -> LeagueCard:
    """Return the card in `text`, or without one in the file `path`. Raises `ConfigError`."""
    if not text.strip():
        if not path:
            raise ConfigError("league.yaml: missing; expected the card's text, or where its file is.")
        file = typed_path(path)
        if file is None:
            raise ConfigError(f"{path}: no such file.")
        text = read_bounded(file, MAX_CARD_BYTES, "the league's card", ConfigError).decode("utf-8", "replace")
    if len(text.encode("utf-8", "replace")) > MAX_CARD_BYTES:
        raise ConfigError(f"league.yaml: found more than {MAX_CARD_BYTES} bytes, expected the league's card.")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "league.yaml"
        copy.write_text(text, encoding="utf-8", errors="replace")
        try:
            return load(LeagueCard, copy)
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"{folder}{os.sep}", "")) from None


def typed_path(text: str) -> Path | None:
    """Return the path that somebody typed; None for what can be none."""
    if not text or "\0" in text:
        return None
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return None


def look(photos: Path, taxonomy: Taxonomy) -> tuple[Folder, ...]:
    """Return the folders in `photos` that are labels in a catalog, and how many photos there seem to be in each.

    Names alone are looked at. None for a file. Raises `OSError` when the folder can't be listed.
    """
    if not photos.is_dir():
        return ()
    labels = LabelMap(taxonomy)
    names = sorted(each.name for each in photos.iterdir() if each.is_dir() and not is_clutter(each.name))
    found, left = [], MAX_FILES
    for name in names[:MAX_FOLDERS]:
        count = 0
        for _, folders, files in os.walk(photos / name):
            folders[:] = [each for each in folders if not is_clutter(each)]
            count += sum(each.lower().endswith(_PHOTOS) and not is_clutter(each) for each in files[:left])
            left -= min(left, len(files))
            if not left:
                break
        found.append(Folder(name, count, labels.encode(name) is not None))
    return tuple(found)


def number(text: str) -> float | None:
    """Return the number that somebody typed, with a point or a comma; None for none."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None


def judge_passphrase(first: str, second: str) -> dict[str, str]:
    """Return what is wrong with a passphrase that was typed twice."""
    if first != second:
        return {"passphrase": "differ"}
    # From a file it is read without the spaces around it.
    if first != first.strip() or len(first.encode()) > MAX_PASSPHRASE_BYTES:
        return {"passphrase": "form"}
    return {}


def bound(epsilon: float) -> str:
    """Return the percentage that a suspicion of 1 % can become."""
    return upward(100 * posterior_bound(epsilon, SUSPICION), 2)


def ask_in(settings: ClientConfig, passphrase: bytes) -> SignedRequest:
    """Return the request to be a member, signed with the new keys. Raises `ConfigError`."""
    if settings.member is None:
        raise ConfigError("member: missing; expected a section with your shop's name and entity.")
    identity = signing.load_key(settings.identity_path, lambda path: passphrase)
    node = load_node_key(settings.node_key_path, lambda path: passphrase)
    asked = Membership(
        charter=bytes.fromhex(settings.league.charter),
        name=settings.member.name,
        entity=settings.member.entity,
        identity=signing.public_bytes(identity),
        node_key=node_point(node.public_key()),
    )
    return SignedRequest.make(asked, identity)


def build(wizard: Wizard, port: int, token: str) -> ASGIApp:
    """Return the wizard's pages for those who have `token`, with all that guards them."""
    gate = Gate(wizard.app(), f"hanse-{port}", lambda: token, wizard.languages, "hanse-client wizard")
    return Guarded(gate, HOSTS)
