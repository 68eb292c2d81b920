"""The photos, ready to train on: looked through, embedded and kept up to date in a thread of its own.

    with Preparation(shop, journal.note) as preparation:
        ready = preparation.ready(plan.recipe)        # None: not yet, ask again
        trainer = ShopTrainer(plan.recipe, taxonomy, ready.examples, OsRandomness())

When a league asks, the answer is here already or it is "later": nothing that depends on the photos is done while a
server waits, so it learns nothing from how long that takes. A photo that was deleted or changed is left out from the
next block on; a new one is in as soon as it is embedded, which waits while others want the machine.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from hanse_client.catalog import Catalog
from hanse_client.examples import Examples
from hanse_client.resources import OtherWork
from hanse_client.shop import Shop
from hanse_client.watching import Watcher, compare, in_words
from hanse_common.errors import CatalogError, HanseError, PlanRefused
from hanse_common.vision.recipe import Recipe

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
RETRY_SECONDS = 30.0
"""How long to wait after a look that failed: a drive that was unplugged comes back."""

MAX_NEW_RECIPES, NEW_RECIPE_SECONDS = 6, 24 * 3600.0
"""How many recipes that are not cached may be begun in such a time: an operator can't keep a machine busy at will."""

Note = Callable[..., None]
"""Hears of events: kind, text, facts; see `hanse_client.journal`."""


@dataclass(frozen=True, eq=False)
class Ready:
    """The training photos by one recipe, and how many photos can't be used."""

    recipe: Recipe
    examples: Examples
    problems: int


class Preparation:
    """Prepares the last recipe that was asked for, while entered. All that it says goes to `note`."""

    def __init__(self, shop: Shop, note: Note, clock: Callable[[], float] = time.monotonic) -> None:
        self._shop = shop
        self._note = note
        self._clock = clock
        self._lock = threading.Lock()
        self._wanted: Recipe | None = None
        self._ready: Ready | None = None
        self._changed = True
        self._failure: Exception | None = None
        self._catalog: Catalog | None = None
        self._begun: deque[float] = deque(maxlen=MAX_NEW_RECIPES)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="preparation", daemon=True)
        self.progress: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def counts(self) -> tuple[int, int] | None:
        """How many photos are ready to train on, and how many can't be used; None before the first are ready."""
        ready = self._ready
        return None if ready is None else (len(ready.examples), ready.problems)

    def ready(self, recipe: Recipe) -> Ready | None:
        """Return what is ready to train on by `recipe`; None while it is being prepared, from now on if need be.

        Raises `PlanRefused` when too many new recipes were asked for of late, and what stood in the way of the last try
        as long as that lasts.
        """
        with self._lock:
            if self._failure is not None and self._wanted == recipe:
                raise self._failure
            if self._ready is not None and self._ready.recipe == recipe:
                self._wanted = recipe
                return None if self._changed else self._ready
            if self._wanted != recipe:
                now = self._clock()
                if len(self._begun) == MAX_NEW_RECIPES and now - self._begun[0] < NEW_RECIPE_SECONDS:
                    raise PlanRefused(
                        f"recipe: {MAX_NEW_RECIPES} new ones were asked for within a day; the next one has to wait."
                    )
                self._begun.append(now)
                self._wanted, self._failure = recipe, None
            return None

    def _keep(self) -> None:
        config = self._shop.config
        with Watcher(config.photos, ignored=(config.state,)) as watcher:
            while not self._stop.wait(POLL_SECONDS):
                if watcher.changed():
                    with self._lock:
                        self._changed = True
                with self._lock:
                    recipe, ready = self._wanted, self._ready
                    stale = self._changed or ready is None or ready.recipe != recipe
                if recipe is None or not stale:
                    continue
                try:
                    self._prepare(recipe)
                except Exception as error:  # a thread that died would never be noticed
                    self._tell_failure(error)
                    self._stop.wait(RETRY_SECONDS)
                finally:
                    self.progress = None

    def _prepare(self, recipe: Recipe) -> None:
        """Look through the photos and make them ready, those that are embedded already first."""
        with self._lock:
            self._changed = False
            fresh = self._ready is None or self._ready.recipe != recipe
        try:
            catalog = self._shop.catalog()
        except CatalogError:
            with self._lock:
                self._changed, self._ready = True, None  # what was deleted must not be trained on
            raise
        if self._catalog is not None and (changes := compare(self._catalog, catalog)):
            self._note("photos", in_words(changes))
        self._catalog = catalog
        if fresh:
            self._note("preparing", "Looking through your photos; nothing leaves this machine meanwhile.")
        else:
            self._publish(recipe, self._shop.embedded(catalog, recipe))
            give_way = OtherWork().give_way
            if not self._shop.embed_ahead(catalog, recipe, self._interrupted, give_way, self._on_progress):
                return
        self._publish(recipe, self._shop.examples(catalog, recipe, self._on_progress))
        counts = self.counts or (0, 0)
        if fresh:
            self._note("photos", f"{counts[0]} photos are ready to train on, {counts[1]} can't be used.")

    def _publish(self, recipe: Recipe, found: tuple[Examples, tuple[str, ...]]) -> None:
        examples, problems = found
        with self._lock:
            self._ready, self._failure = Ready(recipe, examples, len(problems)), None

    def _interrupted(self) -> bool:
        """Return whether to leave off: told to stop, or another recipe is wanted."""
        with self._lock:
            return self._stop.is_set() or self._ready is None or self._wanted != self._ready.recipe

    def _on_progress(self, done: int, total: int) -> None:
        self.progress = (done, total)

    def _tell_failure(self, error: Exception) -> None:
        """Tell the owner once, not at every attempt."""
        log.debug("The photos could not be prepared.", exc_info=True)
        text: Any = error if isinstance(error, HanseError) else f"{type(error).__name__}: {error}"
        if str(error) != str(self._failure):
            self._note("problem", f"The photos can't be made ready: {text}")
        with self._lock:
            self._changed, self._failure = True, error
