"""What REST's and gRPC's calls share: the recognizer's core, the owner's corrections, imports, and whether it is on.

with Service.open(config) as service:            # loads and warms the recognizer
    service.recognition.classify(image)
    service.ready = False                        # told by /ready and gRPC's health while it drains
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Final, Self

from hanse_client.applications.personal_ranking import RecentViews
from hanse_client.config import ClientConfig
from hanse_client.gallery.gallery import Match
from hanse_client.gallery.product import Filter, Product
from hanse_client.personal.corrections import Corrections
from hanse_client.recognition.following import Tell
from hanse_client.recognition.service import Recognition
from hanse_client.serving.imports import Imports

VIEW_AGE: Final = timedelta(days=1)
"""How much older each view counts than the one after it: a week's views weigh half."""


@dataclass
class Service:
    """One shop's recognizer at work. Threads may share it."""

    config: ClientConfig
    recognition: Recognition
    corrections: Corrections
    imports: Imports
    ready: bool = True

    @classmethod
    def open(cls, config: ClientConfig, tell: Tell = lambda line: None) -> Self:
        """Load the recognizer, warm, and follow the league's releases, of which `tell` hears a line each.

        Raises as `Recognition.open` and `Corrections` do.
        """
        corrections = Corrections(config.corrections_path)
        try:
            recognition = Recognition.open(config, follow=True, tell=tell)
        except BaseException:
            corrections.close()
            raise
        return cls(config, recognition, corrections, Imports(config.state / "imports", recognition))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.imports.close()
        self.recognition.close()
        self.corrections.close()

    def remove(self, sku: str) -> bool:
        """Remove the product, and what its owner said shows it; return whether there was one.

        The product goes last: a removal that did not end can then be asked for once more.
        """
        with self.recognition.changing:
            self.corrections.forget(sku)
            return self.recognition.remove(sku)

    def suggest(self, viewed: Sequence[str], k: int, where: Filter | None) -> list[Match]:
        """Return at most `k` products like those of the SKUs `viewed`, the latest first, without these."""
        now, views = datetime.now(UTC), RecentViews()
        for place, sku in reversed(list(enumerate(viewed))):
            views.add(sku, now - place * VIEW_AGE)
        return views.suggest(self.recognition, k=k, now=now, where=where)

    def product(self, sku: str) -> Product | None:
        """Return the product, None when there is none."""
        return self.recognition.gallery.get(sku)
