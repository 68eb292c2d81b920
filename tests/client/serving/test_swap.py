"""Recognizers are released while the shop's programs ask, over HTTP and gRPC: not one request fails."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.client.released import Made

from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving.recognition_pb2_grpc import RecognitionStub

from .conftest import WAIT, Served, photo, picture, release, running


class Load:
    """Programs that ask without a pause until the end: what they were answered by, and what went wrong."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self.over = threading.Event()
        self.recognizers: list[str] = []
        self.failures: list[str] = []
        self.requests = 0
        work = (self._http, self._http, self._writer, self._calls, self._stream)
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
            self.failures.append(repr(error))

    def _http(self) -> None:
        with self._served.client() as client:
            while not self.over.is_set():
                answer = client.post("/v1/classify", **photo(1)).raise_for_status()
                self.recognizers.append(answer.json()["recognizer"])
                found = client.post("/v1/search", **photo(1)).raise_for_status().json()
                assert found["matches"][0]["product"]["sku"] == "S-1", found
                self.requests += 2

    def _writer(self) -> None:
        with self._served.client() as client:
            while not self.over.is_set():
                client.put("/v1/products/W", json={}).raise_for_status()
                client.post("/v1/products/W/photos", **photo(9)).raise_for_status()
                client.delete("/v1/products/W").raise_for_status()
                self.requests += 3

    def _calls(self) -> None:
        metadata = (("authorization", f"Bearer {self._served.token}"),)
        with grpc.insecure_channel(self._served.authority) as channel:
            stub = RecognitionStub(channel)
            while not self.over.is_set():
                request = pb.SearchRequest(photo=picture(2), k=1)
                found = stub.Search(request, metadata=metadata, timeout=WAIT)
                assert found.matches[0].product.sku == "S-2", found
                self.requests += 1

    def _stream(self) -> None:
        metadata = (("authorization", f"Bearer {self._served.token}"),)

        def photos() -> Iterator[pb.Photo]:
            number = 0
            while not self.over.is_set():
                yield pb.Photo(id=str(number), photo=picture(3), k=1)
                number += 1

        with grpc.insecure_channel(self._served.authority) as channel:
            for number, answer in enumerate(RecognitionStub(channel).Recognize(photos(), metadata=metadata)):
                assert answer.id == str(number), answer
                assert answer.recognized.found.matches[0].product.sku == "S-3", answer
                self.requests += 1


def swap(folder: Path, releases: int, wait_until: Callable[..., Any], pause: float) -> None:
    made = [Made(folder / f"made-{number}", seed=number) for number in range(2, releases + 2)]
    with running(folder) as served:
        with served.client() as client:
            for number in range(5):
                client.put(f"/v1/products/S-{number}", json={}).raise_for_status()
                client.post(f"/v1/products/S-{number}/photos", **photo(number)).raise_for_status()
        with Load(served) as load:
            for number, each in enumerate(made, 2):
                release(served.config, each, number)
                wait_until(
                    f"release {number}",
                    lambda each=each: each.digest in load.recognizers[-50:] or load.failures,
                )
                time.sleep(pause)
        assert not load.failures, load.failures
        assert {each.digest for each in made} <= set(load.recognizers)
        assert load.requests > 10 * releases


def test_two_releases_under_load_and_no_request_fails(tmp_path: Path, wait_until: Callable[..., Any]) -> None:
    swap(tmp_path, 2, wait_until, 0.1)


@pytest.mark.slow
def test_twelve_releases_under_load_and_no_request_fails(
    tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    swap(tmp_path, 12, wait_until, 2.0)
