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

import httpx
import pytest

from hanse_client.serving import limits

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


def test_a_client_that_goes_in_the_middle_leaves_its_place(strict: Served) -> None:
    for _ in range(6):
        with connect(strict) as one:
            one.sendall(head(strict, "/v1/classify", 1000) + b"x")
    with strict.client() as client:
        for _ in range(100):
            if client.post("/v1/classify", **photo(1)).status_code == 200:
                return
            time.sleep(0.05)
    raise AssertionError("places are lost")


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
        with contextlib.suppress(TimeoutError):
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


def test_two_hundred_connections_do_no_harm(served: Served) -> None:
    many = [connect(served) for _ in range(200)]
    try:
        with served.client() as client:
            assert client.post("/v1/classify", **photo(1)).status_code == 200
    finally:
        for one in many:
            one.close()


def test_more_connections_than_there_is_room_for_are_closed_at_once(
    strict: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 20)
    many = [connect(strict) for _ in range(30)]
    closed = 0
    for one in many:
        one.settimeout(0.2)
        try:
            closed += one.recv(1) == b""
        except TimeoutError:
            pass
        except ConnectionError:
            closed += 1
        one.close()
    assert closed >= 10


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
