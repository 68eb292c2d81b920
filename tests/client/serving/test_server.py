"""What is listened on: ports, certificates, and the section `serve` of the configuration."""

import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from hanse_client.cli import serving
from hanse_client.config import ClientConfig
from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving import server
from hanse_client.serving.recognition_pb2_grpc import RecognitionStub
from hanse_client.serving.settings import Serve
from hanse_common.config import load
from hanse_common.errors import ConfigError, HanseError, NotServing
from hanse_server.development_keys import DevelopmentKeys

from .conftest import WAIT, photo, picture, running, settings_in

ANY = "0.0.0.0"  # noqa: S104 - never listened on


def test_with_a_certificate_both_speak_tls_alone(tmp_path: Path, keys: DevelopmentKeys) -> None:
    with running(tmp_path, certificate=str(keys.certificate), key=str(keys.key)) as served:
        assert served.url.startswith("https://")
        headers = {"Authorization": f"Bearer {served.token}"}
        context = ssl.create_default_context(cafile=str(keys.authority))
        with httpx.Client(base_url=served.url, headers=headers, verify=context) as client:
            assert client.post("/v1/classify", **photo(1)).status_code == 200
            own = {"Origin": served.url}
            assert client.get("/v1/status", headers=own).status_code == 200
            visitor = client.get("/", params={"token": served.token})
            assert "secure" in visitor.headers["set-cookie"].lower()
        with pytest.raises(httpx.HTTPError):
            httpx.get(served.url.replace("https", "http") + "/health")
        metadata = (("authorization", f"Bearer {served.token}"),)
        trusted = grpc.ssl_channel_credentials(keys.authority.read_bytes())
        with grpc.secure_channel(served.authority, trusted) as channel:
            found = RecognitionStub(channel).Embed(
                pb.EmbedRequest(photo=picture(1)), metadata=metadata, timeout=WAIT
            )
            assert found.vector
        with grpc.insecure_channel(served.authority) as channel, pytest.raises(grpc.RpcError):
            RecognitionStub(channel).Embed(pb.EmbedRequest(photo=picture(1)), metadata=metadata, timeout=5)


def begins(folder: Path, **serve: Any) -> None:
    source = folder / "hanse-client.yaml"
    source.write_text(yaml.safe_dump(settings_in(folder, **serve)))
    server.serve(load(ClientConfig, source), lambda line: None, threading.Event())


def test_a_taken_port_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    """There is no recognizer in the shop: loading it would be another error."""
    for key in ("port", "grpc_port"):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            number = taken.getsockname()[1]
            with pytest.raises(
                NotServing, match=rf"port {number} of 127.0.0.1: cannot be used.*serve\.{key}"
            ):
                begins(tmp_path, **{key: number})


def test_without_a_recognizer_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recognizer"):
        begins(tmp_path)


def test_a_state_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "hanse-client.yaml").write_text(yaml.safe_dump(settings_in(tmp_path)))
    (tmp_path / "state").write_text("a file")
    with pytest.raises(ConfigError, match=r"state: .* cannot be written"):
        serving.serve(tmp_path / "hanse-client.yaml")


def test_a_certificate_that_cannot_be_used_is_told(tmp_path: Path, keys: DevelopmentKeys) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for certificate, key in ((wrong, keys.key), (keys.certificate, wrong), (tmp_path / "none", keys.key)):
        for port in ({"grpc_port": None}, {}):
            with pytest.raises(NotServing):
                begins(tmp_path, certificate=str(certificate), key=str(key), **port)


@pytest.mark.parametrize(
    ("serve", "said"),
    [
        ({"host": ANY}, "certificate and key"),
        ({"host": "shelf.lan"}, "IP address"),
        ({"certificate": "a.crt"}, "found one of them"),
        ({"host": "192.168.1.2", "certificate": "a", "key": "b", "token": False}, "token"),
        ({"host": ANY, "certificate": "a", "key": "b"}, "names"),
        ({"grpc_port": 8766}, "expected another port"),
        ({"names": ["Shelf.LAN"]}, "names"),
        ({"port": 80}, "port"),
        ({"requests": 129}, r"serve\.requests: .*129"),
    ],
)
def test_an_unsafe_section_is_refused(tmp_path: Path, serve: dict[str, Any], said: str) -> None:
    source = tmp_path / "hanse-client.yaml"
    written = settings_in(tmp_path)
    source.write_text(yaml.safe_dump(written | {"serve": serve}))
    with pytest.raises(HanseError, match=said):
        load(ClientConfig, source)


def test_other_machines_ask_by_the_names_that_are_listed() -> None:
    files = {"certificate": Path("a"), "key": Path("b")}
    assert Serve().hosts == ("127.0.0.1", "localhost", "[::1]")
    assert Serve().address == "http://127.0.0.1:8766"
    one = Serve(host="192.168.1.20", names=("shelf.lan",), **files)
    assert one.hosts == ("192.168.1.20", "shelf.lan") and one.address == "https://shelf.lan:8766"
    assert Serve(host="192.168.1.20", **files).address == "https://192.168.1.20:8766"
    everywhere = Serve(host=ANY, names=("shelf.lan",), **files)
    assert ANY not in everywhere.hosts and "shelf.lan" in everywhere.hosts
    assert Serve(host="::1").address == "http://[::1]:8766"
