"""Recognizers are released while the shop's programs ask, over HTTP and gRPC: not one request fails.

Some have another head, others another embedding, for which the gallery's photos are embedded anew meanwhile.
"""

import base64
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tests.client.recognition.shop import recipe
from tests.client.released import Made

from hanse_client.gallery.gallery import Gallery
from hanse_client.recognition import following
from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving.recognition_pb2_grpc import RecognitionStub
from hanse_common.vision.photo import decode
from hanse_common.vision.recognizer import Recognizer

from .conftest import WAIT, Served, photo, picture, release, running

STOCK = 16
"""Products S-0, S-1, …, which stay; each shows the picture of its number."""

SAME = 0.98
"""Two vectors of one photo in one embedding are at least so similar; in two embeddings they are far from it."""


def lines(prefix: str, seeds: range) -> bytes:
    """Products to import, each with the picture of its seed."""
    return b"".join(
        json.dumps({"sku": f"{prefix}-{seed}", "photos": [base64.b64encode(picture(seed)).decode()]}).encode()
        + b"\n"
        for seed in seeds
    )


def imported(client: httpx.Client, content: bytes) -> None:
    headers = {"Content-Type": "application/x-ndjson"}
    started = client.post("/v1/imports", content=content, headers=headers).raise_for_status().json()
    until = time.monotonic() + WAIT
    while (found := client.get(f"/v1/imports/{started['id']}").raise_for_status().json())[
        "state"
    ] == "running":
        assert time.monotonic() < until, found
        time.sleep(0.01)
    assert (found["state"], found["failed"]) == ("done", 0), found


