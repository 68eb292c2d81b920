"""Large uploads that come all at once over real TLS: memory that does not grow with them, and a turn for everybody."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from hanse_common import wire
from hanse_common.session import FRAME_BYTES, Answer, frames
from hanse_server import reception
from hanse_server.stream import StreamServer
from tests.server.test_stream import (
    KEYS,
    NAMES,
    WAIT,
    Merchants,
    everyone,
    greet,
    make_server,
    merchants,
    outcome,
    pki,
    raw_stream,
    say,
)

__all__ = ["merchants", "pki"]  # fixtures
