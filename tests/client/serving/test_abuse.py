"""Whoever asks too much, too slowly, from elsewhere or as somebody else gets a clear answer, and nobody waits."""

import contextlib
import io
import socket
import sqlite3
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from hanse_client.serving import limits
from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving.recognition_pb2_grpc import RecognitionStub

from .conftest import WAIT, Served, photo, picture, running
from .test_rest import problem


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service with room for little."""
    with running(
        tmp_path_factory.mktemp("strict"), requests=2, seconds=1, photo_megabytes=1, import_megabytes=1
    ) as one:
        yield one


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.config.serve.port), timeout=WAIT)


def head(served: Served, path: str, length: int, kind: str = "image/jpeg") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {served.token}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


@pytest.mark.parametrize(
    "token", ["", "Bearer", "Bearer x", f"Bearer {'x' * 43}", "Basic eDp4", "Bearer ümlaut"]
)
def test_another_token_opens_nothing(served: Served, token: str) -> None:
    with httpx.Client(base_url=served.url, headers={"Authorization": token.encode("latin-1")}) as stranger:
        for method, path in (("GET", "/v1/status"), ("DELETE", "/v1/products/A"), ("GET", "/v1/nothing")):
            answer = stranger.request(method, path)
            problem(answer, 401, "token_needed")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert stranger.get("/health").status_code == 200


def test_a_new_token_closes_the_old_one_out(served: Served) -> None:
    path = served.config.state / "serve.token"
    before = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    with served.client() as client:
        path.write_bytes(b"y" * 43)
        try:
            problem(client.get("/v1/status"), 401, "token_needed")
            path.chmod(0o644)
            answer = client.get("/v1/status", headers={"Authorization": f"Bearer {'y' * 43}"})
            problem(answer, 401, "token_needed")
        finally:
            path.write_bytes(before)
            path.chmod(0o600)
        assert client.get("/v1/status").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_origin_is_refused_even_with_the_token(
    client: httpx.Client, headers: dict[str, str]
) -> None:
    client.put("/v1/products/A", json={}).raise_for_status()
    for method, path, options in (
        ("POST", "/v1/classify", photo(1)),
        ("DELETE", "/v1/products/A", {}),
        ("GET", "/v1/products", {}),
        ("OPTIONS", "/v1/products/A", {}),
    ):
        answer = client.request(method, path, **options | {"headers": options.get("headers", {}) | headers})  # type: ignore[operator]
        problem(answer, 403, "other_origin")
        assert "access-control-allow-origin" not in answer.headers
    assert client.get("/v1/products/A").status_code == 200
    own = {"Origin": str(client.base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    assert client.get("/v1/products/A", headers=own).status_code == 200


def test_without_a_token_other_origins_are_refused_all_the_same(tmp_path: Path) -> None:
    with (
        running(tmp_path, token=False, grpc_port=None) as served,
        httpx.Client(base_url=served.url) as program,
    ):
        assert program.post("/v1/classify", **photo(1)).status_code == 200
        forged = {"Origin": "https://evil.example", "Content-Type": "image/jpeg"}
        problem(program.post("/v1/classify", content=picture(1), headers=forged), 403, "other_origin")
        problem(program.get("/v1/status", headers={"Host": "evil.example"}), 421, "wrong_host")
        assert "No token is needed" in "\n".join(served.told)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.1.1", ""])
def test_another_name_is_not_served(client: httpx.Client, host: str) -> None:
    for path in ("/v1/status", "/health", "/", "/openapi.json"):
        problem(client.get(path, headers={"Host": host}), 421, "wrong_host")


def test_too_large_a_photo_is_refused_announced_or_not(strict: Served) -> None:
    with strict.client() as client:
        large = {"Content-Type": "image/jpeg"}
        problem(client.post("/v1/classify", content=bytes(2 << 20), headers=large), 413, "too_large")
        parts = iter([bytes(1 << 19)] * 4)
        problem(client.post("/v1/classify", content=parts, headers=large), 413, "too_large")
        json = {"Content-Type": "application/json"}
        problem(client.put("/v1/products/A", content=b" " * (65 << 10), headers=json), 413, "too_large")
        lines = {"Content-Type": "application/x-ndjson"}
        problem(client.post("/v1/imports", content=b"\n" * (2 << 20), headers=lines), 413, "too_large")
        assert client.get("/v1/products").json()["products"] == []


def bomb() -> bytes:
    """A PNG of some kilobytes with 900 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header(client: httpx.Client) -> None:
    answer = client.post("/v1/classify", content=bomb(), headers={"Content-Type": "image/png"})
    assert "pixels" in problem(answer, 413, "photo_too_large")


