"""The merchant's YAML file, `hanse-client.yaml`.

    config = load(ClientConfig, Path("hanse-client.yaml"))

Every fault of the file is reported at once; see `hanse_common.config`.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hanse_client.policy import Policy
from hanse_common.config import ConfigPath, Section
from hanse_common.session import Address
from hanse_common.vision.taxonomy import Taxonomy


class LeagueSettings(Section):
    """What the merchant knows of the league and pins: nothing else that calls itself the league is believed."""

    operator_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    league_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    taxonomy: Taxonomy

    @model_validator(mode="after")
    def _two_keys(self) -> Self:
        if self.operator_key == self.league_key:
            raise ValueError(
                "operator_key and league_key are the same; expected two holders: an operator who signs the list of "
                "members could add invented ones"
            )
        return self


class Connection(Section):
    """How to reach the league. `server` is the address for nodes, `authority` the CA certificate to believe.

    `identity` and `node_key` are the merchant's secret keys; without them they lie in the state folder.
    """

    server: Address
    authority: ConfigPath
    identity: ConfigPath | None = None
    node_key: ConfigPath | None = None


class ClientConfig(Section):
    """The whole file. `state` is the folder of ledger, embeddings and holdout key, which nobody else reads.

    `connection` is needed by the daemon alone.
    """

    photos: ConfigPath
    labels: ConfigPath | None = None
    state: ConfigPath
    holdout_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backbone_weights: ConfigPath | None = None
    whitening: ConfigPath | None = None
    centre: ConfigPath | None = None
    recognizer: ConfigPath | None = None
    league: LeagueSettings
    policy: Policy
    connection: Connection | None = None

    @property
    def identity_path(self) -> Path:
        """Where the directory identity's secret key is."""
        return (self.connection and self.connection.identity) or self.state / "identity.key"

    @property
    def node_key_path(self) -> Path:
        """Where the Flower node's secret key is."""
        return (self.connection and self.connection.node_key) or self.state / "node.key"

    @property
    def markers_path(self) -> Path:
        """Where the marks are by which nothing is answered twice."""
        return self.state / "markers.sqlite"

    @property
    def ledger_path(self) -> Path:
        """Where the ledger is."""
        return self.state / "ledger.sqlite"
