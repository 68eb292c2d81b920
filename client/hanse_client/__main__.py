"""Where `hanse-client` begins, and `python -m hanse_client`."""

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line. Ctrl-C while it is still being loaded, for a second or two, ends it in one word."""
    # Who started it may have it ignore Ctrl-C; and a KeyboardInterrupt would be lost in some places of an import.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from hanse_client import cli

    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")
    os._exit(130)


if __name__ == "__main__":
    main()