def test_forms_with_parts_are_not_parsed(client: httpx.Client) -> None:
    for content in (b"--x\r\n", b"--x" * 10_000, b""):
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        problem(client.post("/v1/classify", content=content, headers=kind), 415, "wrong_content_type")
    files = {"photo": ("a.jpg", io.BytesIO(picture(1)), "image/jpeg")}
    problem(client.post("/v1/search", files=files), 415, "wrong_content_type")


def test_a_slow_content_is_given_up_and_its_place_taken_by_others(strict: Served) -> None:
    slow = [connect(strict) for _ in range(2)]
    for one in slow:
        one.sendall(head(strict, "/v1/classify", 1000) + b"x")
    with strict.client() as client:
        time.sleep(0.3)
        answer = client.post("/v1/classify", **photo(1))
        problem(answer, 503, "busy")
        assert answer.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200, "health answers whatever the load"
        for one in slow:
            assert one.recv(4096).startswith(b"HTTP/1.1 408")
            one.close()
        assert client.post("/v1/classify", **photo(1)).status_code == 200


def test_a_client_that_goes_in_the_middle_leaves_its_place_and_no_fault_in_the_log(
    strict: Served, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(6):
        with connect(strict) as one:
            one.sendall(head(strict, "/v1/classify", 1000) + b"x")
    with strict.client() as client:
        for _ in range(100):
            if client.post("/v1/classify", **photo(1)).status_code == 200:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("places are lost")
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def test_connections_that_say_nothing_are_closed(strict: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.3)
    with connect(strict) as silent, connect(strict) as slow, connect(strict) as second:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        second.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea")
        for one in (silent, slow):
            with pytest.raises(ConnectionError):
                assert one.recv(1) == b""
                raise ConnectionResetError
        said = b""
        with pytest.raises(ConnectionError):
            while part := second.recv(4096):
                said += part
            raise ConnectionResetError
        assert said.startswith(b"HTTP/1.1 200")


def test_answers_that_nobody_reads_give_their_place_back(
    strict: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "READ_SECONDS", 0.5)
    unread = []
    for _ in range(2):  # as many as there are places; no token is needed to ask for the description
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", strict.config.serve.port))
        one.settimeout(0.3)
        # Until nothing more goes, or the service has already given the connection up.
        with contextlib.suppress(TimeoutError, ConnectionError):
            while True:
                one.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20)
        unread.append(one)
    try:
        with strict.client() as client:
            for _ in range(100):
                if client.get("/v1/status").status_code == 200:
                    return
                time.sleep(0.1)
        raise AssertionError("places are lost")
    finally:
        for one in unread:
            one.close()


ASKED = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def is_closed(one: socket.socket, within: float = WAIT) -> bool:
    """Return whether the service closes a connection on which it has no more to say."""
    one.settimeout(within)
    try:
        while one.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("said", [b"", ASKED[:20], ASKED], ids=["silent", "half a head", "answered and kept"])
def test_three_hundred_idle_connections_keep_no_client_out(served: Served, said: bytes) -> None:
    """The oldest idle ones go as new ones come, faster than any time runs out."""
    with served.client() as client, contextlib.ExitStack() as open_:
        many = []
        for _ in range(300):
            many.append(open_.enter_context(connect(served)))
            many[-1].sendall(said)
        for _ in range(3):
            with served.client() as another:
                assert another.post("/v1/classify", **photo(1)).status_code == 200
            assert client.get("/v1/status").status_code == 200
        assert is_closed(many[0], within=3) and not is_closed(many[-1], within=0.1)


def test_three_hundred_idle_connections_to_grpc_keep_no_client_out(served: Served) -> None:
    with contextlib.ExitStack() as open_:
        for _ in range(300):
            where = ("127.0.0.1", served.config.serve.grpc_port)
            open_.enter_context(socket.create_connection(where, timeout=WAIT))
        channel = open_.enter_context(grpc.insecure_channel(served.authority))
        metadata = [("authorization", f"Bearer {served.token}")]
        request = pb.ClassifyRequest(photo=picture(1))
        found = RecognitionStub(channel).Classify(request, metadata=metadata, timeout=WAIT)
        assert found.classes


