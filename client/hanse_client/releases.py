"""The league's recognizers on the merchant's disk: what is believed of a release, and how one replaces another.

    releases = Releases.of(config)
    release = releases.consider(signed)             # verified, and noted before it is used
    releases.take(release, stream.pieces)           # fetched, verified, in use
    folder = releases.folder()                      # what classify, compare and catalog load; None before the first

In the folder `recognizers` each recognizer has a folder by its digest, and the symbolic link `current` names the one in
use. A new one is fetched into a hidden folder beside, each file verified while it comes, and takes its place under
its name once it is whole and on the disk; then the link is replaced. So whenever the machine dies, one whole
recognizer is in use, the old one or the new one. Who reads goes through the link once and then by the digest's own
name: two of those before are kept, so that nobody who reads finds half of one and half of another.

`latest.hanse` is the last release that was seen, with the operator's signature. An earlier one, or another of the same
number, is never believed again, whoever brings it.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hanse_client.config import ClientConfig
from hanse_common import wire
from hanse_common.errors import ConfigError, HanseError, RecognizerError, ReleaseRefused
from hanse_common.files import read_bounded, write_atomically
from hanse_common.release import MAX_RELEASE_BYTES, Release, ReleasedFile, SignedRelease
from hanse_common.secagg.ring import MAX_VECTOR_BYTES
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import Buffer

if TYPE_CHECKING:  # torch takes seconds to load
    from hanse_common.vision.recognizer import Card

CURRENT = "current"
LOCK = ".lock"
LATEST = "latest.hanse"
STATEMENT = "release.hanse"
"""In a recognizer's folder: the release by which it was taken."""

KEPT = 2
"""How many recognizers are kept beside the one in use."""

MAX_STATEMENT_BYTES = MAX_RELEASE_BYTES + (1 << 10)

