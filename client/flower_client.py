"""The ClientApp that Flower's app bundle names. It does nothing: `hanse-client` runs its own, fetching no bundle.

A stock SuperNode that runs it answers that this merchant does not take part.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hanse_common import wire
from hanse_common.flower import to_record
from hanse_common.session import BlockReport, ReportCode

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer that nobody trains here. Start `hanse-client run` instead of a SuperNode."""
    report = BlockReport(block=bytes(16), code=ReportCode.UNAVAILABLE)
    return Message(to_record(wire.encode(report)), reply_to=message)
