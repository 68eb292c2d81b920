"""A stream server's open block as a transport of rounds, without Flower and without waiting for anybody."""

from hanse_server.stream import StreamServer


class Connected:
    """Implements `hanse_server.transport.Transport` for whoever has a stream in the block of `streams`."""

    def __init__(self, streams: StreamServer) -> None:
        self.gather = self.merchants = streams.connected
        self.exchange = streams.exchange
