"""How recognizers reach merchants, over real TLS on loopback: from honest servers, and where either side cheats."""

import hashlib
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client import cli, release_stream, updates
from hanse_client.cli import running
from hanse_client.config import ClientConfig
from hanse_client.control import Control
from hanse_client.keys import load_identity
from hanse_client.release_stream import open_release_stream
from hanse_client.releases import Releases, recognizer_folder
from hanse_client.stream import Limits, Lost, NotServed, Refused, serve_block
from hanse_client.traffic import Network, Traffic
from hanse_client.updates import Found, UpdateKeeper, Updates
from hanse_common import signing, wire
from hanse_common.credentials import fingerprint
from hanse_common.errors import ConfigError, ReleaseRefused
from hanse_common.plan import SignedPlan
from hanse_common.release import SignedRelease
from hanse_common.session import (
    FRAME_BYTES,
    METHOD,
    NO_BLOCK,
    RELEASE_METHOD,
    Assignment,
    Challenge,
    Fetch,
    Hello,
    Latest,
    RecordReader,
    ReportCode,
    frames,
)
from hanse_server import distribution, greeting
from hanse_server.development_keys import DevelopmentKeys
from hanse_server.stream import StreamServer

from .released import Made, Shelf

WAIT = 20.0
OTHER = Ed25519PrivateKey.generate()
BLOCK = b"b" * 16


