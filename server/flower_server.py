"""The ServerApp that Flower's app bundle names. It does nothing: the operator's daemon runs its own.

`flwr run` needs an app to send; what it starts is the training of the installed `hanse-server`.
"""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Refuse: whatever runs this is not `hanse-server`."""
    raise RuntimeError(
        "This bundle carries configuration only. Start hanse-server run, which executes Flower runs by itself; "
        "no other executor can train a Hanse league."
    )