Fetch = Callable[[ReleasedFile], Iterable[Buffer]]
"""Yields the content of a released file, untrusted."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_INCOMING, _GONE = ".incoming-", ".gone-"


@dataclass(frozen=True)
class Releases:
    """The folder `path`, and what the merchant pins: league, operator, taxonomy, and recipes where it names some."""

    path: Path
    league: str
    operator_key: bytes
    taxonomy: Taxonomy
    recipes: tuple[str, ...] | None

    @classmethod
    def of(cls, config: ClientConfig) -> Self:
        """Return the releases of this shop."""
        policy, league = config.policy, config.league
        key = bytes.fromhex(league.operator_key)
        return cls(config.recognizers_path, policy.league, key, league.taxonomy, policy.recipes)

    # What is here

    def folder(self) -> Path | None:
        """Return the folder of the recognizer in use, None when there is none. It holds no other one ever."""
        try:
            target = str((self.path / CURRENT).readlink())
        except OSError:
            return None
        found = self.path / target
        return found if _DIGEST.fullmatch(target) and _is_folder(found) else None

    def earlier(self) -> list[Path]:
        """Return the folders of recognizers that were taken before the one in use and are kept, the latest first."""
        found = [path for path in self._others(self.folder()) if _is_folder(path)]
        return sorted(found, key=self._age, reverse=True)

    def latest(self) -> Release | None:
        """Return the last release that was seen, None before the first.

        Raises `ReleaseRefused` when it is damaged or not the pinned operator's: what was seen is then not known.
        """
        data = self._seen()
        return None if data is None else self._open(self.path / LATEST, data)

    def in_use(self) -> Release | None:
        """Return the release by which the recognizer in use was taken last, None when there is none."""
        folder = self.folder()
        if folder is None:
            return None
        for path in (self.path / LATEST, folder / STATEMENT):
            with suppress(HanseError):
                release = self._open(path, _read(path))
                if release.recognizer.hex() == folder.name:
                    return release
        return None

    def waiting(self) -> Release | None:
        """Return the last release that was seen if it is not in use. Raises `ReleaseRefused` as `latest` does."""
        latest, folder = self.latest(), self.folder()
        if latest is None or (folder is not None and folder.name == latest.recognizer.hex()):
            return None
        return latest

    def number(self) -> int:
        """Return the number after which a release is of interest. Raises `ReleaseRefused` as `latest` does."""
        latest, waiting = self.latest(), self.waiting()
        return 0 if latest is None else latest.number - (waiting is not None)

    # What comes

    def consider(self, signed: SignedRelease) -> Release:
        """Return the release in `signed`, untrusted, once it is believed and noted for good.

        Raises `SignatureInvalid` and `WireError` as `SignedRelease.open`, `ReleaseRefused` when it is of another
        league, or not later than the last one that was seen and not that one, `ConfigError` when it can't be noted.
        """
        release = signed.open(self.operator_key)
        if release.league != self.league:
            raise ReleaseRefused(
                f"found a release of league {release.league}, expected {self.league} (policy.league)."
            )
        data = wire.encode(signed)
        with self._locked():
            seen = self._seen()
            if seen != data:
                latest = self.latest()
                release.require_successor_of(0 if latest is None else latest.number)
                with _writing(self.path / LATEST):
                    write_atomically(self.path / LATEST, data)
        return release

    def take(self, release: Release, fetch: Fetch) -> Path:
        """Have the recognizer of `release`, which `consider` returned, in use, and return its folder.

        What is here already is not fetched again. Raises `ReleaseRefused` when something does not match, by name,
        `ConfigError` when the disk does not take it, and what `fetch` raises. The one before then stays in use.
        """
        with self._locked():
            self._sweep()
            latest = self.latest()
            if latest is None or latest != release:
                raise ReleaseRefused(f"found release {release.number}, another was seen since.")
            folder = self.path / release.recognizer.hex()
            with _writing(folder):
                if not self._is_sound(folder, release):
                    self._bring(folder, release, fetch)
                write_atomically(folder / STATEMENT, _read(self.path / LATEST))
                self._point(folder)
                self._prune(folder)
        return folder

    def _bring(self, folder: Path, release: Release, fetch: Fetch) -> None:
        """Fetch the recognizer into a hidden folder, and put it at `folder` once it is whole."""
        from hanse_common.vision.recognizer import CARD_FILE, MAX_CARD_BYTES

        incoming = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self.path))
        try:
            files = {file.name: file for file in release.files}
            card = files.pop(CARD_FILE)
            if card.size > MAX_CARD_BYTES:
                raise ReleaseRefused(
                    f"{CARD_FILE}: found {card.size} bytes announced, expected at most {MAX_CARD_BYTES}."
                )
            _receive(incoming / CARD_FILE, card, fetch)
            self._judge(incoming, release)
            for file in files.values():
                _receive(incoming / file.name, file, fetch)
            _load(incoming, release.recognizer)
            _sync(incoming)
            if folder.exists() or folder.is_symlink():  # damaged, or nothing of ours
                self._remove(folder)
            incoming.rename(folder)
            _sync(self.path)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _judge(self, folder: Path, release: Release) -> None:
        """Raise `ReleaseRefused` unless the card in `folder` is one that this shop takes, and fits the other files."""
        from hanse_common.vision.recognizer import CARD_FILE, MAX_HEADER_BYTES, MODEL_FILE, read_card

        try:
            card = read_card(folder / CARD_FILE, release.recognizer)
            size = 4 * card.recipe.dimension(len(card.taxonomy.classes))
        except RecognizerError as error:
            raise ReleaseRefused(f"the card is not sound: {error}") from None
        if card.taxonomy != self.taxonomy:
            raise ReleaseRefused(_difference(card.taxonomy, self.taxonomy))
        recipe = card.recipe.digest().hex()
        if self.recipes is not None and not any(recipe.startswith(allowed) for allowed in self.recipes):
            raise ReleaseRefused(f"recipe: found {recipe}, your policy allows others alone (policy.recipes).")
        announced = {file.name: file for file in release.files}
        wanted = _digests(card)
        found = {name: file.digest.hex() for name, file in announced.items() if name != CARD_FILE}
        if found != wanted:
            raise ReleaseRefused(
                f"files: found {', '.join(sorted(found))}, expected those that the card names "
                f"({', '.join(sorted(wanted))}), with their digests."
            )
        model = announced[MODEL_FILE].size
        if not size <= model <= min(size, MAX_VECTOR_BYTES) + MAX_HEADER_BYTES:
            raise ReleaseRefused(
                f"{MODEL_FILE}: found {model} bytes announced, expected {size} and at most {MAX_HEADER_BYTES} "
                f"more, by the card's recipe, and no more than {MAX_VECTOR_BYTES}."
            )

    def _is_sound(self, folder: Path, release: Release) -> bool:
        """Return whether the recognizer is here. Raises `ReleaseRefused` when it is and is not to be used."""
        if not _is_folder(folder):
            return False
        try:
            _load(folder, release.recognizer)
        except ReleaseRefused:
            return False
        self._judge(folder, release)
        return True

    def _point(self, folder: Path) -> None:
        """Replace the link."""
        made = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self.path))
        try:
            (made / CURRENT).symlink_to(folder.name)
            current = self.path / CURRENT
            if _is_folder(current):  # nothing of ours
                self._remove(current)
            (made / CURRENT).rename(current)
            _sync(self.path)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _prune(self, folder: Path) -> None:
        """Delete all recognizers but the one in `folder` and the `KEPT` that were taken before it."""
        for path in sorted(self._others(folder), key=self._age, reverse=True)[KEPT:]:
            self._remove(path)

    def _others(self, folder: Path | None) -> list[Path]:
        if not self.path.is_dir():
            return []
        return [path for path in self.path.iterdir() if _DIGEST.fullmatch(path.name) and path != folder]

    def _age(self, folder: Path) -> int:
        try:
            return self._open(folder / STATEMENT, _read(folder / STATEMENT)).number
        except HanseError:
            return 0

    def _remove(self, path: Path) -> None:
        """Delete a folder, or what stands in its place: at once by its name, then its content."""
        if not _is_folder(path):
            path.unlink()
            return
        gone = Path(tempfile.mkdtemp(prefix=_GONE, dir=self.path))
        path.rename(gone / path.name)
        shutil.rmtree(gone, ignore_errors=True)

    def _sweep(self) -> None:
        """Delete what a crash left half done."""
        kept = [path for path in self.path.iterdir() if _DIGEST.fullmatch(path.name) and _is_folder(path)]
        for folder in (self.path, *kept):
            for path in folder.glob(".*"):
                if _is_folder(path):
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != LOCK:
                    path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only one that changes the folder, which is made when missing: the daemon, or a command."""
        with _writing(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"{self.path}: another hanse-client fetches a recognizer right now; let it end."
                ) from None
            yield
        finally:
            os.close(lock)

    def _seen(self) -> bytes | None:
        path = self.path / LATEST
        return _read(path) if os.path.lexists(path) else None

    def _open(self, path: Path, data: bytes) -> Release:
        try:
            return wire.decode(SignedRelease, data, MAX_STATEMENT_BYTES).open(self.operator_key)
        except HanseError:
            raise ReleaseRefused(
                f"{path}: found no release with the operator's signature (league.operator_key), so it is not known "
                "which ones came before. Restore it from a backup. If there is none, or the operator's key is a new "
                "one, ask the operator for the number of the newest release, delete this file, and look at the number "
                "that comes: hanse-client status."
            ) from None


