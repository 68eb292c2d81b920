"""Flower 1.41's own SecAgg+ code for one merchant's masks and for the server's unmasking, to measure against.

Its client stage is called as it is. Its server's is part of a workflow that needs a whole run; the lines below make
the same calls to Flower's functions in the same order.
"""

import os
from typing import Any

import numpy as np
from flwr.client.mod.secure_aggregation.secaggplus_mod import SecAggPlusState, _collect_masked_vectors
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

CLIPPING, QUANTIZATION, MODULUS = 8.0, 1 << 22, 1 << 32
"""Flower's defaults."""


class FlowerPeer:
    """One merchant with `merchants` − 1 neighbours and an update of `dimension` numbers."""

    def __init__(self, merchants: int, dimension: int) -> None:
        pairs = [generate_key_pairs() for _ in range(merchants)]
        self._private = [private_key_to_bytes(private) for private, _ in pairs]
        self._public = [public_key_to_bytes(public) for _, public in pairs]
        self._dimension = dimension
        self._seeds = [os.urandom(32) for _ in range(merchants)]
        state = SecAggPlusState()
        state.nid, state.threshold = 0, 2
        state.sk1, state.rd_seed = self._private[0], self._seeds[0]
        state.max_weight, state.target_range = 1000.0, QUANTIZATION
        state.clipping_range, state.mod_range = CLIPPING, MODULUS
        state.public_keys_dict = {nid: (public, public) for nid, public in enumerate(self._public)}
        state.ss2_dict, state.rd_seed_share_dict, state.sk1_share_dict = {}, {}, {}
        ciphertexts = []
        for nid in range(1, merchants):
            private, public = bytes_to_private_key(self._private[0]), bytes_to_public_key(self._public[nid])
            state.ss2_dict[nid] = generate_shared_key(private, public)
            plain = share_keys_plaintext_concat(nid, 0, bytes(33), bytes(33))
            ciphertexts.append(encrypt(state.ss2_dict[nid], plain))
        self._configs: Any = {
            Key.CIPHERTEXT_LIST: ciphertexts,
            Key.SOURCE_LIST: list(range(1, merchants)),
        }
        self._state = state
        self._update = ndarrays_to_parameters([np.zeros(dimension, dtype=np.float32)])

    def mask(self) -> None:
        """Quantise and mask one update, as Flower's client does."""
        _collect_masked_vectors(self._state, self._configs, 1000, self._update)

    def unmask(self, dropped: int) -> None:
        """Take the masks out of a sum of which the first `dropped` merchants are not, as Flower's server does."""
        total: Any = [np.zeros(1, dtype=np.int64), np.zeros(self._dimension, dtype=np.int64)]
        for nid, seed in enumerate(self._seeds):
            if nid >= dropped:
                mask = pseudo_rand_gen(seed, MODULUS, get_parameters_shape(total))
                total = parameters_subtraction(total, mask)
                continue
            for other, public in enumerate(self._public):
                if other == nid:
                    continue
                shared = generate_shared_key(
                    bytes_to_private_key(self._private[nid]), bytes_to_public_key(public)
                )
                mask = pseudo_rand_gen(shared, MODULUS, get_parameters_shape(total))
                change = parameters_addition if nid > other else parameters_subtraction
                total = change(total, mask)
        factor_extract(parameters_mod(total, MODULUS))
