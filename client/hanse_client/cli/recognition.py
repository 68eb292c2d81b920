"""The recognizer at work: `classify`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, say
from hanse_client.config import ClientConfig
from hanse_client.releases import recognizer_folder
from hanse_common import commands
from hanse_common.config import load
from hanse_common.errors import ConfigError, PhotoError
from hanse_common.vision.photo import decode, shown


def classify(
    photos: Annotated[list[Path], typer.Argument(help="Photos to classify.", metavar="PHOTO...")],
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
    top: Annotated[int, typer.Option(help="How many classes to show.", min=1, metavar="NUMBER")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each photo.")] = False,
) -> None:
    """Say what is on each photo, and how sure the recognizer is.

    A photo that can't be used is named, and the others are classified all the same.

    Exit codes: 0 all classified, 21 no such file, 22 not a photo or damaged, 23 too large (of the first such).
    """
    from hanse_common.vision.recognizer import Recognizer

    if recognizer is not None:
        model = Recognizer.load(recognizer)
    else:
        settings = load(ClientConfig, config)
        folder = recognizer_folder(settings)
        if folder is None:
            raise ConfigError(
                f"{config}: recognizer: missing, and the league has released none yet; name its folder there, or with "
                "--recognizer."
            )
        model = Recognizer.load(folder, backbone_weights=settings.backbone_weights)
    classes = model.card.taxonomy.classes
    failed: PhotoError | None = None
    for path in photos:
        try:
            image = decode(path)
        except PhotoError as error:
            commands.complain(error)
            failed = failed or error
            continue
        probabilities = model.predict([image])[0]
        ranked = sorted(zip(classes, probabilities.tolist(), strict=True), key=lambda pair: -pair[1])
        if as_json:
            typer.echo(json.dumps({"photo": str(path), "probabilities": dict(ranked)}))
        else:
            named = ", ".join(f"{name} {100 * share:.1f} %" for name, share in ranked[:top])
            say(f"{shown(path)}: {named}")
    if failed is not None:
        raise typer.Exit(failed.exit_code)
