"""Folders of public photos, the operator's own: for whitening and for carrying a recognizer over to other features.

    for image in decoded(photo_files(folder), print): ...

No merchant's photo is ever here.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from hanse_common.errors import CatalogError, PhotoError
from hanse_common.vision import photo


def photo_files(folder: Path) -> list[Path]:
    """Return the files below `folder`, sorted, but for hidden ones. Raises `CatalogError` without any."""
    if not folder.is_dir():
        raise CatalogError(f"{folder}: no such folder, expected one with public photos.")
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    shown = [path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    if not shown:
        raise CatalogError(f"{folder}: holds no files, expected public photos.")
    return shown


def spread(paths: Sequence[Path], limit: int) -> Sequence[Path]:
    """Return at most `limit` of `paths`, evenly spread."""
    return paths[:: -(-len(paths) // limit)]


def decoded(paths: Sequence[Path], on_problem: Callable[[PhotoError], None]) -> Iterator[Image.Image]:
    """Yield the photos that can be decoded, one by one; `on_problem` hears of each other."""
    for path in paths:
        try:
            yield photo.decode(path)
        except PhotoError as error:
            on_problem(error)