def test_idle_connections_that_come_again_and_again_keep_no_client_out(served: Served) -> None:
    stop = threading.Event()

    def flood() -> None:
        many: list[socket.socket] = []
        while not stop.is_set():
            with contextlib.suppress(OSError):
                many.append(connect(served))
            for one in many[:-300]:
                one.close()
            del many[:-300]
        for one in many:
            one.close()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        time.sleep(0.3)
        for _ in range(10):
            with served.client() as client:
                assert client.post("/v1/classify", **photo(1)).status_code == 200
    finally:
        stop.set()
        thread.join(WAIT)


def test_the_oldest_idle_connections_make_room_and_busy_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 5)
    with running(tmp_path, grpc_port=None) as served, contextlib.ExitStack() as open_:
        busy = [open_.enter_context(connect(served)) for _ in range(2)]
        for one in busy:
            one.sendall(head(served, "/v1/classify", 1000) + b"x")
        idle = [open_.enter_context(connect(served)) for _ in range(3)]
        idle[0].sendall(ASKED)  # so it is idle for a shorter time than the others
        time.sleep(0.3)
        idle.append(open_.enter_context(connect(served)))
        assert is_closed(idle[1], within=3) and not any(is_closed(idle[n], within=0.1) for n in (0, 2, 3))
        monkeypatch.setattr(limits, "MAX_CONNECTIONS", 2)
        new = []
        for _ in range(4):
            new.append(open_.enter_context(connect(served)))
            time.sleep(0.05)
        assert all(is_closed(one, within=3) for one in (*idle, new[0])), (
            "each new one takes an old one's place"
        )
        for one in new:
            one.close()
        time.sleep(0.3)
        assert is_closed(open_.enter_context(connect(served)), within=3), (
            "there is no room beside the busy ones"
        )
        for one in busy:
            one.sendall(bytes(999))
            one.settimeout(WAIT)
            assert one.recv(4096).startswith(b"HTTP/1.1 422"), "no photo, but heard to its end"


def test_clients_that_do_not_read_make_room_long_before_their_time(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(limits, "READ_SECONDS", WAIT)
    with contextlib.ExitStack() as open_:
        for _ in range(4):
            one = open_.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", served.config.serve.port))
            one.settimeout(0.3)
            with contextlib.suppress(OSError):
                while True:
                    one.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20)
        end = time.monotonic() + limits.HEAD_SECONDS
        while time.monotonic() < end:
            with served.client() as client, contextlib.suppress(httpx.TransportError):
                assert client.get("/v1/status").status_code == 200
                return
    raise AssertionError("they keep others out")


def test_heads_and_contents_that_dribble_are_closed(strict: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then gains no time, on a new connection or a kept one."""
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.5)
    started = time.monotonic()
    with contextlib.ExitStack() as open_:
        new, kept, content = (open_.enter_context(connect(strict)) for _ in range(3))
        kept.sendall(ASKED)
        content.sendall(head(strict, "/v1/classify", 100_000))
        dribbling = {new, kept, content}
        while dribbling and time.monotonic() < started + WAIT:
            for one in tuple(dribbling):
                try:
                    one.sendall(b"G")
                except OSError:
                    dribbling.discard(one)
            time.sleep(0.05)
        assert not dribbling and time.monotonic() < started + 15


def test_forty_at_once_are_all_answered_or_told_to_come_again(served: Served) -> None:
    answers: list[Any] = []

    def ask(seed: int) -> None:
        with served.client() as client:
            answers.append(client.post("/v1/search", **photo(seed)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(answers) == 40
    for answer in answers:
        assert answer.status_code == 200 or problem(answer, 503, "busy")
    assert sum(answer.status_code == 200 for answer in answers) >= 20


def test_errors_tell_no_folder_of_this_machine(tmp_path: Path) -> None:
    with running(tmp_path / "my shop") as served, served.client() as client:
        with contextlib.closing(sqlite3.connect(served.config.gallery_path / "gallery.sqlite")) as other:
            other.execute("DROP TABLE rejection")
            other.commit()
        said = problem(client.get("/v1/status"), 409, "not_kept")
        assert said.startswith("gallery.sqlite: ") and "my shop" not in said
