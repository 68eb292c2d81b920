"""Joining by the wizard's pages, as a browser sends them, against what `hanse-client init` and `join` would write."""

import functools
import html
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hanse_client import keys
from hanse_client import wizard as wizards
from hanse_client.config import ClientConfig
from hanse_client.explanation import posterior_bound
from hanse_client.keys import PASSPHRASE_FILE, load_identity, load_node
from hanse_client.page_access import entrance, new_token
from hanse_client.wizard import MAX_CARD_BYTES, MAX_FORM_BYTES, Folder, Wizard, bound, build, look, number
from hanse_common import signing
from hanse_common.config import load
from hanse_common.credentials import node_point
from hanse_common.errors import ConfigError
from hanse_common.fingerprint import words
from hanse_common.league_card import LeagueCard
from hanse_common.membership import SignedRequest
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.web.languages import Languages
from hanse_common.web.serving import listen, serving
from hanse_server.development_keys import DevelopmentKeys

MARKUP = "<script>alert(1)</script>"
SHOP = {"name": "alder", "entity": "Alder & Söhne <Ltd>", "epsilon": "3"}


class Visitor:
    """Somebody at the wizard, without a browser: fills forms in, follows where they lead."""

    def __init__(self, address: str) -> None:
        origin = address.partition("/?")[0]
        self.client = httpx.Client(
            base_url=origin, follow_redirects=True, headers={"Sec-Fetch-Site": "same-origin"}
        )
        assert self.client.get(address).status_code == 200

    def get(self, path: str = "/") -> httpx.Response:
        return self.client.get(path)

    def post(self, path: str, /, **fields: str) -> httpx.Response:
        found = re.search(r'name="key" value="([^"]+)"', self.get().text)
        assert found
        return self.client.post(path, data={"key": found[1]} | fields)

    def where(self) -> str:
        return self.get().url.path


_LANGUAGES = functools.cache(Languages)


@pytest.fixture(autouse=True)
def templates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wizards, "Languages", _LANGUAGES)


