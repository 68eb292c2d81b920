"""What the parties must agree on, to the bit: messages, plan, privacy mechanism, recognizer."""

import os

# Libraries read these when they are first imported, so they are set before that, here, where every part of Hanse
# begins. Flower would report its use and look for updates on the network.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
# gRPC has no switch for the least version of TLS. With a cipher list that no certificate can serve, no handshake
# of TLS 1.2 or older ends well, and those of TLS 1.3, which have their own ciphers, do.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-CHACHA20-POLY1305"
# What gRPC's core prints on its own: a line for every stranger's failed handshake.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
