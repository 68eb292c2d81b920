"""Notices that the photos changed, and says what that means for training.

    with Watcher(config.photos, ignored=(config.state,)) as watcher:
        if watcher.changed():                       # once after each change, and once at the start
            new = shop.catalog()
            tell(in_words(compare(old, new)))

The operating system's notices only tell *that* something changed; what it was, two catalogs say. A network drive gives
no notice of what another computer changes on it, so such a drive is looked through from time to time.
"""

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from watchfiles import watch

from hanse_client.catalog import Catalog, is_clutter

log = logging.getLogger(__name__)

QUIET_SECONDS, LONGEST_SECONDS = 2.0, 60.0
"""A change is told when nothing has changed for so long, or when changes have gone on for so long."""

CHECK_SECONDS = 2.0
"""How often it is checked that the folder is still the one that is watched."""

POLL_SECONDS = 60.0
"""How often a folder that gives no notices is looked through."""

LOOK_SECONDS = 3600.0
"""A folder from which nothing was heard for so long counts as changed: notices may be lost."""

_REMOTE = (
    "nfs",
    "cifs",
    "smb",
    "9p",
    "afp",
    "webdav",
    "davfs",
    "sshfs",
    "ceph",
    "glusterfs",
    "virtiofs",
    "vboxsf",
)
"""Kinds of file systems, by a part of their name, that other computers write to."""


class Watcher:
    """Watches a folder of photos, or a CSV file's folder, in a thread of its own, while it is entered.

    A folder that vanishes, as a drive does, is watched again when it is back. Where the system offers no notices, or
    not enough of them, the folder is looked through every `poll_seconds`, which misses a file whose time of change did
    not grow by a second; that is found within `look_seconds`.
    """

    def __init__(
        self,
        source: Path,
        *,
        ignored: Iterable[Path] = (),
        quiet_seconds: float = QUIET_SECONDS,
        check_seconds: float = CHECK_SECONDS,
        poll_seconds: float = POLL_SECONDS,
        look_seconds: float = LOOK_SECONDS,
        polling: bool | None = None,
    ) -> None:
        self._source = source.absolute()
        self._ignored = tuple(path.absolute() for path in ignored)
        self._quiet_seconds = quiet_seconds
        self._check_seconds = check_seconds
        self._poll_seconds = poll_seconds
        self._look_seconds = look_seconds
        self._polling = polling
        self._changed = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_watching, name="photos", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def changed(self) -> bool:
        """Return whether there may be changes since it was last asked. The first answers follow the first look."""
        if not self._changed.is_set():
            return False
        self._changed.clear()
        return True

    def wait(self, seconds: float) -> bool:
        """Wait until something changed, at most `seconds`, and return as `changed` does."""
        self._changed.wait(seconds)
        return self.changed()

    def _keep_watching(self) -> None:
        while not self._stop.is_set():
            folder = self._source.parent if self._source.is_file() else self._source
            if _identity(folder) is None:
                self._stop.wait(self._check_seconds)
                continue
            try:
                self._watch(folder)
            except (OSError, RuntimeError) as error:  # no notices to be had, or no more of them
                log.warning("%s gives no notices of changes (%s); looking from time to time.", folder, error)
                self._polling = True
                self._stop.wait(self._check_seconds)

    def _watch(self, folder: Path) -> None:
        """Watch until told to stop or until `folder` is no longer what it was; either way a change is told first."""
        begun = _identity(folder)
        polling = on_network_drive(folder) if self._polling is None else self._polling
        watching = watch(
            folder,
            watch_filter=lambda change, name: self._matters(folder, name),
            debounce=int(LONGEST_SECONDS * 1000),
            step=int(self._quiet_seconds * 1000),
            rust_timeout=int(self._check_seconds * 1000),
            yield_on_timeout=True,
            stop_event=self._stop,
            raise_interrupt=False,
            force_polling=polling,
            poll_delay_ms=int(self._poll_seconds * 1000),
            ignore_permission_denied=True,
        )
        told = -math.inf  # what changed before the watch stood, nobody noticed
        for changes in watching:
            here, now = _identity(folder) == begun, time.monotonic()
            if changes or not here or now - told > self._look_seconds:
                self._changed.set()
                told = now
            if not here:
                return

    def _matters(self, folder: Path, name: str) -> bool:
        path = Path(name)
        if any(path.is_relative_to(ignored) for ignored in self._ignored):
            return False
        return not (path.is_relative_to(folder) and any(map(is_clutter, path.relative_to(folder).parts)))


def on_network_drive(folder: Path) -> bool:
    """Return whether `folder` lies on a drive that other computers may write to."""
    place = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype.casefold() if mounts else ""
    return any(name in kind for name in _REMOTE)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@dataclass(frozen=True, slots=True)
class Changes:
    """How one catalog differs from an earlier one, by path.

    `added` and `removed` are photos that are new and gone, whatever they are called; `replaced` have another content
    under the same path; `moved` the same content under another path or in another class; `unusable` are there but can't
    be used any more.
    """

    added: tuple[Path, ...] = ()
    removed: tuple[Path, ...] = ()
    replaced: tuple[Path, ...] = ()
    moved: tuple[Path, ...] = ()
    unusable: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return any((self.added, self.removed, self.replaced, self.moved, self.unusable))


def compare(before: Catalog, after: Catalog) -> Changes:
    """Return how `after` differs from `before`. A copy more or less of one content counts as a photo."""
    old = {record.path: record for record in before.records}
    new = {record.path: record for record in after.records}
    stayed = old.keys() & new.keys()
    replaced = [path for path in stayed if old[path].digest != new[path].digest]
    moved = [
        path for path in stayed if old[path].digest == new[path].digest and old[path].label != new[path].label
    ]
    gone: dict[bytes, list[Path]] = defaultdict(list)
    for path in sorted(old.keys() - new.keys()):
        gone[old[path].digest].append(path)
    added = []
    for path in sorted(new.keys() - old.keys()):
        if earlier := gone[new[path].digest]:
            earlier.pop()
            moved.append(path)
        else:
            added.append(path)
    left = {path for paths in gone.values() for path in paths}
    unusable = left & {problem.path for problem in after.problems}
    return Changes(
        tuple(added), _sorted(left - unusable), _sorted(replaced), _sorted(moved), _sorted(unusable)
    )


def in_words(changes: Changes) -> str:
    """Return what the changes mean, for the owner; nothing if there are none."""
    parts = []
    for paths, one, many in (
        (changes.added, "1 photo is new", "{} photos are new"),
        (changes.replaced, "1 was replaced by another picture", "{} were replaced by other pictures"),
        (changes.moved, "1 was moved", "{} were moved"),
        (changes.removed, "1 was removed", "{} were removed"),
        (changes.unusable, "1 can't be used any more", "{} can't be used any more"),
    ):
        if paths:
            parts.append(one if len(paths) == 1 else many.format(len(paths)))
    if not parts:
        return ""
    sentences = [f"Your photos changed: {', '.join(parts)}."]
    if count := len(changes.removed) + len(changes.replaced) + len(changes.unusable):
        whose = "What was removed" if count == len(changes.removed) else "What is gone"
        sentences.append(
            f"{whose} is not trained on from the next block on. What it contributed before stays contributed; its "
            "budget is not given back."
        )
    return " ".join(sentences)


def _sorted(paths: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(sorted(paths))