@pytest.fixture
def card(keys: DevelopmentKeys) -> LeagueCard:
    return LeagueCard(
        league="test",
        charter="ab" * 32,
        operator_key="12" * 32,
        server="localhost:9092",
        authority=keys.authority.read_text(),
        taxonomy=Taxonomy(classes=("shirt", "shoe", "bag")),
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name, count in (("Shirt", 3), ("Schuhe", 2), (".hidden", 9), ("empty", 0)):
        (folder / name / "deeper").mkdir(parents=True)
        for index in range(count):
            (folder / name / ("deeper" if index else "") / f"{index}.JPG").write_bytes(b"")
        (folder / name / "notes.txt").write_bytes(b"")
    return folder


@pytest.fixture
def wizard(tmp_path: Path) -> Wizard:
    return Wizard(tmp_path / "alder", "en")


@pytest.fixture
def visit(wizard: Wizard) -> Iterator[Visitor]:
    token = new_token()
    with listen(0) as listening:
        port = listening.getsockname()[1]
        with serving(build(wizard, port, token), listening):
            visitor = Visitor(entrance(port, token))
            yield visitor
            visitor.client.close()


Through = Callable[..., httpx.Response]


def twice(passphrase: str) -> dict[str, str]:
    return {"passphrase": passphrase, "again": passphrase}


@pytest.fixture
def through(visit: Visitor, card: LeagueCard, photos: Path) -> Through:
    """Return a function that goes as far as the page `to`."""

    def go(to: str) -> httpx.Response:
        steps: tuple[tuple[str, dict[str, str]], ...] = (
            ("/card", {"text": card.to_yaml()}),
            ("/words", {"same": "yes"}),
            ("/photos", {"photos": str(photos)}),
            ("/shop", SHOP),
        )
        for path, fields in steps:
            if path == to:
                break
            visit.post(path, **fields)
        answer = visit.get()
        assert answer.url.path == to
        return answer

    return go


def test_from_card_to_request(
    visit: Visitor, card: LeagueCard, photos: Path, tmp_path: Path, wizard: Wizard
) -> None:
    assert visit.where() == "/card"
    answer = visit.post("/card", text=card.to_yaml().replace("\n", "\r\n"))  # as browsers send it
    assert answer.url.path == "/words"
    assert card.words() in answer.text
    answer = visit.post("/words", same="yes")
    assert answer.url.path == "/photos"
    answer = visit.post("/photos", photos=str(photos))
    assert answer.url.path == "/shop"
    rows = re.findall(
        r'<bdi>([^<]+)</bdi></th><td class="number">(\d+)</td><td>.*?>([^<]+)</span>', answer.text
    )
    assert rows == [("Schuhe", "2", "to be named"), ("Shirt", "3", "a class"), ("empty", "0", "to be named")]
    assert not (tmp_path / "alder").exists()  # nothing is written before the end
    answer = visit.post("/shop", **SHOP)
    assert answer.url.path == "/request"
    folder = tmp_path / "alder"
    config = load(ClientConfig, folder / "hanse-client.yaml")
    assert config.photos.resolve() == photos
    assert config.member is not None
    assert (config.member.name, config.member.entity) == (SHOP["name"], SHOP["entity"])
    assert config.policy.epsilon == 3
    assert config.league.charter == card.charter
    for path in (config.identity_path, config.node_key_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = (folder / "alder.request").read_text()
    assert lines in html.unescape(answer.text)
    asked = SignedRequest.from_text(lines)
    asked.require_sound()
    assert asked.request.charter.hex() == card.charter
    assert (asked.request.name, asked.request.entity) == (SHOP["name"], SHOP["entity"])
    assert asked.request.identity == signing.public_bytes(load_identity(config))
    assert asked.request.node_key == node_point(load_node(config).public_key())
    assert words(asked.request.digest) in answer.text
    assert "can't tell when you are a member" in answer.text
    assert "Schuhe" in (folder / "labels.yaml").read_text()
    for path in ("/card", "/words", "/photos", "/shop"):
        assert visit.get(path).url.path == "/request"  # it is done, and not done again
        assert visit.post(path, **SHOP).url.path == "/request"
    assert not wizard.done.is_set()
    assert "You can close this window." in visit.post("/finish").text
    assert wizard.done.is_set()


def test_steps_are_taken_in_order(visit: Visitor, card: LeagueCard) -> None:
    for path in ("/words", "/photos", "/shop", "/request"):
        assert visit.get(path).url.path == "/card"
    for path in ("/photos", "/shop", "/finish"):
        assert visit.post(path, photos="/", **SHOP).url.path == "/card"
    visit.post("/card", text=card.to_yaml())
    visit.post("/words", same="yes")
    assert visit.where() == "/photos"
    other = card.model_copy(update={"charter": "cd" * 32})
    visit.post("/card", text=other.to_yaml())
    assert visit.where() == "/words"  # another card's words are compared anew


def test_the_card_by_its_path(visit: Visitor, card: LeagueCard, tmp_path: Path) -> None:
    (tmp_path / "league.yaml").write_text(card.to_yaml())
    assert visit.post("/card", path=str(tmp_path / "league.yaml")).url.path == "/words"


@pytest.mark.parametrize(("fields", "said"), [
    ({}, "league.yaml: missing"),
    ({"text": "league: test"}, "league.yaml:1: charter: missing"),
    ({"text": "a: &b 1\nc: *b"}, "found an alias"),
    ({"text": f"{MARKUP}: 1"}, "unknown key"),
    ({"text": "\x00\x01"}, "league.yaml"),
    ({"text": "[" * 5000}, "nested more than"),
    ({"text": "#" + "x" * MAX_CARD_BYTES}, "more than"),
    ({"path": "/nowhere/league.yaml"}, "cannot be read"),
    ({"path": "~nobody-at-all/league.yaml"}, "no such file"),
    ({"path": "/dev/zero"}, "no regular file"),
    ({"path": "a\x00b"}, "no such file"),
])  # fmt: skip
def test_what_is_no_card_is_told_beside_it_and_kept(
    visit: Visitor, fields: dict[str, str], said: str
) -> None:
    answer = visit.post("/card", **fields)
    assert answer.status_code == 422
    assert said in html.unescape(answer.text)
    assert 'aria-invalid="true" autofocus aria-describedby="card-error"' in answer.text
    assert MARKUP not in answer.text
    assert tempfile.gettempdir() not in answer.text
    kept = re.search(r"<textarea.*?>\n(.*?)</textarea>", answer.text, re.S)
    assert kept
    typed = fields.get("text", "").replace("\x00", "�")
    assert html.unescape(kept[1]).replace("\x00", "�") == typed
    assert visit.where() == "/card"


def test_words_must_be_compared(through: Through, visit: Visitor) -> None:
    through("/words")
    for fields in ({}, {"same": "no"}):
        answer = visit.post("/words", **fields)
        assert answer.status_code == 422
        assert 'id="same-error"' in answer.text
    assert visit.where() == "/words"


def test_photos_that_are_not_there(through: Through, visit: Visitor, tmp_path: Path) -> None:
    through("/photos")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "loose.jpg").write_bytes(b"")
    for typed, said in (
        ("", "no such folder"),
        (str(tmp_path / MARKUP), "no such folder"),
        ("a\x00b", "no such folder"),
        ("~nobody-at-all", "no such folder"),
        ("x" * 5000, "can't be read"),
        (str(tmp_path / "bare"), "no photo in a sub-folder"),
    ):
        answer = visit.post("/photos", photos=typed)
        assert answer.status_code == 422
        assert said in answer.text
        assert MARKUP not in answer.text
        if "\x00" not in typed:
            assert f'value="{html.escape(typed)}"' in answer.text
    assert visit.where() == "/photos"
    (tmp_path / "photos.csv").write_text("path,label\n")
    answer = visit.post("/photos", photos=str(tmp_path / "photos.csv"))
    assert "listed in a CSV file" in answer.text


@pytest.mark.parametrize(("field", "typed", "error"), [
    ("name", "Alder Books", "name-error"),
    ("name", "", "name-error"),
    ("name", f'"{MARKUP}', "name-error"),
    ("name", "a" * 64, "name-error"),
    ("entity", "", "entity-error"),
    ("entity", "x" * 129, "entity-error"),
    ("entity", "two\nlines", "entity-error"),
    ("epsilon", "much", "epsilon-error"),
    ("epsilon", "0", "epsilon-error"),
    ("epsilon", "-1", "epsilon-error"),
    ("epsilon", "nan", "epsilon-error"),
    ("epsilon", "inf", "epsilon-error"),
    ("epsilon", "1001", "epsilon-error"),
])  # fmt: skip
def test_an_error_stands_beside_its_field_and_loses_nothing(
    through: Through, visit: Visitor, tmp_path: Path, field: str, typed: str, error: str
) -> None:
    through("/shop")
    answer = visit.post("/shop", **(SHOP | {field: typed}))
    assert answer.status_code == 422
    assert re.findall(r'class="error" id="([\w-]+)"', answer.text) == [error]
    for name, value in (SHOP | {field: typed}).items():
        kept = re.search(rf'<input id="{name}"[^>]*? value="([^"]*)"', answer.text)
        assert kept
        assert html.unescape(kept[1]) == value
    assert MARKUP not in answer.text
    assert not (tmp_path / "alder").exists()
    assert visit.post("/shop", **SHOP).url.path == "/request"


def test_a_passphrase_is_kept_in_memory_and_used(
    through: Through, visit: Visitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through("/shop")
    for first, second, said in (
        ("one", "two", "not the same"),
        (" one", " one", "no spaces"),
        ("x" * 1025,) * 2 + ("1024",),
    ):
        answer = visit.post("/shop", **SHOP, passphrase=first, again=second)
        assert answer.status_code == 422
        assert said in answer.text
        assert f'value="{first}"' not in answer.text
    answer = visit.post("/shop", **(SHOP | {"epsilon": "x"}), **twice("pass phrase"))
    assert "A passphrase is noted." in answer.text
    assert "pass phrase" not in answer.text
    monkeypatch.setattr(keys, "ask", lambda path: pytest.fail("asked in the terminal"))
    assert visit.post("/shop", **SHOP).url.path == "/request"
    config = load(ClientConfig, tmp_path / "alder" / "hanse-client.yaml")
    for path in (config.identity_path, config.node_key_path):
        assert b"ENCRYPTED" in path.read_bytes()
    monkeypatch.undo()
    (tmp_path / "secret").write_text("pass phrase\n")
    monkeypatch.setenv(PASSPHRASE_FILE, str(tmp_path / "secret"))
    asked = SignedRequest.from_text((tmp_path / "alder" / "alder.request").read_text())
    assert asked.request.identity == signing.public_bytes(load_identity(config))


def test_a_passphrase_can_be_taken_back(through: Through, visit: Visitor, tmp_path: Path) -> None:
    through("/shop")
    visit.post("/shop", **(SHOP | {"name": "X"}), **twice("secret"))
    visit.post("/shop", **SHOP, open="yes")
    assert b"ENCRYPTED" not in (tmp_path / "alder" / "state" / "identity.key").read_bytes()


def test_what_cannot_be_written_is_told_and_can_be_tried_again(
    through: Through, visit: Visitor, tmp_path: Path
) -> None:
    through("/shop")
    (tmp_path / "alder").write_text("a file where the folder should be")
    answer = visit.post("/shop", **SHOP)
    assert answer.status_code == 422
    assert "It could not be written." in answer.text
    (tmp_path / "alder").unlink()
    assert visit.post("/shop", **SHOP).url.path == "/request"


def test_an_existing_key_is_never_written_over(through: Through, visit: Visitor, tmp_path: Path) -> None:
    through("/shop")
    key = tmp_path / "alder" / "state" / "identity.key"
    key.parent.mkdir(parents=True)
    key.write_text("precious")
    assert "there is a key already" in visit.post("/shop", **SHOP).text
    assert key.read_text() == "precious"


def test_forms_are_bounded(visit: Visitor) -> None:
    assert visit.post("/shop", name="x" * MAX_FORM_BYTES).status_code == 413
    assert visit.post("/card", text="x" * 4 * MAX_CARD_BYTES).status_code == 413


def test_strangers(visit: Visitor, card: LeagueCard) -> None:
    origin = str(visit.client.base_url)
    with httpx.Client(base_url=origin) as other:
        assert other.get("/card").status_code == 403
        assert "hanse-client wizard" in other.get("/").text
        assert other.get("/?token=x").status_code == 403
        assert other.post("/card", data={"text": card.to_yaml()}).status_code == 403
        assert other.get("/", headers={"Host": "evil.example"}).status_code == 421
    for key in ("", "x"):
        assert visit.post("/card", text=card.to_yaml(), key=key).status_code == 403
    visit.client.headers["Sec-Fetch-Site"] = "same-site"
    assert visit.post("/card", text=card.to_yaml()).status_code == 403
    assert visit.where() == "/card"


@pytest.mark.parametrize("to", ["/card", "/words", "/photos", "/shop", "/request"])
def test_every_page_in_chinese(through: Through, visit: Visitor, card: LeagueCard, to: str) -> None:
    through(to)
    answer = visit.post("/language", language="zh", to=to)
    assert answer.url.path == to
    assert '<html lang="zh-Hans">' in answer.text
    main = re.sub(r"<[^>]*>", " ", answer.text.split("<h1>")[1].split("</main>")[0])
    assert re.search(r"[\u4e00-\u9fff]", main)
    if to == "/words":
        assert card.words("zh") in answer.text
        assert card.words() in answer.text


def test_what_epsilon_means_is_the_policys_own(through: Through) -> None:
    text = through("/shop").text
    for epsilon in (0.5, 1.0, 3.0, 8.0):
        true = 100 * posterior_bound(epsilon, 0.01)
        assert true <= float(bound(epsilon)) < 1.1 * true
        assert f'{epsilon:g}</th><td class="number">{bound(epsilon)} %' in text


def test_small_readings(photos: Path, card: LeagueCard) -> None:
    assert [number(text) for text in ("3", "0,5", "0.5", "x", "")] == [3.0, 0.5, 0.5, None, None]
    assert look(photos, card.taxonomy) == (
        Folder("Schuhe", 2, False),
        Folder("Shirt", 3, True),
        Folder("empty", 0, False),
    )
    assert look(photos / "Shirt" / "0.JPG", card.taxonomy) == ()


def test_the_idle_time_ends_with_each_request(wizard: Wizard, visit: Visitor) -> None:
    wizard._asked -= 5000
    assert wizard.idle > 4999
    visit.get()
    assert wizard.idle < 4999


# -- the command --------------------------------------------------------------------------------------------------


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    words_ = [
        sys.executable,
        "-c",
        "from hanse_client.cli import main; main()",
        "wizard",
        "--show",
        *arguments,
    ]
    return subprocess.Popen(words_, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_the_command_ends_when_its_user_is_done(tmp_path: Path, card: LeagueCard, photos: Path) -> None:
    process = command(str(tmp_path / "alder"), "--language", "zh")
    try:
        assert process.stdout
        visitor = Visitor(process.stdout.readline().strip())
        assert "加入哪个联盟？" in visitor.get().text
        visitor.post("/card", text=card.to_yaml())
        visitor.post("/words", same="yes")
        visitor.post("/photos", photos=str(photos))
        visitor.post("/shop", **SHOP)
        visitor.post("/finish")
        visitor.client.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "alder" / "alder.request").exists()


@pytest.mark.slow
def test_a_shop_that_is_set_up_needs_no_wizard(tmp_path: Path) -> None:
    (tmp_path / "hanse-client.yaml").write_text("")
    process = command(cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == ConfigError.exit_code
    assert "there is a configuration already" in err
