"""Photos of the stock, counted by SKU; what is not known is set aside for a person.

    inventory = take_inventory(recognition, photos_in(Path("stock")), unknown_folder=Path("unknown"))
    for line in inventory.counts:
        print(line.sku, line.count)
    print(len(inventory.unknown), "to look at in", "unknown")

**One product a photo**, unless told otherwise: the way a scanner works, and a conveyor. A shelf that is divided evenly
is counted by a `Grid`: its rows and columns, as the planogram has them, with one facing in each cell; photograph it
straight on and cut the photo to the shelf. `look` does the same for one photo, for a stream of them.

There is no detector here that finds products wherever they are. Windows that slide over the photo were tried instead,
and do not count: see docs/applications.md for the figures. A product on two photos counts twice.

A cell whose nearest product is not near enough, by the shop's threshold (`hanse_client.gallery.rejection`), is
unknown: a new product, an empty place, or a bad photo. Its picture goes to `unknown_folder`, without what the camera
noted, and in no count.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from PIL import Image
from pydantic import Field

from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Filter
from hanse_common.errors import ConfigError, PhotoError
from hanse_common.files import write_atomically
from hanse_common.vision.photo import decode
from hanse_common.wire import Value

if TYPE_CHECKING:  # it brings torch
    from hanse_client.gallery.gallery import Match
    from hanse_client.recognition.service import Recognition

MAX_LINES = 64
"""Bound of a grid's rows, and of its columns."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge in pixels of the upright photo; the last two lie outside."""


class Grid(Value):
    """How a photo is divided: `rows` times `columns` cells of equal size, each with one product."""

    rows: Annotated[int, Field(ge=1, le=MAX_LINES)] = 1
    columns: Annotated[int, Field(ge=1, le=MAX_LINES)] = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the grid in `text`, such as 3x5, rows first. Raises `ConfigError`."""
        rows, _, columns = text.partition("x")
        try:
            return cls(rows=int(rows), columns=int(columns))
        except ValueError:
            raise ConfigError(
                f"grid: found {text[:40]!r}, expected ROWSxCOLUMNS of 1 to {MAX_LINES} each, such as 3x5."
            ) from None

    def boxes(self, width: int, height: int) -> list[Box]:
        """Return the cells of a photo of that size, row by row. Raises `ConfigError` when they would be empty."""
        if width < self.columns or height < self.rows:
            raise ConfigError(
                f"grid: found a photo of {width} x {height} pixels, expected one for {self.rows}x{self.columns} cells."
            )
        across = [width * column // self.columns for column in range(self.columns + 1)]
        down = [height * row // self.rows for row in range(self.rows + 1)]
        return [
            (left, upper, right, lower)
            for upper, lower in itertools.pairwise(down)
            for left, right in itertools.pairwise(across)
        ]


WHOLE = Grid()
"""One product a photo."""


@dataclass(frozen=True)
class Cell:
    """What is in one cell: the nearest product, if the gallery has any, and whether it is near enough to be counted."""

    box: Box
    nearest: "Match | None"
    known: bool


class Line(Value):
    """How often a product was counted."""

    sku: str
    title: str
    count: int


class Unknown(Value):
    """A cell for a person to look at, of the file `photo`; `picture` is the file of the cell alone, if written."""

    photo: str
    box: Box
    picture: str | None
    nearest: str | None
    similarity: float | None


class Inventory(Value):
    """What was counted on `photos` photos, the most frequent product first. `problems` has a line for each other."""

    photos: int
    counts: tuple[Line, ...]
    unknown: tuple[Unknown, ...]
    problems: tuple[str, ...]


def photos_in(folder: Path) -> Iterator[Path]:
    """Yield the photos in `folder` and below, by name; hidden files are left out. Raises `ConfigError`."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: found no such folder, expected one with photos.")
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                yield path


def look(
    recognition: "Recognition", image: Image.Image, grid: Grid = WHOLE, where: Filter | None = None
) -> list[Cell]:
    """Return what is in each cell of `image`, row by row. Raises as `Recognition.search` does, and `ConfigError`."""
    boxes = grid.boxes(image.width, image.height)
    answers = recognition.search_all([image.crop(box) for box in boxes], where=where, k=1)
    return [
        Cell(box, found.matches[0] if found.matches else None, found.knows_first)
        for box, found in zip(boxes, answers, strict=True)
    ]


def take_inventory(
    recognition: "Recognition",
    photos: Iterable[Path],
    grid: Grid = WHOLE,
    *,
    where: Filter | None = None,
    unknown_folder: Path | None = None,
) -> Inventory:
    """Return the counts over `photos`, files that are read one after the other.

    A file that can't be used is a problem in the inventory, and the others count. Raises as `Recognition.search` does,
    and `ConfigError` when `unknown_folder` cannot be written.
    """
    counts: Counter[str] = Counter()
    titles: dict[str, str] = {}
    unknown: list[Unknown] = []
    problems: list[str] = []
    looked_at = 0
    number = 0 if unknown_folder is None else _last_number(unknown_folder)
    for path in photos:
        try:
            image = decode(path)
            cells = look(recognition, image, grid, where)
        except (PhotoError, ConfigError) as error:
            problems.append(f"{path.name}: {error}" if isinstance(error, ConfigError) else str(error))
            continue
        looked_at += 1
        for cell in cells:
            if cell.known and cell.nearest is not None:
                counts[cell.nearest.product.sku] += 1
                titles[cell.nearest.product.sku] = cell.nearest.product.title
                continue
            picture = None
            if unknown_folder is not None:
                number += 1
                picture = _set_aside(unknown_folder, number, image.crop(cell.box))
            unknown.append(
                Unknown(
                    photo=str(path),
                    box=cell.box,
                    picture=picture,
                    nearest=cell.nearest.product.sku if cell.nearest else None,
                    similarity=cell.nearest.similarity if cell.nearest else None,
                )
            )
    lines = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    return Inventory(
        photos=looked_at,
        counts=tuple(Line(sku=sku, title=titles[sku], count=count) for sku, count in lines),
        unknown=tuple(unknown),
        problems=tuple(problems),
    )


def _last_number(folder: Path) -> int:
    """Return the largest number of a picture in the folder, 0 without any: those of an earlier inventory stay."""
    return max((int(path.stem) for path in folder.glob("*.jpg") if path.stem.isdecimal()), default=0)


def _set_aside(folder: Path, number: int, cell: Image.Image) -> str:
    """Write the picture of an unknown cell, for the owner's eyes alone, and return its file."""
    path = folder / f"{number:06}.jpg"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, Gallery.prepare(cell))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another folder.") from None
    return str(path)
