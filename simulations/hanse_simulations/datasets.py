"""Public photos to experiment with: Fashion-MNIST, 70 000 article images of Zalando's shop.

    data = fashion_mnist(Path(".data/fashion-mnist"))
    data.train_images.shape, data.train_labels.shape      # (60000, 28, 28), (60000,)

`python -m hanse_simulations.datasets FOLDER` obtains the files and says where from; it does nothing when they
are there. Sources, in order: the Debian package `dataset-fashion-mnist` (neither root nor installation is
needed), and torchvision's downloader. Both hold the same data in different gzip headers (Debian strips name
and time), so what is pinned here is the SHA-256 of the unpacked files.

Reference: Xiao, Rasul, Vollgraf, Fashion-MNIST, arXiv:1708.07747 (MIT licence).
"""

import gzip
import hashlib
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hanse_common.errors import DatasetUnavailable

CLASSES = (
    "T-shirt",  # "T-shirt/top" upstream, which no folder can be called
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

SECONDS = 300
"""Bound of one command of a source, in seconds."""

_PACKAGE = "dataset-fashion-mnist"


@dataclass(frozen=True)
class _IdxFile:
    """A file of the set: dimensions, and the SHA-256 of the unpacked idx file."""

    name: str
    shape: tuple[int, ...]
    sha256: str


_FILES = (
    _IdxFile(
        "train-images-idx3-ubyte.gz",
        (60_000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    _IdxFile(
        "train-labels-idx1-ubyte.gz",
        (60_000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    _IdxFile(
        "t10k-images-idx3-ubyte.gz",
        (10_000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    _IdxFile(
        "t10k-labels-idx1-ubyte.gz",
        (10_000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)


@dataclass(frozen=True)
class FashionMnist:
    """Images of shape (n, 28, 28), white on black, and labels of shape (n,), 0 to 9; uint8, read-only."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def fashion_mnist(folder: Path) -> FashionMnist:
    """Return Fashion-MNIST from `folder`, where it is put first if it is missing.

    Raises `DatasetUnavailable` when no source provides it, or a file in `folder` is not the published one.
    """
    fetch(folder)
    return FashionMnist(*(_parse(folder / file.name, file) for file in _FILES))


def default_folder() -> Path:
    """Return where the files are that `make install` fetched, or else where they are to be fetched to."""
    fetched = Path(__file__).parents[2] / ".data" / "fashion-mnist"
    if fetched.is_dir():
        return fetched
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hanse" / "fashion-mnist"


def fetch(folder: Path) -> str:
    """Put Fashion-MNIST's files into `folder` unless they are there; return a line that says what was done.

    Raises `DatasetUnavailable` as `fashion_mnist` does.
    """
    if all((folder / file.name).is_file() for file in _FILES):
        return f"Fashion-MNIST is in {folder}."
    faults = []
    for name, obtain in (("Debian's package", _from_debian), ("torchvision's downloader", _from_torchvision)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Inside `folder`, so that each file moves to its place whole or not at all.
            with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.resolve()) as scratch:
                found = obtain(Path(scratch))
                for file in _FILES:
                    _parse(found / file.name, file)
                for file in _FILES:
                    (found / file.name).replace(folder / file.name)
        except (OSError, subprocess.SubprocessError, DatasetUnavailable) as error:
            faults.append(f"{name}: {_reason(error)}")
        else:
            return f"Fashion-MNIST is in {folder}, from {name}."
    raise DatasetUnavailable(
        f"Fashion-MNIST could not be obtained. {' '.join(faults)} Put the files into {folder} yourself, from "
        "https://github.com/zalandoresearch/fashion-mnist/tree/master/data/fashion or the Debian package "
        f"{_PACKAGE}: {', '.join(file.name for file in _FILES)}."
    )


def _from_debian(scratch: Path) -> Path:
    """Download and unpack the package below `scratch`, by the machine's package lists or by fresh ones."""
    for private in (False, True):
        options = []
        if private:
            for part in ("lists/partial", "cache/archives/partial"):
                (scratch / part).mkdir(parents=True)
            options = ["-o", f"Dir::State::Lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
            _run(["apt-get", *options, "update"], scratch)
        try:
            _run(["apt-get", *options, "download", _PACKAGE], scratch)
            break
        except subprocess.CalledProcessError:
            if private:
                raise
    (package,) = scratch.glob(f"{_PACKAGE}_*.deb")
    _run(["dpkg", "-x", str(package), str(scratch / "unpacked")], scratch)
    return scratch / "unpacked/usr/share/datasets/fashion-mnist"


def _from_torchvision(scratch: Path) -> Path:
    # In a process of its own: the download has no time limit, and torchvision is slow to import.
    code = (
        "import sys\n"
        "from hanse_common.vision import torchvision_compat\n"
        "from torchvision.datasets import FashionMNIST\n"
        "FashionMNIST(sys.argv[1], download=True)\n"
    )
    _run([sys.executable, "-c", code, str(scratch)], scratch)
    return scratch / "FashionMNIST" / "raw"


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(
        command,
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
    )


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = str(error.stderr or error.stdout).strip().splitlines() or ["no output"]
        return f"{Path(error.cmd[0]).name} failed ({lines[-1][:200]})."
    if isinstance(error, FileNotFoundError):
        return f"there is no {Path(str(error.filename)).name} on this machine."
    return f"{error}".rstrip(".") + "."


def _parse(path: Path, file: _IdxFile) -> NDArray[np.uint8]:
    """Return the array in a gzipped idx file of unsigned bytes, unpacking no more than its shape needs.

    The format: magic 0x00000800 plus the number of dimensions, each dimension as a big-endian 32-bit integer,
    then the bytes (http://yann.lecun.com/exdb/mnist/).
    """
    header = b"".join(n.to_bytes(4) for n in (0x800 + len(file.shape), *file.shape))
    size = len(header) + int(np.prod(file.shape))
    try:
        with gzip.open(path) as packed:
            data = packed.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetUnavailable(
            f"{path}: cannot be unpacked ({error}). Delete it and fetch again."
        ) from None
    if len(data) != size or data[: len(header)] != header or hashlib.sha256(data).hexdigest() != file.sha256:
        raise DatasetUnavailable(
            f"{path}: found other content than Fashion-MNIST's {file.name}. Delete it and fetch again."
        )
    return np.frombuffer(data, dtype=np.uint8, offset=len(header)).reshape(file.shape)


def main(arguments: Sequence[str]) -> int:
    """Fetch into the folder that is the one argument, say what was done, and return an exit code."""
    if len(arguments) != 1:
        print("usage: python -m hanse_simulations.datasets FOLDER", file=sys.stderr)
        return 2
    try:
        print(fetch(Path(arguments[0])))
    except DatasetUnavailable as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
