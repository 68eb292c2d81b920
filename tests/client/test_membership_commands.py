"""Joining, vouching and the league's key, as the people who do it type it: `init`, `join`, `endorse`, `league …`."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner, Result

from hanse_client import cli, keys
from hanse_client.config import ClientConfig
from hanse_client.enrolment import finish_rotation
from hanse_client.keys import PASSPHRASE_FILE, load_identity, load_node
from hanse_client.markers import Markers
from hanse_common import signing, wire
from hanse_common.charter import CharterFile
from hanse_common.config import load
from hanse_common.directory import SignedDirectory
from hanse_common.errors import ConfigError, DirectoryRefused, HanseError, SignatureInvalid
from hanse_common.fingerprint import words
from hanse_common.league_card import LeagueCard
from hanse_common.membership import SignedRequest
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.development_keys import make_keys

Type = Callable[..., Result]


@pytest.fixture
def types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Type:
    """Return a function that types a command in the test's folder and answers its questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def type_(*words_: str, answers: str = "", fails: type[Exception] | None = None) -> Result:
        result = CliRunner().invoke(cli.app, list(words_), input=answers)
        if fails is None:
            assert result.exit_code == 0, (result.output, result.exception)
        else:
            assert isinstance(result.exception, fails), (result.output, result.exception)
        return result

    return type_


@pytest.fixture
def card(tmp_path: Path) -> Callable[[str], LeagueCard]:
    """Return a function that writes league.yaml for the charter of this digest."""
    made = make_keys(tmp_path / "server", ("localhost",), ())

    def write(charter: str) -> LeagueCard:
        found = LeagueCard(
            league="test",
            charter=charter,
            operator_key="12" * 32,
            server="localhost:9092",
            authority=made.authority.read_text(),
            taxonomy=Taxonomy(classes=("shirt", "shoe", "bag")),
        )
        (tmp_path / "league.yaml").write_text(found.to_yaml())
        return found

    return write


def found_league(types: Type, threshold: int = 2, holders: int = 3) -> str:
    """Go through the founding with `holders` holders; return the digest that merchants pin."""
    names = [f"holder{n}.key" for n in range(holders)]
    for name in names:
        types("league", "key", name, answers="n\n")
    options = [word for name in names for word in ("--holder", f"{name}.pub")]
    types("league", "found", "test", *options, "--threshold", str(threshold))
    for name in names[:threshold]:
        result = types("league", "sign", "charter.hanse", "--key", name, "--yes")
    assert "It has all the signatures" in result.output
    return re.search(r"pin: ([0-9a-f]{64})", types("league", "show", "charter.hanse").output)[1]  # type: ignore[index]


def enrol(types: Type, name: str) -> Path:
    Path("photos", "Schuhe").mkdir(parents=True, exist_ok=True)
    Path("photos", "shirt").mkdir(parents=True, exist_ok=True)
    types(
        *(
            "init",
            "league.yaml",
            "--yes",
            "--photos",
            "photos",
            "--name",
            name,
            "--entity",
            f"{name.title()} Ltd",
        ),
        *("--epsilon", "3", "--folder", name, "--no-passphrase"),
    )
    types("join", "-c", f"{name}/hanse-client.yaml")
    return Path(name, f"{name}.request")


