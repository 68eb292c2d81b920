"""Many products at once: a file of lines that is taken in by a thread while its sender asks how far it is.

    imports = Imports(config.state / "imports", recognition)
    incoming = imports.begin()                      # raises Refused (409) while another is under way
    incoming.write(part)                            # as often as parts come
    progress = imports.start(incoming)              # ImportProgress(state="running", lines=812, done=0, …)
    imports.progress(progress.id)

A line is a product in JSON, its photos in base64: `{"sku": "A-17", "title": "Trail shoe", "photos": ["/9j/4AAQ…"]}`. A
line that can't be used is left out and told by its number; the others are taken in all the same. What a line says of a
product that is there replaces its fields, and its photos are added to those there: so a file may be sent again.

The file has no name and is gone when it is done, or when the service is. Whatever was taken in by then stays; the
import is to be sent again.
"""

import logging
import secrets
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, Final

from pydantic import ValidationError

from hanse_client.recognition.service import Recognition
from hanse_client.serving.answers import Fault, ImportProgress
from hanse_client.serving.photos import references
from hanse_client.serving.problems import Refused, faults_in_words, in_words, one_line
from hanse_client.serving.schemas import ImportedProduct
from hanse_common.errors import Busy, HanseError

log = logging.getLogger(__name__)

MAX_LINE: Final = 64 << 20
"""Bytes of one line: a product with its photos."""

KEPT: Final = 20
"""How many imports are remembered."""

FAULTS: Final = 100
"""How many faults of one import are told."""

TRIES: Final = 100
"""How often a line is tried while the recognizer has too much to do."""


class Incoming:
    """The content of an import while it comes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.lines = 0
        self._ends_whole = True

    def write(self, part: bytes) -> None:
        """Take the next bytes. Raises `Refused` (507) when the disk does not."""
        try:
            self.file.write(part)
        except OSError as error:
            raise Refused(507, "not_kept", f"The import can't be kept ({error.strerror}).") from None
        self.lines += part.count(b"\n")
        if part:
            self._ends_whole = part.endswith(b"\n")

    def whole(self) -> int:
        """Return how many lines came, the last one without an end included."""
        return self.lines + (not self._ends_whole)


class Imports:
    """Imports into `recognition`, one after the other, by way of files in `folder`. Threads may share it."""

    def __init__(self, folder: Path, recognition: Recognition) -> None:
        self._folder = folder
        self._recognition = recognition
        self._lock = threading.Lock()
        self._known: OrderedDict[str, ImportProgress] = OrderedDict()
        self._under_way = False
        self._cancelled: set[str] = set()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> Incoming:
        """Return what takes the content. Raises `Refused` (409) while another import comes or is under way."""
        with self._lock:
            if self._under_way:
                raise Refused(409, "conflict", "Another import is under way.")
            self._under_way = True
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Without a name, it is gone whenever this process is.
            return Incoming(tempfile.TemporaryFile(dir=self._folder))
        except OSError as error:
            self._over()
            raise Refused(507, "not_kept", f"The import can't be kept ({error.strerror}).") from None

    def abandon(self, incoming: Incoming) -> None:
        """Forget what did not come whole."""
        incoming.file.close()
        self._over()

    def start(self, incoming: Incoming) -> ImportProgress:
        """Take in, in a thread of its own, what has come whole."""
        progress = ImportProgress(
            id=secrets.token_hex(16), state="running", lines=incoming.whole(), done=0, failed=0, faults=()
        )
        with self._lock:
            self._known[progress.id] = progress
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._thread = threading.Thread(
            target=self._run, args=(incoming, progress.id), name="import", daemon=True
        )
        self._thread.start()
        return progress

    def progress(self, name: str) -> ImportProgress | None:
        """Return how far the import of that id is, None when there is none."""
        with self._lock:
            return self._known.get(name)

    def cancel(self, name: str) -> ImportProgress | None:
        """Have the import end after the line that it is at, and return how far it is."""
        with self._lock:
            progress = self._known.get(name)
            if progress is not None and progress.state == "running":
                self._cancelled.add(name)
            return progress

    def close(self, seconds: float = 10.0) -> None:
        """End what is under way after the line that it is at."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def _over(self) -> None:
        with self._lock:
            self._under_way = False

    def _run(self, incoming: Incoming, name: str) -> None:
        state = "failed"
        try:
            with incoming.file as file:
                file.seek(0)
                state = self._take_in(file, name)
        except Exception:  # told as failed, and looked for in the log
            log.exception("an import failed")
        finally:
            with self._lock:
                self._known[name] = self._known[name].model_copy(update={"state": state})
                self._cancelled.discard(name)
                self._under_way = False

    def _take_in(self, file: BinaryIO, name: str) -> str:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if self._ending.is_set() or name in self._cancelled:
                return "cancelled"
            message = ""
            if len(line) > MAX_LINE:
                message = f"found more than {MAX_LINE} bytes, expected at most that"
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
            elif line.strip():
                message = self._put(line)
            with self._lock:
                before = self._known[name]
                faults = before.faults
                if message and len(faults) < FAULTS:
                    faults = (*faults, Fault(line=number, message=one_line(message)))
                self._known[name] = before.model_copy(
                    update={"done": number, "failed": before.failed + bool(message), "faults": faults}
                )
        return "done"

    def _put(self, line: bytes) -> str:
        """Take one line in; return why it was left out, "" when it was not."""
        try:
            asked = ImportedProduct.model_validate_json(line)
            product = asked.product()
        except ValidationError as error:
            return faults_in_words(error.errors(include_url=False))
        for _ in range(TRIES):
            try:
                images = references(asked.photos)
                with self._recognition.changing:
                    self._recognition.put(product, images)
                return ""
            except Busy as busy:
                if self._ending.wait(busy.retry_after):
                    break
            except Refused as refusal:
                return str(refusal.detail)
            except HanseError as error:
                return in_words(error)
        return "The recognizer had too much to do. Send this line again later."