def _receive(path: Path, file: ReleasedFile, fetch: Fetch) -> None:
    """Write a released file to the new file `path`, on the disk when this returns. Raises `ReleaseRefused`."""
    digest = hashlib.sha256()
    size = 0
    with path.open("xb") as target:
        path.chmod(0o600)
        for part in fetch(file):
            size += len(part)
            if size > file.size:
                raise ReleaseRefused(
                    f"{file.name}: found more than the {file.size} bytes that were announced."
                )
            digest.update(part)
            target.write(part)
        target.flush()
        os.fsync(target.fileno())
    if size != file.size or digest.digest() != file.digest:
        raise ReleaseRefused(
            f"{file.name}: found {size} bytes with SHA-256 {digest.hexdigest()}, the release has {file.size} with "
            f"{file.digest.hex()}. Somebody on the way, or the server, changes files; the next attempt fetches anew."
        )


def _load(folder: Path, digest: bytes) -> None:
    """Raise `ReleaseRefused` unless the recognizer in `folder` is whole and that one. Nothing of it is executed."""
    from hanse_common.vision.recognizer import Recognizer

    try:
        Recognizer.load(folder, digest=digest)
    except RecognizerError as error:
        raise ReleaseRefused(f"the recognizer is not sound: {error}") from None


def _digests(card: "Card") -> dict[str, str]:
    """Return the digests of the files that a card names, in hexadecimal, by their names."""
    from hanse_common.vision.recognizer import CENTRE_FILE, MODEL_FILE, WHITENING_FILE

    recipe = card.recipe
    whitening = recipe.backbone.whitening if recipe.backbone else None
    named = {
        MODEL_FILE: card.model_digest,
        WHITENING_FILE: whitening.weights if whitening else None,
        CENTRE_FILE: recipe.centre,
    }
    return {name: digest for name, digest in named.items() if digest is not None}


def _difference(found: Taxonomy, ours: Taxonomy) -> str:
    """Return how a recognizer's classes differ from the configuration's."""
    more = [name for name in found.classes if name not in ours.classes]
    less = [name for name in ours.classes if name not in found.classes]
    said = [
        f"{what} {', '.join(repr(name) for name in names[:5])}{' and others' if len(names) > 5 else ''}"
        for what, names in (("it also has", more), ("it lacks", less))
        if names
    ]
    return (
        f"taxonomy: found other classes than yours: {'; '.join(said) or 'the same in another order'}. If the league "
        "agreed on that, put its classes under league.taxonomy."
    )


def _read(path: Path) -> bytes:
    return read_bounded(path, MAX_STATEMENT_BYTES, "a signed release", ReleaseRefused)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise `ConfigError` in place of `OSError`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}). Make room or mend it; what was in use stays in use."
        ) from None


def _is_folder(path: Path) -> bool:
    """Return whether there is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def recognizer_folder(config: ClientConfig) -> Path | None:
    """Return the folder of the recognizer that the commands use: the configuration's, else the league's released one.

    None when there is none yet.
    """
    return config.recognizer or Releases.of(config).folder()
