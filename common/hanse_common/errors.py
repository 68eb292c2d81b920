"""Every error Hanse raises on purpose. Catch `HanseError` to catch them all.

    HanseError
    ├── ConfigError            a YAML file or a command's arguments are wrong
    ├── WireError              a message from outside is malformed, oversized or not canonical
    │   └── WireVersionUnknown it is of a later version of the protocol
    ├── SignatureInvalid       a signature does not verify, or the signer is not the pinned one
    ├── PlanRefused            the merchant's policy, or arithmetic, does not allow the plan
    ├── DirectoryRefused       the league's directory has expired, is older than one seen, or lacks somebody
    ├── BudgetExceeded         the privacy budget does not cover what was asked
    ├── LedgerError            the ledger is damaged, locked or of another version
    ├── CatalogError           the catalog as a whole cannot be used
    ├── GalleryError           a product, or the gallery of products, cannot be used
    ├── PhotoError             one photo cannot be used
    │   ├── PhotoMissing       no such file
    │   ├── PhotoUnreadable    not an image of an accepted format, or damaged
    │   └── PhotoTooLarge      over the limit of bytes or pixels
    ├── RecognizerError        a saved recognizer, backbone or recipe is damaged or does not match
    ├── StorageError           the server's records are damaged, of another version, or cannot be reached
    ├── ReleaseRefused         a recognizer is not released, or not taken
    ├── RoundFailed            a round ended without a sum
    ├── RunStopped             somebody stopped the run
    ├── Busy                   too much is asked for at once; try again
    ├── NotServing             the recognizer's service cannot be offered
    └── DatasetUnavailable     public data could not be obtained

Each class has an exit code of its own, which the commands return; the guides list them. Texts may name the
merchant's own files and figures: they are for the merchant's eyes. What leaves a machine is a code
(`hanse_common.messages.DeclineCode`), never a text.
"""

from typing import ClassVar


class HanseError(Exception):
    """Base of all errors that Hanse raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(HanseError):
    """A YAML file or a command's arguments are wrong; the text lists every fault found."""

    exit_code = 10


class WireError(HanseError):
    """A message from outside is malformed, oversized, or not in canonical form."""

    exit_code = 11


class WireVersionUnknown(WireError):
    """A message is of a version of the protocol that this release does not know."""

    exit_code = 28


class SignatureInvalid(HanseError):
    """A signature does not verify, or the signer is not the pinned one."""

    exit_code = 12


class PlanRefused(HanseError):
    """The merchant's policy, or arithmetic, does not allow the plan."""

    exit_code = 3


class DirectoryRefused(HanseError):
    """The league's directory has expired, is older than one seen before, or lacks somebody."""

    exit_code = 19


class BudgetExceeded(HanseError):
    """The privacy budget does not cover what was asked."""

    exit_code = 4


class LedgerError(HanseError):
    """The ledger is damaged, locked, or of another version."""

    exit_code = 13


class CatalogError(HanseError):
    """The catalog as a whole cannot be used."""

    exit_code = 14


class GalleryError(HanseError):
    """A product cannot be taken into the gallery, or the gallery is damaged, locked, or of another version."""

    exit_code = 30


class PhotoError(HanseError):
    """One photo cannot be used."""

    exit_code = 20


class PhotoMissing(PhotoError):
    """There is no such file."""

    exit_code = 21


class PhotoUnreadable(PhotoError):
    """The file is not an image of an accepted format, or it is damaged."""

    exit_code = 22


class PhotoTooLarge(PhotoError):
    """The photo is over the limit of bytes or pixels."""

    exit_code = 23


class RecognizerError(HanseError):
    """A saved recognizer, backbone or recipe is damaged or does not match."""

    exit_code = 15


class StorageError(HanseError):
    """The server's records are damaged, of another version, or cannot be reached."""

    exit_code = 26


class ReleaseRefused(HanseError):
    """A recognizer is not released, because its figures do not pass, or not taken, because something does not match."""

    exit_code = 27


class RoundFailed(HanseError):
    """A round ended without a sum, or one attempt at it did.

    `why` is merchants, setup, sum_lost, implausible or other; `attempts` are those by which a whole round failed.
    """

    exit_code = 16

    def __init__(self, text: str, why: str = "other", attempts: "tuple[RoundFailed, ...]" = ()) -> None:
        super().__init__(text)
        self.why = why
        self.attempts = attempts


class DatasetUnavailable(HanseError):
    """Public data could not be obtained."""

    exit_code = 17


class RunStopped(HanseError):
    """Somebody stopped the run; what was done so far is kept."""

    exit_code = 18


class Busy(HanseError):
    """More was asked for at once than waits its turn here; `retry_after` is in how many seconds to ask again."""

    exit_code = 29

    def __init__(self, text: str, retry_after: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class NotServing(HanseError):
    """The recognizer's service cannot be offered: its port is taken, or its certificate cannot be used."""

    exit_code = 31