class Load:
    """Programs that ask without a pause until the end: what they were answered by, and what went wrong.

    Short answers are failures, and so is a photo that is not as good as equal to itself.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self.over = threading.Event()
        self.recognizers: list[str] = []
        self.failures: list[str] = []
        self.asked: dict[str, int] = {}
        work = (self._photos, self._products, self._writer, self._imports, self._calls, self._stream)
        self._threads = [threading.Thread(target=self._kept, args=(each,)) for each in work]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(WAIT)

    def _kept(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.failures.append(f"{work.__name__}: {error!r}")

    def went_on(self, before: dict[str, int]) -> bool:
        """Return whether each program has been answered again since it was as often as `before`."""
        return len(self.asked) == 6 and all(count > before.get(name, 0) for name, count in self.asked.items())

    def _rounds(self, name: str) -> Iterator[int]:
        """Yield the number of a product until the end, again and again."""
        while not self.over.is_set():
            done = self.asked.get(name, 0)
            yield done % STOCK
            self.asked[name] = done + 1

    def _photos(self) -> None:
        with self._served.client() as client:
            for number in self._rounds("photos"):
                shown = photo(number)
                answer = client.post("/v1/classify", **shown).raise_for_status().json()
                assert len(answer["classes"]) == 3, answer
                self.recognizers.append(answer["recognizer"])
                found = client.post("/v1/search", params={"k": 8}, **shown).raise_for_status().json()
                assert len(found["matches"]) == 8, found
                first = found["matches"][0]
                assert first["product"]["sku"] == f"S-{number}" and first["similarity"] > SAME, found
                vector = client.post("/v1/embed", **shown).raise_for_status().json()["vector"]
                assert abs(np.linalg.norm(vector) - 1) < 1e-3, vector

    def _products(self) -> None:
        with self._served.client() as client:
            for number in self._rounds("products"):
                for diversity in (0, 0.5):
                    params = {"k": 4, "diversity": diversity}
                    found = client.get(f"/v1/products/S-{number}/similar", params=params).raise_for_status()
                    assert len(skus := sku_set(found)) == 4 and f"S-{number}" not in skus, found.text
                viewed = [f"S-{number}", f"S-{(number + 1) % STOCK}"]
                found = client.get("/v1/suggestions", params={"viewed": viewed, "k": 4}).raise_for_status()
                assert len(skus := sku_set(found)) == 4 and not skus & set(viewed), found.text

    def _writer(self) -> None:
        with self._served.client() as client:
            for _ in self._rounds("writer"):
                client.put("/v1/products/W", json={}).raise_for_status()
                client.post("/v1/products/W/photos", **photo(901)).raise_for_status()
                found = client.post("/v1/search", params={"k": 1}, **photo(901)).raise_for_status().json()
                assert found["matches"][0]["product"]["sku"] == "W", found
                client.delete("/v1/products/W").raise_for_status()

    def _imports(self) -> None:
        with self._served.client() as client:
            for _ in self._rounds("imports"):
                imported(client, lines("I", range(910, 912)))
                for seed in range(910, 912):
                    client.delete(f"/v1/products/I-{seed}").raise_for_status()

    def _calls(self) -> None:
        metadata = (("authorization", f"Bearer {self._served.token}"),)
        with grpc.insecure_channel(self._served.authority) as channel:
            stub = RecognitionStub(channel)

            def call(method: str, request: Any) -> Any:
                return getattr(stub, method)(request, metadata=metadata, timeout=WAIT)

            for number in self._rounds("calls"):
                found = call("Search", pb.SearchRequest(photo=picture(number), k=8))
                first = found.matches[0]
                assert (len(found.matches), first.product.sku) == (8, f"S-{number}"), found
                assert first.similarity > SAME, found
                similar = call("Similar", pb.SimilarRequest(sku=f"S-{number}", k=4, diversity=0.5))
                assert len({match.product.sku for match in similar.matches} - {f"S-{number}"}) == 4, similar
                suggested = call("Suggest", pb.SuggestRequest(viewed=[f"S-{number}"], k=4))
                assert len(suggested.matches) == 4, suggested
                assert len(call("Classify", pb.ClassifyRequest(photo=picture(number))).classes) == 3
                assert call("Embed", pb.EmbedRequest(photo=picture(number))).vector
                product = pb.PutProductRequest(product=pb.Product(sku="G"), photos=[picture(902)])
                (answer,) = call("ImportProducts", iter([product]))
                assert answer.HasField("done"), answer
                assert call("RemoveProduct", pb.RemoveProductRequest(sku="G")).removed

    def _stream(self) -> None:
        metadata = (("authorization", f"Bearer {self._served.token}"),)

        def photos() -> Iterator[pb.Photo]:
            for place in itertools.count():
                if self.over.wait(0.02):  # else hundreds are on their way, and the others wait
                    return
                yield pb.Photo(id=str(place), photo=picture(place % STOCK), k=8)

        with grpc.insecure_channel(self._served.authority) as channel:
            for place, answer in enumerate(RecognitionStub(channel).Recognize(photos(), metadata=metadata)):
                found = answer.recognized.found.matches
                assert answer.id == str(place) and len(found) == 8, answer
                first = found[0]
                assert first.product.sku == f"S-{place % STOCK}" and first.similarity > SAME, answer
                self.asked["stream"] = place + 1


def sku_set(answer: httpx.Response) -> set[str]:
    return {match["product"]["sku"] for match in answer.json()["matches"]}


def answers_are_those_of(made: Path, client: httpx.Client) -> None:
    """Hold what is answered against the league's own code, which embeds and classifies in another way."""
    recognizer = Recognizer.load(made)
    images = [decode(picture(number)) for number in range(STOCK)]
    features = recognizer.features(images)
    shares, vectors = recognizer.probabilities(features), recognizer.embeddings(features)
    stored = [decode(Gallery.prepare(image)) for image in images]
    similarities = vectors @ recognizer.embeddings(recognizer.features(stored)).T
    for number in range(0, STOCK, 5):
        classes = client.post("/v1/classify", **photo(number)).raise_for_status().json()["classes"]
        assert [each["probability"] for each in classes] == pytest.approx(
            sorted(shares[number], reverse=True), abs=1e-3
        )
        found = client.post("/v1/embed", **photo(number)).raise_for_status().json()
        assert found["embedding"] == recognizer.embedding_digest().hex()
        assert found["vector"] == pytest.approx(vectors[number].tolist(), abs=2e-3)
        matches = client.post("/v1/search", params={"k": STOCK}, **photo(number)).json()["matches"]
        assert [match["similarity"] for match in matches] == pytest.approx(
            sorted(similarities[number], reverse=True), abs=2e-3
        )
        assert len(matches) == STOCK


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a release be found soon, and the gallery be embedded anew in many steps, between which all others ask."""
    monkeypatch.setattr(following, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(following, "CHUNK", 4)


def swap(folder: Path, releases: list[tuple[int, int]], wait_until: Callable[..., Any], pause: float) -> None:
    """Release one recognizer after the other, each of an embedding and a head with these numbers."""
    made = {
        number: Made(folder / f"made-{number}", seed=head, recipe=recipe(embedding))
        for number, (embedding, head) in enumerate(releases, 2)
    }
    with running(folder) as served, served.client() as client:
        imported(client, lines("S", range(STOCK)))
        with Load(served) as load:
            for number, each in made.items():
                release(served.config, each, number)
                wait_until(
                    f"release {number}",
                    lambda each=each: each.digest in load.recognizers[-50:] or load.failures,
                )
                since = dict(load.asked)
                wait_until("all programs", lambda since=since: load.went_on(since) or load.failures)
                time.sleep(pause)
        assert not load.failures, load.failures
        assert {each.digest for each in made.values()} <= set(load.recognizers)
        assert {product["sku"] for product in client.get("/v1/products").json()["products"]} == {
            f"S-{number}" for number in range(STOCK)
        }
        answers_are_those_of(folder / f"made-{len(releases) + 1}", client)
        status = client.get("/v1/status").json()
        assert status["problem"] is None and status["version"] == len(releases) + 1


def test_other_heads_and_embeddings_are_released_under_load_and_no_request_fails(
    tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    swap(tmp_path, [(1, 1), (1, 2), (2, 3)], wait_until, 0.0)


@pytest.mark.slow
def test_twelve_releases_of_six_embeddings_under_load_and_no_request_fails(
    tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    swap(tmp_path, [(number // 2, number) for number in range(12)], wait_until, 2.0)


def test_the_console_tells_once_of_each_recognizer_that_serves_or_cannot(
    tmp_path: Path, wait_until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "RETRY_SECONDS", 0.05)
    with running(tmp_path) as served:
        begun = len(served.told)

        def told() -> list[str]:
            return served.told[begun:]

        release(served.config, Made(tmp_path / "made-2", seed=2), 2)
        wait_until("the second", told)
        damaged = Made(tmp_path / "made-3", seed=3)
        folder = served.config.recognizers_path / damaged.digest
        folder.mkdir()
        for name, data in damaged.files.items():
            (folder / name).write_bytes(data[:-1] if name == "model.safetensors" else data)
        (served.config.recognizers_path / "link").symlink_to(folder.name)
        (served.config.recognizers_path / "link").rename(served.config.recognizers_path / "current")
        wait_until("the damaged one", lambda: len(told()) > 1)
        with served.client() as client:
            assert client.get("/v1/status").json()["problem"]
            client.put("/v1/products/A", json={}).raise_for_status()
            client.post("/v1/products/A/photos", **photo(1)).raise_for_status()
        time.sleep(0.3)  # it is tried some more times, which is nothing new
        release(served.config, Made(tmp_path / "made-4", seed=4, recipe=recipe(1)), 4)
        wait_until("the fourth", lambda: len(told()) > 2)
        second, third, fourth = told()
    assert second == "Another recognizer serves from now on: version 2, 3 classes."
    assert third.startswith("Another recognizer cannot serve, so the one before goes on: ")
    assert "model.safetensors" in third
    assert fourth == "Another recognizer serves from now on: version 4, 3 classes."


def test_a_console_that_is_gone_stops_nobody(tmp_path: Path, wait_until: Callable[..., Any]) -> None:
    class Gone(list[str]):
        def append(self, line: str) -> None:
            if line.startswith("Another"):
                raise BrokenPipeError
            super().append(line)

    with running(tmp_path, told=Gone()) as served, served.client() as client:
        for number in (2, 3):
            release(served.config, Made(tmp_path / f"made-{number}", seed=number), number)
            wait_until("the other", lambda: client.get("/v1/status").json()["version"] == number)  # noqa: B023
        assert client.get("/v1/status").json()["problem"] is None
