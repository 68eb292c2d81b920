"""kill -9 at every step of whatever else writes on a merchant's disk: `python writers.py torchless` or `torch`.

Each writer is killed at each place of its own code and of `files`. What it leaves must be the old content or the new,
never half, and doing it again must work. Prints as JSON how many places there were and what was not kept.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from points import Place, Points

from hanse_client import ledger_view
from hanse_client.charges import Budget, Charge
from hanse_client.ledger import Ledger
from hanse_common import credentials, files, signing
from hanse_common.privacy.mechanism import Mechanism

MEMORY = Path("/dev/shm")  # noqa: S108 - what a killed process leaves does not depend on the disk
OLD, NEW = b"old" * 1000, b"new" * 2000
BUDGET = Budget(10.0, 2e-5)
MECHANISM = Mechanism(clipping_norm=0.5, dimension=100, noise_multiplier=4.0, sampling_rate=0.1, steps=1)


@dataclass(frozen=True)
class Writer:
    """What is written. `sound` is asked after each crash; `again` does the work once more and holds its outcome."""

    modules: tuple[object, ...]
    prepare: Callable[[Path], None]
    act: Callable[[Path], object]
    sound: Callable[[Path], bool]
    again: Callable[[Path], bool]


def places_of(writer: Writer, folder: Path) -> list[Place]:
    """Return the places that the writer comes by."""
    points = Points(_files(writer))
    _fresh(writer, folder)
    with points.watched("writes"):
        writer.act(folder)
    return list(points.seen)


def crash_everywhere(writer: Writer, folder: Path) -> tuple[int, list[str]]:
    """Kill the writer at each place; return how many there were, and those where something was not kept."""
    places = places_of(writer, folder)
    broken = []
    for place in places:
        _fresh(writer, folder)
        child = os.fork()
        if child == 0:
            with Points(_files(writer), place).watched("writes"):
                writer.act(folder)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise RuntimeError(f"the writer never came to {place}")
        try:
            if not writer.sound(folder):
                broken.append(f"{place}: half-written")
            elif not writer.again(folder):
                broken.append(f"{place}: no way out")
        except Exception as error:
            broken.append(f"{place}: {type(error).__name__}: {error}")
    return len(places), broken


def _files(writer: Writer) -> tuple[Path, ...]:
    return tuple(Path(module.__file__) for module in (*writer.modules, files))  # type: ignore[attr-defined]


def _fresh(writer: Writer, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer.prepare(folder)


def _nothing(folder: Path) -> None:
    pass


def _replacing(write: Callable[[Path], object], modules: tuple[object, ...] = ()) -> Writer:
    """Return the writer that replaces the old content of the file "a" by the new."""

    def again(folder: Path) -> bool:
        write(folder / "a")
        return (folder / "a").read_bytes() == NEW

    return Writer(
        modules,
        lambda folder: (folder / "a").write_bytes(OLD) and None,
        lambda folder: write(folder / "a"),
        lambda folder: (folder / "a").read_bytes() in (OLD, NEW),
        again,
    )


def _creating(
    create: Callable[[Path], object], whole: Callable[[Path], object], modules: tuple[object, ...] = ()
) -> Writer:
    """Return the writer that makes the file "a", which `whole` reads or raises; while it is not there, again."""

    def sound(folder: Path) -> bool:
        return not (folder / "a").exists() or bool(whole(folder / "a"))

    def again(folder: Path) -> bool:
        if not (folder / "a").exists():
            create(folder / "a")
        return bool(whole(folder / "a"))

    return Writer(modules, _nothing, lambda folder: create(folder / "a"), sound, again)


def _charged(folder: Path) -> Ledger:
    kept = Ledger(folder.parent / "ledger.sqlite", BUDGET)
    if kept.counter == 0:
        for round_ in range(3):
            kept.charge(Charge(bytes(32), round_, 0, MECHANISM, 100, 1e-5))
    return kept


def _export() -> Writer:
    def whole(path: Path) -> bool:
        return [json.loads(line)["number"] for line in path.read_text().splitlines()] == [1, 2, 3]

    return _creating(lambda path: ledger_view.export(_charged(path.parent), path), whole, (ledger_view,))


def _identity() -> Writer:
    def whole(path: Path) -> bool:
        public = path.with_name("a.pub")
        key = signing.load_key(path)
        return not public.exists() or signing.load_public(public) == signing.public_bytes(key)

    return _creating(signing.create_key, whole, (signing,))


def _node_key() -> Writer:
    def whole(path: Path) -> bool:
        public = path.with_name("a.pub")
        credentials.load_node_key(path)
        return not public.exists() or bool(credentials.load_node_public(public))

    return _creating(credentials.create_node_key, whole, (credentials,))


def _holdout() -> Writer:
    from hanse_client import shop
    from hanse_client.config import ClientConfig

    def key(folder: Path) -> bytes:
        config = ClientConfig.model_construct(state=folder / "state")
        return shop.Shop(config)._holdout_key()

    def sound(folder: Path) -> bool:
        path = folder / "state" / "holdout.key"
        return not path.exists() or len(path.read_bytes()) == shop.HOLDOUT_KEY_BYTES

    def again(folder: Path) -> bool:
        return len({key(folder) for _ in range(2)}) == 1

    return Writer((shop,), _nothing, key, sound, again)


def _cache() -> Writer:
    """What was cached is there whole or not at all, and a damaged cache is made anew, crash or not."""
    import numpy as np

    from hanse_client import embeddings, photo_index

    recipe, contents = b"r" * 32, [bytes([n]) * 32 for n in range(3)]
    vectors = {content: np.full(5, n, dtype=np.float32) for n, content in enumerate(contents)}

    def prepare(folder: Path) -> None:
        (folder / "cache.sqlite").write_bytes(b"no database at all, but long enough to be one" * 99)

    def act(folder: Path) -> bool:
        with embeddings.EmbeddingCache(folder / "cache.sqlite") as cache:
            cache.put(recipe, vectors.items())
            cache.put(b"s" * 32, vectors.items())
            cache.evict(recipe, contents[:2])
        return True

    def sound(folder: Path) -> bool:
        if not (folder / "cache.sqlite").exists():
            return True
        with embeddings.EmbeddingCache(folder / "cache.sqlite") as cache:
            found = cache.get(recipe, contents, 5)
        whole = all(np.array_equal(found[content], vectors[content]) for content in found)
        return whole and len(found) in (0, 2, 3)

    return Writer((embeddings, photo_index), prepare, act, sound, act)


def _in_place(path: Path) -> None:
    """Write as nobody should: into the file that is read."""
    with path.open("wb") as file:
        file.write(NEW)


def _secret_in_place(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(NEW)
        file.flush()
        os.fsync(file.fileno())


def _read_new(path: Path) -> bool:
    return path.read_bytes() == NEW


TORCHLESS: dict[str, Callable[[], Writer]] = {
    "write_atomically": lambda: _replacing(lambda path: files.write_atomically(path, NEW)),
    "create_secret": lambda: _creating(lambda path: files.create_secret(path, NEW), _read_new),
    "identity": _identity,
    "node key": _node_key,
    "export": _export,
    "broken: in place": lambda: _replacing(_in_place, (sys.modules[__name__],)),
    "broken: a secret in place": lambda: _creating(_secret_in_place, _read_new, (sys.modules[__name__],)),
}
TORCH: dict[str, Callable[[], Writer]] = {"holdout key": _holdout, "embedding cache": _cache}


if __name__ == "__main__":
    writers = {"torch": TORCH, "torchless": TORCHLESS}[sys.argv[1]]
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        found = {writer: crash_everywhere(make(), Path(name) / "shop") for writer, make in writers.items()}
    print(json.dumps(found))
