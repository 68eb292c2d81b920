"""The recognizer for the shop's other programs: `serve`."""

import sys

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, say_now
from hanse_client.config import ClientConfig
from hanse_common import commands
from hanse_common.config import load
from hanse_common.errors import ConfigError


def serve(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Serve the recognizer to the shop's own programs until you stop it: REST, gRPC, and a page for you.

    It takes each recognizer that the league releases, without a pause, and says so in a line here; or why it can't, and
    then the one before goes on. The daemon (`run`) may run beside it.

    Exit codes: 0 stopped in order, 10 the configuration is wrong or there is no recognizer yet, 15 the recognizer is
    damaged, 30 the gallery can't be used, 31 a port or certificate can't be used.
    """
    from hanse_client.examples import resolve_device
    from hanse_client.logs import log_to
    from hanse_client.resources import apply
    from hanse_client.serving.server import serve as serve_until  # torch takes seconds to load

    settings = load(ClientConfig, config)
    try:
        settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_to(settings.state / "serve.log")
    except OSError as error:
        raise ConfigError(
            f"state: {settings.state} cannot be written ({error.strerror}); check the folder and the disk."
        ) from None
    # Whoever asks waits for the answer, so other programs do not go first.
    apply(settings.resources.model_copy(update={"niceness": 0}), resolve_device(settings.device))
    with commands.until_stopped() as stop:
        serve_until(settings, say_now, stop, private=sys.stdout.isatty())
        say_now("Stopped.")
