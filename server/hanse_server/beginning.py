"""Where a training starts that goes on from an earlier recognizer, whatever changed since.

    beginning = graft(config.start, plan, service, versions)

Classes may have come, gone or been renamed since, and the recipe may be another: see `hanse_server.surgery`.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from hanse_common.errors import CatalogError, PhotoError
from hanse_common.plan import Plan
from hanse_common.vision import photo
from hanse_common.vision.recognizer import Recognizer
from hanse_server.config import Service, Start
from hanse_server.storage import Beginning, Versions
from hanse_server.surgery import transplant

MAX_PHOTOS = 10_000


def graft(start: Start, plan: Plan, service: Service, versions: Versions) -> Beginning:
    """Return the plan's first model, made of the recognizer that `start` names.

    Raises `ConfigError` when there is none, `RecognizerError` when it can't be carried over.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = start.folder
        if folder is None:
            folder = Path(temporary) / "recognizer"
            versions.export(versions.find(start.version or "released").digest, folder)
        recognizer = Recognizer.load(folder)
        made = transplant(
            recognizer,
            plan.recipe,
            plan.taxonomy,
            renamed=start.renamed,
            photos=None if start.photos is None else public_photos(start.photos),
            whitening=service.whitening,
            centre=service.centre,
        )
    return Beginning(made.vector, recognizer.card.to_bytes())


def photo_files(folder: Path) -> list[Path]:
    """Return the files below `folder`, sorted, but for hidden ones. Raises `CatalogError` without any."""
    if not folder.is_dir():
        raise CatalogError(f"{folder}: no such folder, expected one with public photos.")
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    shown = [path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    if not shown:
        raise CatalogError(f"{folder}: holds no files, expected public photos.")
    return shown


def public_photos(folder: Path) -> Iterator[Image.Image]:
    """Yield the photos below `folder` that can be decoded, at most `MAX_PHOTOS`, evenly spread."""
    paths = photo_files(folder)
    for path in paths[:: -(-len(paths) // MAX_PHOTOS)]:
        try:
            yield photo.decode(path)
        except PhotoError:
            continue
