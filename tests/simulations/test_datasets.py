import contextlib
import gzip
import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hanse_common.errors import DatasetUnavailable
from hanse_common.vision import torchvision_compat  # noqa: F401  must be imported before torchvision
from hanse_simulations.datasets import CLASSES, FashionMnist, fashion_mnist, fetch, main

FOLDER = Path(__file__).parents[2] / ".data" / "fashion-mnist"

# When the files that Zalando publishes were packed: the part of their gzip headers that Debian strips,
# besides the name. Found by search; the digests that torchvision publishes prove them.
PACKED_AT = {"train": 1504176606, "t10k-": 1504176627}


@pytest.fixture(scope="session")
def data() -> FashionMnist:
    return fashion_mnist(FOLDER)


@pytest.fixture(scope="session")
def published(data) -> dict[str, bytes]:
    """The four files byte for byte as Zalando publishes them, by name."""
    files = {}
    for path in FOLDER.glob("*.gz"):
        packed = path.read_bytes()
        if packed[3] == 0:
            time = PACKED_AT[path.name[:5]].to_bytes(4, "little")
            packed = packed[:3] + b"\x08" + time + packed[8:10] + path.stem.encode() + b"\0" + packed[10:]
        files[path.name] = packed
    return files


@pytest.fixture
def no_apt(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@contextlib.contextmanager
def mirror(monkeypatch, files: dict[str, bytes]) -> Iterator[list[str]]:
    """A proxy that answers every request for one of `files`, whatever the host, and notes what was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = files.get(self.path.rpartition("/")[2])
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for name in ("no_proxy", "NO_PROXY", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


def test_shapes_types_and_balance_are_the_papers(data):
    assert data.train_images.shape == (60_000, 28, 28) and data.test_images.shape == (10_000, 28, 28)
    assert data.train_images.dtype == data.train_labels.dtype == np.uint8
    assert Counter(data.train_labels.tolist()) == dict.fromkeys(range(10), 6000)
    assert Counter(data.test_labels.tolist()) == dict.fromkeys(range(10), 1000)
    assert not data.train_images.flags.writeable


def test_the_data_is_what_torchvision_pins(published):
    from torchvision.datasets import FashionMNIST

    found = {
        name: hashlib.md5(packed, usedforsecurity=False).hexdigest() for name, packed in published.items()
    }
    assert found == dict(FashionMNIST.resources)
    assert list(CLASSES[1:]) == FashionMNIST.classes[1:]
    assert FashionMNIST.classes[0].startswith(CLASSES[0])


def test_torchvision_reads_the_same_arrays(data, published, tmp_path):
    from torchvision.datasets import FashionMNIST

    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, packed in published.items():
        (raw / name.removesuffix(".gz")).write_bytes(gzip.decompress(packed))
    train, test = FashionMNIST(tmp_path, train=True), FashionMNIST(tmp_path, train=False)
    assert np.array_equal(train.data.numpy(), data.train_images)
    assert np.array_equal(train.targets.numpy(), data.train_labels)
    assert np.array_equal(test.data.numpy(), data.test_images)
    assert np.array_equal(test.targets.numpy(), data.test_labels)


def test_present_files_are_left_alone(data, no_apt, monkeypatch):
    with mirror(monkeypatch, {}) as asked:
        assert fetch(FOLDER) == f"Fashion-MNIST is in {FOLDER}."
    assert asked == []


def test_without_apt_torchvisions_downloader_is_used(no_apt, published, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    with mirror(monkeypatch, published) as asked:
        assert fetch(folder) == f"Fashion-MNIST is in {folder}, from torchvision's downloader."
    assert {url.rpartition("/")[2] for url in asked} == set(published)
    assert sorted(path.name for path in folder.iterdir()) == sorted(published)
    assert fashion_mnist(folder).test_labels[:4].tolist() == [9, 2, 1, 1]


def test_without_any_source_the_way_by_hand_is_told(no_apt, tmp_path, monkeypatch):
    with mirror(monkeypatch, {}), pytest.raises(DatasetUnavailable) as caught:
        fetch(tmp_path / "data")
    text = str(caught.value)
    assert "there is no apt-get on this machine" in text and "torchvision's downloader: " in text
    assert str(tmp_path / "data") in text and "t10k-labels-idx1-ubyte.gz" in text and "\n" not in text
    assert list((tmp_path / "data").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DatasetUnavailable, match="File exists"):
        fetch(tmp_path / "data")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other", "longer", "text"])
def test_damaged_files_are_named(data, tmp_path, damage):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    packed = path.read_bytes()
    labels = bytearray(gzip.decompress(packed))
    labels[-1] ^= 1
    path.write_bytes(
        {
            "truncated": packed[:-100],
            "flipped": packed[:2000] + bytes([packed[2000] ^ 255]) + packed[2001:],
            "other": gzip.compress(bytes(labels)),
            "longer": gzip.compress(gzip.decompress(packed) + bytes(50_000_000)),
            "text": b"<html>404</html>",
        }[damage]
    )
    with pytest.raises(
        DatasetUnavailable, match=r"t10k-labels-idx1-ubyte\.gz: .*Delete it and fetch again\."
    ):
        fashion_mnist(tmp_path)


def test_the_command_says_what_it_did_and_fails_with_its_own_code(data, tmp_path, capsys):
    command = [sys.executable, "-m", "hanse_simulations.datasets", str(FOLDER)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == f"Fashion-MNIST is in {FOLDER}.\n" and run.stderr == ""
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file")]) == 17
    assert "could not be obtained" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="a Debian machine's way")
@pytest.mark.parametrize("lists", ["the machine's", "none"])
def test_debians_package_is_fetched_even_without_package_lists(tmp_path, monkeypatch, lists):
    if lists == "none":
        (tmp_path / "lists" / "partial").mkdir(parents=True)
        (tmp_path / "apt.conf").write_text(f'Dir::State::Lists "{tmp_path}/lists";\n')
        monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.chdir(tmp_path)
    assert fetch(Path("data")) == "Fashion-MNIST is in data, from Debian's package."
    assert sorted(path.name for path in Path("data").iterdir()) == sorted(
        path.name for path in FOLDER.glob("*.gz")
    )
