"""Every parser that bytes of the operator's server, or files that an operator hands out, reach at a merchant.

    for target in targets():
        with target.opened(folder) as parse:
            parse(data)

`parse` returns for what it takes, raises one of `target.refusals` for what it does not, and raises anything else,
`Broken` among it, where a promise is broken. What is signed by the operator or the league is signed here again after
it was changed: the server's owner has that key.

| bytes | target |
|---|---|
| each message of `hanse_common`, found by introspection | `message-NAME` |
| a plan, a directory and a chain of charters inside their signatures | `signed-plan`, `signed-directory`, `charters` |
| a stream's frames, and all that is said on a stream | `frames`, `stream`, `release-stream` |
| the requests of a round, each in its turn: participant and secure aggregation | `round-NAME`, `round-signed` |
| assignments at the daemon | `assignment`, `assignment-signed` |
| a model's numbers | `model` |
| what a Fleet server answers to the node: message, object tree, objects | `node` |
| a recognizer's folder, whitening, centre | `card`, `parameters`, `whitening`, `centre` |
| photos, which a merchant's suppliers send | `photo` |
| sample configurations, a league's card, label maps | `config`, `league-card`, `labels` |
| a membership request, as another merchant mails it | `request-text` |
| certificates | `certificate` |
"""

from . import asked, handed, said
from .target import Target


def targets() -> list[Target]:
    """Return all of them. The numbers of inputs follow from what one costs: test-all is to stay under minutes."""
    return [*said.targets(), *asked.targets(), *handed.targets()]
