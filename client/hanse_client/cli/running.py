"""The daemon: `run`."""

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, say_now
from hanse_client.config import ClientConfig
from hanse_common import commands
from hanse_common.config import load


def run(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Take part in your league until you stop it: wait for trainings, judge them, train, keep the accounts."""
    from hanse_client.daemon import Daemon  # torch takes seconds to load

    with commands.until_stopped() as stop:
        with Daemon(load(ClientConfig, config), say_now) as daemon:
            daemon.run(stop)
        say_now("Stopped.")