def test_a_league_from_its_founding_to_a_new_member_and_the_loss_of_a_key(
    types: Type, card: Callable[[str], LeagueCard], tmp_path: Path
) -> None:
    """The whole ceremony, and the rehearsed recovery at its end."""
    pinned = found_league(types)
    card(pinned)
    founders = [enrol(types, name) for name in ("alder", "birch", "cedar")]
    types("league", "admit", *map(str, founders), "--out", "directory.hanse", "--yes")
    for key in ("holder0.key", "holder2.key"):
        types("league", "sign", "directory.hanse", "--key", key, "--yes")
    markers = Markers(tmp_path / "markers.sqlite")

    def take(path: str) -> set[str]:
        signed = wire.decode(SignedDirectory, Path(path).read_bytes())
        directory = signed.open(bytes.fromhex(pinned), 0)
        markers.see_directory(directory, signed.follow(bytes.fromhex(pinned)))
        return set(directory.identities())

    assert take("directory.hanse") == {"alder", "birch", "cedar"}

    # Damson asks; with one member's word the holders cannot enter it, with two they can.
    request = enrol(types, "damson")
    said = types("endorse", str(request), "-c", "alder/hanse-client.yaml", answers="y\n").output
    asked = SignedRequest.from_text(request.read_text())
    assert words(asked.request.digest) in said and "Damson Ltd" in said
    types("league", "admit", str(request), "--yes", fails=DirectoryRefused)
    assert not Path("directory.next.hanse").exists()
    types("endorse", str(request), "-c", "birch/hanse-client.yaml", "--yes")
    types("league", "admit", str(request), "--yes")
    types("league", "sign", "directory.next.hanse", "--key", "holder1.key", "--yes")
    with pytest.raises(SignatureInvalid):
        take("directory.next.hanse")
    types("league", "sign", "directory.next.hanse", "--key", "holder0.key", "--yes")
    assert take("directory.next.hanse") == {"alder", "birch", "cedar", "damson"}
    shutil.move("directory.next.hanse", "directory.hanse")

    # Alder changes its identity: the old one's word is enough.
    types("rotate", "-c", "alder/hanse-client.yaml")
    types("league", "admit", "alder/alder.request", "--yes")
    for key in ("holder1.key", "holder2.key"):
        types("league", "sign", "directory.next.hanse", "--key", key, "--yes")
    assert take("directory.next.hanse") == {"alder", "birch", "cedar", "damson"}
    shutil.move("directory.next.hanse", "directory.hanse")
    before = signing.public_bytes(load_identity(load(ClientConfig, Path("alder/hanse-client.yaml"))))
    types("rotate", "--finish", "-c", "alder/hanse-client.yaml")
    after = signing.public_bytes(load_identity(load(ClientConfig, Path("alder/hanse-client.yaml"))))
    listed = wire.decode(SignedDirectory, Path("directory.hanse").read_bytes()).read().identities()
    assert listed["alder"] == after != before

    # Holder 1's stick is lost. The two others put another key in its place and go on; the old key is worth nothing.
    types("league", "key", "holder3.key", answers="n\n")
    options = [word for n in (0, 2, 3) for word in ("--holder", f"holder{n}.key.pub")]
    types("league", "succeed", *options, "--threshold", "2")
    types("league", "sign", "charter.next.hanse", "--key", "holder0.key", "--yes")
    said = types("league", "sign", "charter.next.hanse", "--key", "holder2.key", "--yes").output
    assert "It has all the signatures" in said
    shutil.move("charter.next.hanse", "charter.hanse")
    types("league", "remove", "cedar")
    for key in ("holder1.key", "holder3.key"):
        types("league", "sign", "directory.next.hanse", "--key", key, "--yes")
    with pytest.raises(SignatureInvalid):
        take("directory.next.hanse")
    types("league", "sign", "directory.next.hanse", "--key", "holder2.key", "--yes")
    assert take("directory.next.hanse") == {"alder", "birch", "damson"}

    # What the old holders sign from now on, under the old charter, is refused by whoever saw the new one.
    first = wire.decode(CharterFile, Path("charter.hanse").read_bytes()).charters[:1]
    stale = wire.decode(SignedDirectory, Path("directory.hanse").read_bytes()).read()
    forged = SignedDirectory.of(stale.model_copy(update={"version": 99}), first)
    for key in ("holder0.key", "holder1.key"):
        forged = forged.signed_by(signing.load_key(Path(key)))
    Path("forged.hanse").write_bytes(wire.encode(forged))
    with pytest.raises(DirectoryRefused, match="somebody signed a fork"):
        take("forged.hanse")


