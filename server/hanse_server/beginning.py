"""Where a training starts that goes on from an earlier recognizer, whatever changed since.

    beginning = graft(config.start, plan, service, versions)

Classes may have come, gone or been renamed since, and the recipe may be another: see `hanse_server.surgery`.
"""

import tempfile
from pathlib import Path

from hanse_common.plan import Plan
from hanse_common.vision.recognizer import Recognizer
from hanse_server.config import Service, Start
from hanse_server.public_photos import decoded, photo_files, spread
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
            photos=None
            if start.photos is None
            else decoded(spread(photo_files(start.photos), MAX_PHOTOS), lambda error: None),
            whitening=service.whitening,
            centre=service.centre,
        )
    return Beginning(made.vector, recognizer.card.to_bytes())
