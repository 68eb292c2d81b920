"""Where the shop's own programs reach the recognizer, and how much they may ask of it: the section `serve`.

    Serve()                                                     # this machine alone: 127.0.0.1, ports 8766 and 8767
    Serve(host="192.168.1.20", names=("shelf.lan",), certificate=Path("shelf.crt"), key=Path("shelf.key"))

Another host than this machine's own needs a certificate and a token: without the one everybody on the way could read
photos and token, without the other everybody who reaches the port could change products.
"""

import ipaddress
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from hanse_common.config import ConfigPath, Section

Port = Annotated[int, Field(ge=1024, le=65_535)]


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("expected an IP address, such as 127.0.0.1 or 192.168.1.20") from None


class Serve(Section):
    """What `hanse-client serve` listens on, and its limits.

    `grpc_port` None serves no gRPC. `names` are those by which other machines ask for this one. `requests` is how many
    are worked on at once, `streams` how many gRPC streams are open at once, `seconds` how long a request's content may
    take to arrive.
    """

    host: Annotated[str, AfterValidator(_address)] = "127.0.0.1"
    port: Port = 8766
    grpc_port: Port | None = 8767
    names: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")], ...],
        Field(max_length=16),
    ] = ()
    certificate: ConfigPath | None = None
    key: ConfigPath | None = None
    token: bool = True
    requests: Annotated[int, Field(ge=1, le=128)] = 32
    streams: Annotated[int, Field(ge=1, le=64)] = 16
    seconds: Annotated[int, Field(ge=1, le=600)] = 30
    photo_megabytes: Annotated[int, Field(ge=1, le=20)] = 20
    import_megabytes: Annotated[int, Field(ge=1, le=65_536)] = 2048

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key: found one of them, expected both or none")
        if self.grpc_port == self.port:
            raise ValueError(f"grpc_port: found {self.port} twice, expected another port than port")
        if not self.is_loopback:
            if self.certificate is None:
                raise ValueError(
                    f"host: {self.host} is reached by other machines, so certificate and key must be named, too; "
                    "or take 127.0.0.1"
                )
            if not self.token:
                raise ValueError(f"token: {self.host} is reached by other machines, so it must be true")
            if ipaddress.ip_address(self.host).is_unspecified and not self.names:
                raise ValueError(
                    f"names: missing; expected the names by which other machines ask for {self.host}"
                )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether this machine alone reaches it."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names by which it may be asked for, as in an address."""
        own = ("127.0.0.1", "localhost", "[::1]")
        address = ipaddress.ip_address(self.host)
        if address.is_unspecified:
            return (*own, *self.names)
        shown = f"[{self.host}]" if address.version == 6 else self.host
        return tuple(dict.fromkeys((*(own if self.is_loopback else ()), shown, *self.names)))

    @property
    def address(self) -> str:
        """The beginning of every address of it, such as http://127.0.0.1:8766."""
        named = self.names[0] if self.names else self.hosts[-1] if not self.is_loopback else self.host
        shown = f"[{named}]" if ":" in named and not named.startswith("[") else named
        return f"{'https' if self.certificate else 'http'}://{shown}:{self.port}"

    @property
    def photo_bytes(self) -> int:
        """The most bytes of one photo's file."""
        return self.photo_megabytes << 20