def test_init_asks_what_it_needs_and_writes_what_works(
    types: Type, card: Callable[[str], LeagueCard]
) -> None:
    league = card("ab" * 32)
    Path("photos", "Schuhe").mkdir(parents=True)
    result = types("init", "league.yaml", answers='y\nphotos\nalder\nAlder: "Shoes" Ltd\n2.5\nn\n')
    assert league.words() in result.output
    config = load(ClientConfig, Path("hanse-client.yaml"))
    assert config.member is not None and config.member.entity == 'Alder: "Shoes" Ltd'
    assert config.policy.epsilon == 2.5 and config.policy.league == "test"
    assert config.league.charter == "ab" * 32 and config.photos.resolve() == Path("photos").resolve()
    assert '# "Schuhe": ' in Path("labels.yaml").read_text()
    identity, node = load_identity(config), load_node(config)
    assert signing.public_bytes(identity) != node.public_key().public_numbers().x.to_bytes(48, "big")[:32]
    for path in (config.identity_path, config.node_key_path):
        assert path.stat().st_mode & 0o777 == 0o600
    types("words", "league.yaml")
    types("init", "league.yaml", "--yes", "--photos", "photos", "--name", "a", "--entity", "b", "--epsilon", "1",
          fails=ConfigError)  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ("n\n", "were not confirmed"),
        ("y\nnowhere\nalder\nAlder\n3\nn\n", "expected your photos"),
        ("y\nphotos\nUPPER\nAlder\n3\nn\n", "member.name"),
        ("y\nphotos\nalder\nAlder\n-3\nn\n", "policy.epsilon"),
    ],
)
def test_init_says_what_is_wrong_and_can_be_tried_again(
    types: Type, card: Callable[[str], LeagueCard], answers: str, why: str
) -> None:
    card("ab" * 32)
    Path("photos").mkdir()
    result = types("init", "league.yaml", answers=answers, fails=HanseError)
    assert why in str(result.exception)
    assert not Path("hanse-client.yaml").exists() and not Path("state/identity.key").exists()
    types("init", "league.yaml", answers="y\nphotos\nalder\nAlder\n3\nn\n")


