"""What REST's and gRPC's calls share: the recognizer's core, the owner's corrections, imports, and whether it is on.

with Service.open(config) as service:            # loads and warms the recognizer
    service.recognition.classify(image)
    service.ready = False                        # told by /ready and gRPC's health while it drains
"""

import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from hanse_client.config import ClientConfig
from hanse_client.gallery.product import Product
from hanse_client.personal.corrections import Corrections
from hanse_client.recognition.service import Recognition
from hanse_client.serving.imports import Imports


@dataclass
class Service:
    """One shop's recognizer at work. Threads may share it."""

    config: ClientConfig
    recognition: Recognition
    corrections: Corrections
    imports: Imports
    ready: bool = True
    changing: threading.Lock = field(default_factory=threading.Lock)
    """Held while a product is read, changed and written back."""

    @classmethod
    def open(cls, config: ClientConfig) -> Self:
        """Load the recognizer, warm, and follow the league's releases. Raises as `Recognition.open`, `Corrections`."""
        corrections = Corrections(config.corrections_path)
        try:
            recognition = Recognition.open(config, follow=True)
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
        """Remove the product, and what its owner said shows it; return whether there was one."""
        with self.changing:
            removed = self.recognition.remove(sku)
            self.corrections.forget(sku)
            return removed

    def product(self, sku: str) -> Product | None:
        """Return the product, None when there is none."""
        return self.recognition.gallery.get(sku)
