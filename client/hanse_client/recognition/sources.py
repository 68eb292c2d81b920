"""Which recognizer a shop wants to serve, and how it is loaded.

    wanted = Wanted.of(config)          # cheap: asked every few seconds
    engine = wanted.load(config)        # takes a second, and memory

The configuration names a recognizer's folder, or else it is the league's released one (`hanse_client.releases`). Both
may be replaced at any time: which one is wanted is told by the card's own digest, and the files that are loaded have to
belong to that card.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hanse_client.config import ClientConfig
from hanse_client.gallery.gallery import Gallery
from hanse_client.releases import Releases, recognizer_folder
from hanse_common.errors import ConfigError, RecognizerError
from hanse_common.files import read_bounded
from hanse_common.vision.photo import content_digest

if TYPE_CHECKING:  # torch takes seconds to load
    from hanse_client.recognition.engine import Engine

CARD_FILE = "card.json"
MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Wanted:
    """The recognizer in `folder` whose digest is `digest`, and the state of the shop's personal head.

    Two that are equal load alike. `personal` tells versions of the files in `ClientConfig.personal_path` apart.
    """

    folder: Path
    digest: bytes
    personal: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, config: ClientConfig) -> Self:
        """Return what is wanted now.

        Raises `ConfigError` when there is no recognizer yet, `RecognizerError` when its card can't be read.
        """
        folder = recognizer_folder(config)
        if folder is None:
            raise ConfigError(
                "recognizer: missing, and the league has released none yet. Wait for its first release, which "
                "`hanse-client update` takes, or name a recognizer's folder in the configuration."
            )
        card = read_bounded(folder / CARD_FILE, MAX_CARD_BYTES, "a recognizer's card", RecognizerError)
        return cls(folder, content_digest(card), _versions(config.personal_path))

    def load(self, config: ClientConfig) -> "Engine":
        """Return it, loaded and warm.

        Raises `RecognizerError` when it is not whole or doesn't fit in memory, `ConfigError` for a device that is not
        there.
        """
        from hanse_client.examples import resolve_device
        from hanse_client.recognition.engine import Engine

        device = resolve_device(config.device)
        return Engine.load(
            self.folder,
            digest=self.digest,
            backbone_weights=config.backbone_weights,
            device=device,
            memory=config.resources.batch_bytes(device),
            personal=config.personal_path,
        )


def begin(config: ClientConfig, gallery: Gallery, *, follow: bool) -> "tuple[Wanted, Engine]":
    """Return what serves first: what is wanted, or an earlier recognizer of the league's that the gallery knows better.

    One that came while nobody served, or that serving ended before all photos were embedded for it, would else find
    next to nothing until they are. Whoever does not `follow` gets what is wanted. Raises as `of` and `load` do.
    """
    wanted = Wanted.of(config)
    engine = wanted.load(config)
    if not follow or not engine.embedding or not set(gallery.embeddings()) - {engine.embedding}:
        return wanted, engine
    known = gallery.count_vectors(engine.embedding)
    for folder in Releases.of(config).earlier():
        with suppress(RecognizerError):
            other = Wanted(folder, bytes.fromhex(folder.name), wanted.personal)
            before = other.load(config)
            if before.embedding and gallery.count_vectors(before.embedding) > known:
                return other, before
    return wanted, engine


def version(config: ClientConfig, digest: bytes) -> int | None:
    """Return the number of the recognizer with that digest in the league's registry, None if it was not released."""
    if config.recognizer is not None:
        return None
    release = Releases.of(config).in_use()
    return release.version if release is not None and release.recognizer == digest else None


def named(config: ClientConfig, digest: bytes) -> str:
    """Return what a shop's owner calls the recognizer with that digest: its version, or how the digest begins."""
    found = version(config, digest)
    return digest.hex()[:16] if found is None else f"version {found}"


def _versions(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return name, time and inode of each file in `folder`; none without one."""
    try:
        found = [
            (path.name, path.stat()) for path in sorted(folder.iterdir()) if not path.name.startswith(".")
        ]
    except OSError:
        return ()
    return tuple((name, stat.st_mtime_ns, stat.st_ino) for name, stat in found)