def test_keys_with_a_passphrase(
    types: Type, card: Callable[[str], LeagueCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    card("ab" * 32)
    Path("photos").mkdir()
    types("init", "league.yaml", answers="y\nphotos\nalder\nAlder\n3\ny\nsecret\nsecret\n")
    config = load(ClientConfig, Path("hanse-client.yaml"))
    for path in (config.identity_path, config.node_key_path):
        assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED")
    for read in (load_identity, load_node):
        with pytest.raises(ConfigError, match=f"has a passphrase, and nobody is there.*{PASSPHRASE_FILE}"):
            read(config)
        Path("passphrase").write_text("wrong\n")
        monkeypatch.setenv(PASSPHRASE_FILE, "passphrase")
        with pytest.raises(ConfigError, match="not the key's passphrase"):
            read(config)
        Path("passphrase").write_text("secret\n")
        read(config)
        monkeypatch.delenv(PASSPHRASE_FILE)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr(keys.getpass, "getpass", lambda text: "secret")
    load_identity(config)


def test_a_request_of_another_league_or_a_forged_one_is_not_endorsed(
    types: Type, card: Callable[[str], LeagueCard]
) -> None:
    card("ab" * 32)
    enrol(types, "alder")
    request = enrol(types, "birch")
    card("cd" * 32)
    other = enrol(types, "cedar")
    types("endorse", str(other), "-c", "alder/hanse-client.yaml", "--yes", fails=SignatureInvalid)
    asked = SignedRequest.from_text(request.read_text())
    forged = asked.model_copy(update={"proof": bytes(64)})
    request.write_text(forged.to_text())
    types("endorse", str(request), "-c", "alder/hanse-client.yaml", "--yes", fails=SignatureInvalid)
    request.write_text(asked.to_text())
    types("endorse", str(request), "-c", "alder/hanse-client.yaml", answers="n\n", fails=ConfigError)
    assert not SignedRequest.from_text(request.read_text()).endorsements
    through = types("endorse", "-", "-c", "alder/hanse-client.yaml", "--yes", answers=asked.to_text())
    assert len(SignedRequest.from_text(through.output).endorsements) == 1


def test_rotation_can_be_broken_off_and_asked_again(types: Type, card: Callable[[str], LeagueCard]) -> None:
    card("ab" * 32)
    enrol(types, "alder")
    config = Path("alder/hanse-client.yaml")
    types("rotate", "--finish", "-c", str(config), fails=ConfigError)
    types("rotate", "-c", str(config))
    first = SignedRequest.from_text(Path("alder/alder.request").read_text())
    types("rotate", "-c", str(config))
    assert SignedRequest.from_text(Path("alder/alder.request").read_text()) == first
    first.require_sound()
    assert first.request.replaces == signing.public_bytes(load_identity(load(ClientConfig, config)))


@pytest.mark.parametrize("done", [1, 2])
def test_a_rotation_that_was_killed_is_finished(
    types: Type, card: Callable[[str], LeagueCard], monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    card("ab" * 32)
    enrol(types, "alder")
    path = Path("alder/hanse-client.yaml")
    config = load(ClientConfig, path)
    types("rotate", "-c", str(path))
    wanted = SignedRequest.from_text(Path("alder/alder.request").read_text()).request.identity
    steps: list[Path] = []
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if len(steps) == done - 1:
            raise KeyboardInterrupt
        steps.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            finish_rotation(config)
    types("rotate", "--finish", "-c", str(path))
    assert signing.public_bytes(load_identity(config)) == wanted
    assert signing.load_public(config.identity_path.with_name("identity.key.pub")) == wanted
    old = config.identity_path.with_name("identity.key.replaced")
    assert signing.public_bytes(signing.load_key(old)) == signing.load_public(
        old.with_name(old.name + ".pub")
    )


def test_members_shows_whom_the_owner_verified(types: Type, card: Callable[[str], LeagueCard]) -> None:
    pinned = found_league(types, 1, 1)
    card(pinned)
    founders = [enrol(types, name) for name in ("alder", "birch", "cedar")]
    config = Path("alder/hanse-client.yaml")
    assert "has not seen" in types("members", "-c", str(config)).output
    types("league", "admit", *map(str, founders), "--out", "directory.hanse", "--yes")
    types("league", "sign", "directory.hanse", "--key", "holder0.key", "--yes")
    signed = wire.decode(SignedDirectory, Path("directory.hanse").read_bytes())
    charters = signed.follow(bytes.fromhex(pinned))
    directory = signed.open(bytes.fromhex(pinned), 0)
    settings = load(ClientConfig, config)
    Markers(settings.markers_path).see_directory(directory, charters)
    birch = directory.identities()["birch"].hex()
    config.write_text(config.read_text().replace("verified: {}", f'verified: {{birch: "{birch}"}}'))
    shown = types("members", "-c", str(config)).output
    assert "birch: Birch Ltd" in shown and shown.count("you verified it") == 1


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("league", "found", "Test", "--holder", "k.pub", "--threshold", "1"), "expected a name"),
        (("league", "found", "test", "--holder", "k.pub", "--threshold", "2"), "threshold of at most 1"),
        (("league", "show", "k.pub"), "Get it again"),
        (("league", "renew", "--charter", "k.pub"), "Get it again"),
    ],
)
def test_what_holders_may_get_wrong(types: Type, command: tuple[str, ...], why: str) -> None:
    signing.write_key(Path("k"), Ed25519PrivateKey.generate())
    result = types(*command, fails=HanseError)
    assert why in str(result.exception)
