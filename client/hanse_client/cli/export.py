"""The recognizer for a phone, a till or a camera: `export`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, photos, say
from hanse_client.config import ClientConfig
from hanse_client.releases import recognizer_folder
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import CatalogError, ConfigError, PhotoError, RecognizerError
from hanse_common.files import PUBLIC, write_atomically
from hanse_common.vision.photo import shown

if TYPE_CHECKING:
    from PIL import Image

    from hanse_common.vision.edge import Parity

FLOAT, INT8 = "recognizer.onnx", "recognizer-int8.onnx"

_COMPARED = 64
"""The most photos on which a model is compared with the recognizer."""

_CALIBRATED = 128
"""The most photos to calibrate on; they are others than those compared on."""

_FEWEST = 16
"""The fewest photos to calibrate on, or to compare on."""


def export(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files.", metavar="FOLDER")],
    int8: Annotated[
        bool, typer.Option("--int8", help="Also write an 8-bit model, a quarter of the size.")
    ] = False,
    recognizer: Annotated[
        Path | None,
        typer.Option(
            "--recognizer",
            "-r",
            help="Folder of the recognizer, if not your configuration's.",
            metavar="FOLDER",
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Write the recognizer as one ONNX file, from pixels to probabilities and embedding, and check it.

    Your photos serve to check it and, with --int8, to find its scales and biases. Nothing of them is in the 8-bit file
    but the range and the average of each layer's values, and nothing at all in the other. A file that differs from the
    recognizer by more than it may is not kept.

    Exit codes: 0 written and checked; 10 the extra `edge` is not installed; 14 too few photos for --int8; 15 the
    recognizer can't be exported.
    """
    from hanse_common.vision import edge
    from hanse_common.vision.recognizer import Recognizer

    for module in ("onnx", "onnxscript", "onnxruntime"):
        edge.required(module)
    settings = load(ClientConfig, config)
    source = recognizer or recognizer_folder(settings)
    if source is None:
        raise ConfigError(
            f"{config}: recognizer: missing, and the league has released none yet; name its folder there, or with "
            "--recognizer."
        )
    league = Recognizer.load(source, backbone_weights=settings.backbone_weights)
    compared, calibration = _photos(settings)
    if int8 and min(len(compared), len(calibration)) < _FEWEST:
        raise CatalogError(
            f"{settings.photos}: found {len(compared) + len(calibration)} usable photos, expected {3 * _FEWEST} or "
            "more to find an 8-bit model's scales and to check it. Add photos, or leave --int8 out."
        )
    if not compared:
        compared = [_noise()]
    found: dict[str, tuple[int, Parity]] = {}
    with out.status("exporting and checking"):
        model = edge.to_onnx(league)
        parity = edge.parity(league, model, compared)
        if not parity.difference <= edge.TOLERANCE:
            raise RecognizerError(
                f"The exported model is not the recognizer: found a difference of {parity.difference:.2g}, expected at "
                f"most {edge.TOLERANCE:g}. Nothing was written; report this with the recognizer's card.json."
            )
        _write(folder / FLOAT, model)
        found[FLOAT] = len(model), parity
        if int8:
            small = edge.quantised(model, calibration)
            _write(folder / INT8, small)
            found[INT8] = len(small), edge.parity(league, small, compared)
    if as_json:
        typer.echo(json.dumps({name: _json(size, each) for name, (size, each) in found.items()}))
        return
    for name, (size, each) in found.items():
        say(
            f"{shown(folder / name)}: {size / 1e6:.1f} MB. On {photos(each.photos)} it names the recognizer's class "
            f"first in {100 * each.agreement:.1f} %, and differs by {each.difference:.2g} at most."
        )
        if each.agreement < edge.AGREEMENT:
            say(
                f"That is less than the {100 * edge.AGREEMENT:.0f} % expected of an 8-bit model. Use {FLOAT} where a "
                "wrong answer costs more than time."
            )


def _photos(settings: ClientConfig) -> "tuple[list[Image.Image], list[Image.Image]]":
    """Return photos of the shop's to compare on and others to calibrate on, each taken evenly from the catalog."""
    from hanse_client.shop import Shop

    try:
        records = Shop(settings).catalog().records
    except CatalogError:
        return [], []
    chosen = records[:: max(1, len(records) // (_COMPARED + _CALIBRATED))][: _COMPARED + _CALIBRATED]
    opened: list[Image.Image] = []
    for record in chosen:
        try:
            photo = record.open()
        except PhotoError:
            continue
        photo.thumbnail((1024, 1024))
        # Pillow rounds tall photos in another order than the model does; see `edge_graph`.
        excess = max(0, photo.height - photo.width) // 2
        opened.append(photo.crop((0, excess, photo.width, excess + min(photo.width, photo.height))))
    return opened[::3], [photo for index, photo in enumerate(opened) if index % 3]


def _noise() -> "Image.Image":
    import numpy as np
    from PIL import Image

    noise = np.random.PCG64(0).random_raw(60 * 80 * 3).astype(np.uint8)
    return Image.fromarray(noise.reshape(60, 80, 3))


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, PUBLIC)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another folder.") from None


def _json(size: int, parity: "Parity") -> dict[str, Any]:
    return {"bytes": size, **vars(parity)}