@pytest.fixture(scope="module")
def recognizers(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    return [Made(tmp_path_factory.mktemp("made"), seed) for seed in range(3)]


@pytest.fixture
def shelf(recognizers: list[Made]) -> Shelf:
    return Shelf(*recognizers)


@pytest.fixture
def identity(config: ClientConfig) -> Ed25519PrivateKey:
    return load_identity(config)


@pytest.fixture
def server(keys: DevelopmentKeys, identity: Ed25519PrivateKey, shelf: Shelf) -> Iterator[StreamServer]:
    names = {signing.public_bytes(identity): "alder", signing.public_bytes(OTHER): "birch"}
    certificate, key = keys.certificate.read_bytes(), keys.key.read_bytes()
    with StreamServer("127.0.0.1", 0, certificate, key, lambda: names, shelf) as running:
        yield running


class Shop:
    """One shop that fetches."""

    def __init__(self, config: ClientConfig, identity: Ed25519PrivateKey, keys: DevelopmentKeys) -> None:
        self.config = config
        self.traffic = Traffic(config.state / "traffic.json", config.network)
        self.releases = Releases.of(config)
        self.updates = Updates(config, identity, keys.authority.read_bytes(), self.traffic)

    def at(self, port: int) -> "Shop":
        Control(self.config.state).note_aggregator(f"localhost:{port}")
        return self

    def look(self, *, take: bool = True) -> Found | None:
        return self.updates.look(lambda: False, take=take)

    @property
    def in_use(self) -> str | None:
        folder = self.releases.folder()
        return None if folder is None else folder.name


@pytest.fixture
def shop(
    config: ClientConfig,
    identity: Ed25519PrivateKey,
    keys: DevelopmentKeys,
    monkeypatch: pytest.MonkeyPatch,
) -> Shop:
    monkeypatch.setattr(updates, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(updates, "POLL_SECONDS", 0.01)
    return Shop(config, identity, keys)


# -- honest servers -----------------------------------------------------------------------------------------------


def test_releases_reach_a_shop_one_after_the_other_and_a_rollback_too(
    server: StreamServer, shelf: Shelf, shop: Shop, recognizers: list[Made]
) -> None:
    shop.at(server.port)
    assert shop.look() is None, "none is released yet"
    told = []
    for number, version in ((1, 1), (2, 2), (3, 1)):
        made = recognizers[version - 1]
        shelf.signed = made.signed(number, version=version)
        found = shop.look()
        assert found is not None
        told.append(found.told())
        assert shop.in_use == made.digest
        assert recognizer_folder(shop.config) == shop.config.recognizers_path / made.digest
        assert shop.look() is None, "nothing is later"
    assert told == [
        "The league released version 1: better shoes. It is in use now.",
        "The league released version 2: better shoes. It is in use now.",
        "The league went back to version 1: better shoes. It is in use now.",
    ]
    assert len(shelf.opened) == 4, "what a rollback goes back to is here already"
    assert Traffic(shop.config.state / "traffic.json", Network()).megabytes > 0


def test_it_works_while_a_block_is_open_and_disturbs_it_not(
    server: StreamServer, shelf: Shelf, shop: Shop, identity: Ed25519PrivateKey, keys: DevelopmentKeys,
    recognizers: list[Made],
) -> None:  # fmt: skip
    shelf.signed = recognizers[0].signed(1)
    server.open_block(BLOCK, 1 << 20)
    assignment = Assignment(
        block=BLOCK,
        signed_plan=SignedPlan(plan=b"", signature=bytes(64)),
        rounds=1,
        aggregator=f"localhost:{server.port}",
    )
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        report = pool.submit(
            serve_block, assignment, identity, keys.authority.read_bytes(), lambda request: b"re: " + request,
            stop, Limits(1 << 20, 10, 60),
        )  # fmt: skip
        assert server.wait(WAIT, lambda names: "alder" in names)
        assert shop.at(server.port).look() is not None
        assert dict(server.exchange("test", {"alder": b"x"}, WAIT)) == {"alder": b"re: x"}
        server.close_block()
        assert report.result(WAIT) is ReportCode.DONE


def test_a_file_of_many_frames_comes_in_pieces(
    server: StreamServer,
    shelf: Shelf,
    identity: Ed25519PrivateKey,
    keys: DevelopmentKeys,
    recognizers: list[Made],
) -> None:
    for size in (3 * (FRAME_BYTES - 1), 3 * (FRAME_BYTES - 1) + 1, 1):
        made = Made.__new__(Made)
        made.files = recognizers[0].files | {"model.safetensors": bytes(range(256)) * (size // 256 + 1)}
        made.files["model.safetensors"] = made.files["model.safetensors"][:size]
        shelf.add(made)
        shelf.signed = made.signed(1)
        moved: list[int] = []
        with open_release_stream(
            f"localhost:{server.port}", identity, keys.authority.read_bytes(), lambda: False, moved.append
        ) as stream:
            assert stream.latest(0) == shelf.signed
            pieces = [bytes(piece) for piece in stream.pieces(made.release(1).files[1])]
        assert b"".join(pieces) == made.files["model.safetensors"]
        assert max(map(len, pieces)) < FRAME_BYTES
        assert sum(moved) >= size


def test_a_shop_that_wants_to_be_asked_is_told_and_takes_it_by_hand(
    server: StreamServer, shelf: Shelf, shop: Shop, recognizers: list[Made]
) -> None:
    shelf.signed = recognizers[0].signed(1, reason="new\n\x1b[2Jclasses")
    found = shop.at(server.port).look(take=False)
    assert found is not None
    assert (
        found.told()
        == "The league released version 1: new ?[2Jclasses. It waits for your word: hanse-client update."
    )
    assert (shop.in_use, shelf.opened) == (None, [])
    assert shop.look() is not None
    assert shop.in_use == recognizers[0].digest


def test_nothing_is_fetched_beyond_the_months_traffic(
    server: StreamServer, shelf: Shelf, config: ClientConfig, identity: Ed25519PrivateKey, keys: DevelopmentKeys,
    recognizers: list[Made],
) -> None:  # fmt: skip
    shop = Shop(config.model_copy(update={"network": Network(monthly_megabytes=1)}), identity, keys).at(
        server.port
    )
    shop.traffic.add(10**6 - 100)
    shelf.signed = recognizers[0].signed(1)
    with pytest.raises(ReleaseRefused, match="monthly_megabytes"):
        shop.look()
    assert shelf.opened == []


def test_before_the_first_training_there_is_nobody_to_ask(shop: Shop) -> None:
    assert not shop.updates.can_look
    with pytest.raises(ConfigError, match="first one says where"):
        shop.look()


def test_a_release_that_changes_on_the_server_meanwhile_is_the_one_that_was_asked_for(
    server: StreamServer,
    shelf: Shelf,
    identity: Ed25519PrivateKey,
    keys: DevelopmentKeys,
    recognizers: list[Made],
) -> None:
    shelf.signed = recognizers[0].signed(1)
    with open_release_stream(
        f"localhost:{server.port}", identity, keys.authority.read_bytes(), lambda: False
    ) as stream:
        assert stream.latest(0) == shelf.signed
        shelf.signed = recognizers[1].signed(2)
        for file in recognizers[0].release(1).files:
            assert b"".join(stream.pieces(file)) == recognizers[0].files[file.name]


# -- who may fetch, and how much ----------------------------------------------------------------------------------


@contextmanager
def raw(
    port: int,
    keys: DevelopmentKeys,
    key: Ed25519PrivateKey,
    block: bytes = NO_BLOCK,
    method: str = RELEASE_METHOD,
) -> Iterator[tuple[Any, Callable[[Any], None]]]:
    """A stream under a test's control, after the hello: what is heard, and a way to say a message."""
    said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    root = grpc.ssl_channel_credentials(keys.authority.read_bytes())
    with grpc.secure_channel(f"localhost:{port}", root) as channel:
        heard = channel.stream_stream(method)(iter(said.get, None), timeout=WAIT)

        def say(message: Any) -> None:
            for frame in frames(wire.encode(message)):
                said.put(frame)

        nonce = wire.decode(Challenge, next(heard)[1:]).nonce
        say(Hello.sign(key, nonce, fingerprint(keys.certificate.read_bytes()), block))
        try:
            yield heard, say
        finally:
            said.put(None)
            heard.cancel()


def outcome(heard: Any) -> grpc.StatusCode:
    try:
        for _ in heard:
            pass
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def test_only_members_fetch(
    server: StreamServer, shelf: Shelf, keys: DevelopmentKeys, recognizers: list[Made]
) -> None:
    shelf.signed = recognizers[0].signed(1)
    with raw(server.port, keys, Ed25519PrivateKey.generate()) as (heard, say):
        say(Fetch(number=0))
        assert outcome(heard) is grpc.StatusCode.UNAUTHENTICATED


def test_a_hello_of_one_kind_of_stream_opens_none_of_the_other(
    server: StreamServer, keys: DevelopmentKeys
) -> None:
    server.open_block(BLOCK, 1 << 20)
    with raw(server.port, keys, OTHER, BLOCK) as (heard, say):
        say(Fetch(number=0))
        assert outcome(heard) is grpc.StatusCode.INVALID_ARGUMENT
    with raw(server.port, keys, OTHER, NO_BLOCK, METHOD) as (heard, _):
        assert outcome(heard) is grpc.StatusCode.NOT_FOUND
    with pytest.raises(ValueError, match="block's own number"):
        server.open_block(NO_BLOCK, 1 << 20)


def test_a_merchant_is_not_led_to_a_block_that_is_none(
    keys: DevelopmentKeys, identity: Ed25519PrivateKey
) -> None:
    assignment = Assignment(
        block=NO_BLOCK,
        signed_plan=SignedPlan(plan=b"", signature=bytes(64)),
        rounds=1,
        aggregator="localhost:1",
    )
    told: list[str] = []
    code = serve_block(
        assignment, identity, keys.authority.read_bytes(), lambda request: b"", threading.Event(),
        Limits(1 << 20, 10, 60), told.append,
    )  # fmt: skip
    assert (code, len(told)) == (ReportCode.LOST, 1)
    assert "broke the protocol" in told[0]


@pytest.mark.parametrize(
    "case", ["a file before the release", "a file that is not of it", "a file twice", "again"]
)
def test_no_more_than_one_release_is_fetched_on_a_stream(
    server: StreamServer, shelf: Shelf, keys: DevelopmentKeys, recognizers: list[Made], case: str
) -> None:
    shelf.signed = recognizers[0].signed(1)
    card = recognizers[0].release(1).files[0].digest
    asked = {
        "a file before the release": [Fetch(number=0, file=card)],
        "a file that is not of it": [
            Fetch(number=0),
            Fetch(number=0, file=bytes.fromhex(recognizers[1].digest)),
        ],
        "a file twice": [Fetch(number=0), *[Fetch(number=0, file=card)] * 2],
        "again": [Fetch(number=0)] * 2,
    }
    with raw(server.port, keys, OTHER) as (heard, say):
        for fetch in asked[case]:
            say(fetch)
        assert outcome(heard) is grpc.StatusCode.INVALID_ARGUMENT


def test_a_merchant_has_one_such_stream_and_who_comes_back_is_not_shut_out(
    server: StreamServer, shelf: Shelf, keys: DevelopmentKeys, recognizers: list[Made]
) -> None:
    shelf.signed = recognizers[0].signed(1)
    with raw(server.port, keys, OTHER) as (older, say_older):
        say_older(Fetch(number=0))
        next(older)
        with raw(server.port, keys, OTHER) as (newer, say_newer):
            say_newer(Fetch(number=0))
            assert wire.decode(Latest, next(newer)[1:]).signed == shelf.signed
            assert outcome(older) in (grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED)


def test_who_says_nothing_is_sent_away(
    server: StreamServer, keys: DevelopmentKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution, "START_SECONDS", 0.2)
    with raw(server.port, keys, OTHER) as (heard, _):
        assert outcome(heard) in (grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED)
    assert server._distribution._talks == {}


def test_a_slow_fetcher_keeps_neither_others_nor_memory(
    server: StreamServer, shelf: Shelf, shop: Shop, keys: DevelopmentKeys, recognizers: list[Made]
) -> None:
    """It asks for 64 MB and reads nothing. The server has read no more of the file than fits on the way."""
    large = Made.__new__(Made)
    large.files = recognizers[0].files | {"model.safetensors": bytes(1 << 26)}
    shelf.add(large)
    shelf.signed = large.signed(1)
    read: list[int] = []
    opened = shelf.open

    class Watched:
        def __init__(self, source: Any) -> None:
            self.source = source

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exception: object) -> None:
            self.source.close()

        def read(self, size: int) -> bytes:
            read.append(size)
            return bytes(self.source.read(size))

    shelf.open = lambda digest: Watched(opened(digest))  # type: ignore[method-assign,assignment,return-value]
    with raw(server.port, keys, OTHER) as (heard, say):
        say(Fetch(number=0))
        next(heard)
        say(Fetch(number=0, file=large.release(1).files[1].digest))
        next(heard)
        time.sleep(0.3)
        assert sum(read) < 1 << 24
        shelf.signed = recognizers[1].signed(2)
        assert shop.at(server.port).look() is not None
        assert shop.in_use == recognizers[1].digest


def test_a_flood_of_streams_that_say_no_name_is_bounded(
    server: StreamServer, shelf: Shelf, shop: Shop, keys: DevelopmentKeys, recognizers: list[Made],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(greeting, "MAX_PENDING_PER_ADDRESS", 2)
    root = grpc.ssl_channel_credentials(keys.authority.read_bytes())
    said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.secure_channel(f"localhost:{server.port}", root) as channel:
        silent = [channel.stream_stream(RELEASE_METHOD)(iter(said.get, None), timeout=WAIT) for _ in range(2)]
        for heard in silent:
            next(heard)
        third = channel.stream_stream(RELEASE_METHOD)(iter(said.get, None), timeout=WAIT)
        assert outcome(third) is grpc.StatusCode.RESOURCE_EXHAUSTED
        for heard in silent:
            heard.cancel()
        for _ in range(2):
            said.put(None)
    shelf.signed = recognizers[0].signed(1)
    assert shop.at(server.port).look() is not None


# -- servers that cheat -------------------------------------------------------------------------------------------

Script = Callable[[Fetch], Iterator[bytes]]


class EndsNow(Exception):
    """The server ends the stream as if all were well."""


@contextmanager
def cheating(
    keys: DevelopmentKeys, script: Script, methods: tuple[str, ...] = (RELEASE_METHOD,)
) -> Iterator[int]:
    """A server that meets merchants as it should, and then answers each fetch as `script` says. Yields its port."""

    def serve(frames_in: Iterator[bytes], context: Any) -> Iterator[bytes]:
        yield from frames(wire.encode(Challenge(nonce=bytes(32))))
        reader = RecordReader(1 << 20)
        for count, frame in enumerate(frames_in):
            record = reader.add(frame)
            assert record is not None
            if count:
                try:
                    yield from script(wire.decode(Fetch, record))
                except EndsNow:
                    return

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            return grpc.stream_stream_rpc_method_handler(serve) if details.method in methods else None

    running = grpc.server(
        ThreadPoolExecutor(4), handlers=(Handler(),), options=(("grpc.max_send_message_length", -1),)
    )
    pair = (keys.key.read_bytes(), keys.certificate.read_bytes())
    port = running.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    running.start()
    try:
        yield port
    finally:
        running.stop(0).wait()


def record(message: Any) -> Iterator[bytes]:
    return frames(wire.encode(message))


def handing_out(made: Made, signed: SignedRelease, content: Callable[[bytes], Iterator[bytes]]) -> Script:
    """Answer with the release, and with `content` of a file's digest."""

    def script(fetch: Fetch) -> Iterator[bytes]:
        yield from record(Latest(signed=signed)) if fetch.file is None else content(fetch.file)

    return script


def full(byte: bytes = b"x") -> bytes:
    return b"\1" + byte * (FRAME_BYTES - 1)


def early(digest: bytes) -> Iterator[bytes]:
    raise EndsNow


def endless(digest: bytes) -> Iterator[bytes]:
    while True:
        yield full()


CHEATS: dict[str, tuple[Callable[[bytes], Iterator[bytes]], type[Exception], str]] = {
    "wrong bytes": (lambda digest: frames(b"{}"), ReleaseRefused, "card.json: found 2 bytes"),
    "no bytes": (lambda digest: frames(b""), ReleaseRefused, "card.json: found 0 bytes"),
    "an early end": (early, Lost, "ended .* bytes early"),
    "without end": (endless, Refused, "card.json has more than"),
    "no frames": (lambda digest: iter([b"\2abc"]), Refused, "expected 0 or 1"),
    "short frames": (lambda digest: iter([b"\1a"] * 9), Refused, "short one before the last"),
    "frames too large": (lambda digest: iter([full() + b"x"]), Lost, "resource_exhausted"),
}


@pytest.mark.parametrize("case", CHEATS)
def test_a_server_that_cheats_changes_nothing(
    keys: DevelopmentKeys, shop: Shop, recognizers: list[Made], case: str
) -> None:
    content, error, text = CHEATS[case]
    script = handing_out(recognizers[0], recognizers[0].signed(1), content)
    with cheating(keys, script) as port, pytest.raises(error, match=text):
        shop.at(port).look()
    assert shop.in_use is None
    assert {path.name for path in shop.config.recognizers_path.iterdir()} == {"latest.hanse", ".lock"}


def test_a_statement_without_end_is_not_heard_out(keys: DevelopmentKeys, shop: Shop) -> None:
    with (
        cheating(keys, lambda fetch: endless(b"")) as port,
        pytest.raises(Refused, match="record: found over"),
    ):
        shop.at(port).look()


def test_a_server_that_swaps_files_between_two_releases(
    keys: DevelopmentKeys, shop: Shop, recognizers: list[Made]
) -> None:
    """The card is of one release, the model of the next."""
    card = recognizers[0].release(1).files[0].digest
    files = {True: recognizers[0].files["card.json"], False: recognizers[1].files["model.safetensors"]}
    script = handing_out(
        recognizers[0], recognizers[0].signed(1), lambda digest: frames(files[digest == card])
    )
    with cheating(keys, script) as port, pytest.raises(ReleaseRefused, match=r"model\.safetensors: found"):
        shop.at(port).look()
    assert shop.in_use is None


def test_a_server_that_answers_nothing_is_left(
    keys: DevelopmentKeys, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_stream, "ANSWER_SECONDS", 0.3)

    def silent(fetch: Fetch) -> Iterator[bytes]:
        time.sleep(2)
        yield from ()

    with cheating(keys, silent) as port, pytest.raises(Lost):
        shop.at(port).look()


def test_a_server_that_trickles_is_left(
    keys: DevelopmentKeys, shop: Shop, recognizers: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each frame comes soon enough to look alive; all of them together would take too long."""
    monkeypatch.setattr(release_stream, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(updates, "TRIES", 1)
    large = Made.__new__(Made)
    large.files = recognizers[0].files | {"card.json": bytes(1 << 20)}

    def trickle(digest: bytes) -> Iterator[bytes]:
        for _ in range(4):
            time.sleep(0.2)
            yield full()

    monkeypatch.setattr(release_stream, "MIN_BYTES_PER_SECOND", 10**9)
    script = handing_out(large, large.signed(1), trickle)
    with cheating(keys, script) as port, pytest.raises(Lost, match="cancelled"):
        shop.at(port).look()


def test_a_broken_download_starts_over(keys: DevelopmentKeys, shop: Shop, recognizers: list[Made]) -> None:
    made, streams = recognizers[0], []
    by_digest = {hashlib.sha256(data).digest(): data for data in made.files.values()}

    def breaking(digest: bytes) -> Iterator[bytes]:
        streams.append(digest)
        if len(streams) == 2:
            raise ConnectionError  # in the middle of the model
        return frames(by_digest[digest])

    with cheating(keys, handing_out(made, made.signed(1), breaking)) as port:
        assert shop.at(port).look() is not None
    assert shop.in_use == made.digest
    assert len(streams) == 4, "the card and a broken model, then both"


def test_a_server_of_the_release_before_hands_nothing_out(keys: DevelopmentKeys, shop: Shop) -> None:
    with cheating(keys, lambda fetch: iter(()), methods=()) as port, pytest.raises(NotServed):
        shop.at(port).look()


# -- the keeper ---------------------------------------------------------------------------------------------------


class Owner:
    """What the owner hears, and whether the daemon may look."""

    def __init__(self) -> None:
        self.lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.may = True

    def note(self, kind: str, text: str) -> None:
        self.lines.put((kind, text))


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Owner:
    monkeypatch.setattr(updates, "REST_SECONDS", 0.05)
    monkeypatch.setattr(updates, "SPREAD_SECONDS", 0.01)
    return Owner()


def test_the_keeper_looks_on_connecting_and_when_nudged_and_says_each_thing_once(
    server: StreamServer, shelf: Shelf, shop: Shop, owner: Owner, recognizers: list[Made], tmp_path: Path
) -> None:
    shelf.signed = recognizers[0].signed(1)
    shop.at(server.port)
    owner.may = False
    with UpdateKeeper(shop.updates, lambda: owner.may, owner.note) as keeper:
        keeper.nudge()
        time.sleep(0.2)
        assert owner.lines.empty(), "not while it may not"
        owner.may = True
        assert owner.lines.get(timeout=WAIT) == (
            "release",
            "The league released version 1: better shoes. It is in use now.",
        )
        refused = Made(tmp_path / "other", classes=("shirt", "shoe", "hat"))
        shelf.add(refused)
        shelf.signed = refused.signed(2)
        keeper.nudge()
        kind, text = owner.lines.get(timeout=WAIT)
        assert kind == "not-taken"
        assert "it also has 'hat'; it lacks 'bag'" in text
        opened = len(shelf.opened)
        keeper.nudge()
        while len(shelf.opened) == opened:
            time.sleep(0.01)
        shelf.signed = recognizers[1].signed(3, version=2)
        keeper.nudge()
        assert owner.lines.get(timeout=WAIT)[0] == "release", "the refusal is not told again"
    assert shop.in_use == recognizers[1].digest


def test_the_keeper_says_nothing_before_the_first_training_nor_of_a_server_that_is_down(
    shop: Shop, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "LOOK_SECONDS", 0.05)
    with UpdateKeeper(shop.updates, lambda: owner.may, owner.note):
        time.sleep(0.2)
        shop.at(1)
        time.sleep(0.3)
    assert owner.lines.empty()


# -- the owner's commands -----------------------------------------------------------------------------------------


@pytest.fixture
def typed(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that calls hanse-client with the shop's file, changed by `policy`."""

    def call(*words: str, **policy: str) -> tuple[int, str, str]:
        found = settings | {"policy": settings["policy"] | policy}
        path = tmp_path / "hanse-client.yaml"
        path.write_text(json.dumps(found, default=lambda value: str(value)))
        monkeypatch.setattr(sys, "argv", ["hanse-client", *words, "--config", str(path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.out, " ".join(said.err.split())

    return call


def test_the_owner_takes_a_release_by_hand_and_classify_uses_it(
    server: StreamServer, shelf: Shelf, shop: Shop, recognizers: list[Made], settings: dict[str, Any],
    typed: Callable[..., tuple[int, str, str]],
) -> None:  # fmt: skip
    photo = str(next(settings["photos"].rglob("*.png")))
    code, _, err = typed("update")
    assert code == 10
    assert "the first one says where recognizers come from" in err
    shop.at(server.port)
    assert typed("update")[:2] == (0, "The league has released none yet.\n")
    code, _, err = typed("classify", photo)
    assert code == 10
    assert "the league has released none yet" in err
    shelf.signed = recognizers[0].signed(1)
    shop.look(take=False)
    assert "version 1 is not taken yet: hanse-client update" in _status(shop)
    assert typed("update", updates="manual")[1] == (
        "The league released version 1: better shoes. It is in use now.\n"
    )
    assert typed("update")[1] == "Version 1 is the newest, and in use.\n"
    assert "the league's version 1, its release 1" in _status(shop)
    code, out, _ = typed("classify", "--json", photo)
    assert code == 0
    assert set(json.loads(out)["probabilities"]) == {"shirt", "shoe", "bag"}


def _status(shop: Shop) -> str:
    return running._recognizer(shop.config)


def test_a_refusal_names_what_differs_and_is_exit_code_27(
    server: StreamServer, shelf: Shelf, shop: Shop, tmp_path: Path, typed: Callable[..., tuple[int, str, str]]
) -> None:
    other = Made(tmp_path / "other", classes=("shirt", "shoe", "hat"))
    shelf.add(other)
    shelf.signed = other.signed(1)
    shop.at(server.port)
    code, _, err = typed("update")
    assert code == 27
    assert "it also has 'hat'; it lacks 'bag'" in err
    shop.at(1)
    code, _, err = typed("update")
    assert code == 27
    assert "The server could not be asked" in err
