"""The merchant's YAML file, `hanse-client.yaml`.

    config = load(ClientConfig, Path("hanse-client.yaml"))

Every fault of the file is reported at once; see `hanse_common.config`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hanse_client.policy import Policy
from hanse_client.resources import DEVICES, Resources
from hanse_client.schedule import Schedule
from hanse_client.serving.settings import Serve
from hanse_client.traffic import Network
from hanse_common.config import ConfigPath, Section
from hanse_common.session import Address
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import Name


class LeagueSettings(Section):
    """What the merchant knows of the league and pins: nothing else that calls itself the league is believed."""

    operator_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    charter: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    taxonomy: Taxonomy


class Member(Section):
    """Who the merchant is in the league: its name there, and the business or person behind it."""

    name: Name
    entity: Annotated[str, Field(min_length=1, max_length=128)]


class Connection(Section):
    """How to reach the league. `server` is the address for nodes, `authority` the CA certificate to believe.

    `identity` and `node_key` are the merchant's secret keys; without them they lie in the state folder.
    """

    server: Address
    authority: ConfigPath
    identity: ConfigPath | None = None
    node_key: ConfigPath | None = None


class Page(Section):
    """The page that the daemon serves to this machine alone, on `port`, in English or Chinese."""

    port: Annotated[int, Field(ge=1024, le=65_535)]
    language: Literal["en", "zh"] = "en"


class Search(Section):
    """How the shop's products are found.

    `text_model` also compares what texts mean, in English above all; it needs the extra `text`. `false_accept` and
    `false_reject` are the targets by which the threshold of "not in the catalog" is calibrated
    (`hanse_client.gallery.rejection`).
    """

    text_model: Literal["minilm"] | None = None
    false_accept: Annotated[float, Field(ge=0.002, lt=1)] = 0.05
    false_reject: Annotated[float, Field(ge=0.002, lt=1)] = 0.1


class ClientConfig(Section):
    """The whole file. `state` is the folder of ledger, embeddings and holdout key, which nobody else reads.

    `member` is needed to join, `connection` by the daemon alone.
    """

    photos: ConfigPath
    labels: ConfigPath | None = None
    state: ConfigPath
    holdout_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    device: Annotated[str, Field(pattern=rf"^({DEVICES})$")] = "auto"
    backbone_weights: ConfigPath | None = None
    whitening: ConfigPath | None = None
    centre: ConfigPath | None = None
    recognizer: ConfigPath | None = None
    member: Member | None = None
    league: LeagueSettings
    policy: Policy
    schedule: Schedule = Schedule()
    network: Network = Network()
    resources: Resources = Resources()
    connection: Connection | None = None
    page: Page | None = None
    search: Search = Search()
    serve: Serve = Serve()

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
    def plans_path(self) -> Path:
        """Where plans that the owner is asked about are, and what was decided."""
        return self.state / "plans"

    @property
    def recognizers_path(self) -> Path:
        """Where the league's released recognizers are."""
        return self.state / "recognizers"

    @property
    def gallery_path(self) -> Path:
        """Where the shop's products and their reference photos are."""
        return self.state / "gallery"

    @property
    def corrections_path(self) -> Path:
        """Where the owner's own labels are."""
        return self.state / "corrections.sqlite"

    @property
    def personal_path(self) -> Path:
        """Where what was learned from the shop's own labels is."""
        return self.state / "personal"

    @property
    def ledger_path(self) -> Path:
        """Where the ledger is."""
        return self.state / "ledger.sqlite"
