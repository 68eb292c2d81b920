"""A shop whose recognizer is served on loopback, by REST and gRPC, with a small recognizer that the league released."""

import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from tests.client.released import CLASSES, OPERATOR, Made

from hanse_client.config import ClientConfig
from hanse_client.releases import Releases
from hanse_client.serving import server
from hanse_client.serving.access import read_token
from hanse_common import signing

WAIT = 60.0


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def picture(seed: int, kind: str = "JPEG", size: int = 48) -> bytes:
    """A photo's file: large patches of gray, another one for each seed."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(patches).resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(data, kind)
    return data.getvalue()


def settings_in(folder: Path, **serve: Any) -> dict[str, Any]:
    """A shop's file, with a released recognizer in its state folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "photos").mkdir(exist_ok=True)
    http, grpc = free_ports(2)
    return {
        "photos": "photos",
        "state": "state",
        "device": "cpu",
        "league": {
            "operator_key": signing.public_bytes(OPERATOR).hex(),
            "charter": "00" * 32,
            "taxonomy": {"classes": list(CLASSES)},
        },
        "policy": {"league": "test", "epsilon": 6.0, "delta": 2e-5},
        "resources": {"niceness": 0, "threads": 1},
        "serve": {"port": http, "grpc_port": grpc} | serve,
    }


def release(config: ClientConfig, made: Made, number: int) -> None:
    """Have the league release `made` as its release of that number, and the shop take it."""
    releases = Releases.of(config)
    releases.take(releases.consider(made.signed(number, version=number)), made.fetch)


@dataclass
class Served:
    """A service that runs."""

    config: ClientConfig
    source: Path
    told: list[str]

    @property
    def url(self) -> str:
        return self.config.serve.address

    @property
    def token(self) -> str:
        return read_token(self.config) or ""

    @property
    def authority(self) -> str:
        return f"{self.config.serve.host}:{self.config.serve.grpc_port}"

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=WAIT, **options)


@contextmanager
def running(
    folder: Path, *, private: bool = True, told: list[str] | None = None, **serve: Any
) -> Iterator[Served]:
    """Serve a shop in `folder` while entered, as the command does, in a thread."""
    written = settings_in(folder, **serve)
    source = folder / "hanse-client.yaml"
    source.write_text(yaml.safe_dump(written))
    from hanse_common.config import load

    config = load(ClientConfig, source)
    release(config, Made(folder / "made"), 1)
    told = [] if told is None else told
    stop, failures = threading.Event(), []

    def run() -> None:
        try:
            server.serve(config, told.append, stop, private=private)
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(int(WAIT / 0.02)):
            if len(told) > 2 or failures:
                break
            thread.join(0.02)
        assert not failures and len(told) > 2, failures
        yield Served(config, source, told)
    finally:
        stop.set()
        thread.join(WAIT)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running(tmp_path_factory.mktemp("shop")) as one:
        yield one


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as one:
        yield one


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let each test begin without products and corrections."""
    yield
    if "served" in request.fixturenames:
        served: Served = request.getfixturevalue("served")
        with served.client() as one:
            while found := one.get("/v1/products").json()["products"]:
                for product in found:
                    one.delete(f"/v1/products/{quoted(product['sku'])}").raise_for_status()
            for each in one.get("/v1/corrections").json()["corrections"]:
                one.delete(f"/v1/corrections/{each['photo']}").raise_for_status()


@pytest.fixture
def twins(client: httpx.Client) -> None:
    """Products A, B and C with one picture in three formats, and five that look different: O-0 to O-4, others."""
    shown = {"A": photo(1), "B": photo(1, "PNG"), "C": photo(1, "WEBP")}
    shown |= {f"O-{number}": photo(10 + number) for number in range(5)}
    for number, (sku, of_it) in enumerate(shown.items()):
        fields = {"price": str(number), "category": "twins" if sku in "ABC" else "others"}
        fields |= {"attributes": {"parity": "even" if number % 2 == 0 else "odd"}}
        client.put(f"/v1/products/{sku}", json=fields).raise_for_status()
        client.post(f"/v1/products/{sku}/photos", **of_it).raise_for_status()


def quoted(sku: str) -> str:
    from urllib.parse import quote

    return quote(sku, safe="")


@pytest.fixture
def stock(client: httpx.Client) -> Callable[[int], None]:
    """Return a function that puts so many products into the gallery, S-0, S-1, … with the picture of their number."""

    def put(count: int) -> None:
        for number in range(count):
            fields = {
                "title": f"product number{number}",
                "price": f"{number}.50",
                "category": "even" if number % 2 == 0 else "odd",
            }
            client.put(f"/v1/products/S-{number}", json=fields).raise_for_status()
            client.post(f"/v1/products/S-{number}/photos", **photo(number)).raise_for_status()

    return put


def photo(seed: int, kind: str = "JPEG") -> dict[str, Any]:
    """What a request with a photo says."""
    return {"content": picture(seed, kind), "headers": {"Content-Type": f"image/{kind.lower()}"}}
