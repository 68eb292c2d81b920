"""What Hanse may take of the merchant's machine, and when work that can wait gives way.

    resources = Resources(threads=2, memory_megabytes=2048)
    apply(resources, "cuda:0")                       # at the start, before other threads
    others = OtherWork()
    others.give_way(stop.is_set)                     # returns when the machine is free, or after a bounded time

The section `resources` of `hanse-client.yaml`. What is kept within `memory_megabytes` is what grows with the number of
photos computed at once; that number is found by `extraction.fitting_rows`.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import psutil
from pydantic import Field

from hanse_common.config import Section

DEVICES = r"auto|cpu|cuda(:[0-9]{1,3})?"
"""The names of devices, as a regular expression."""

BUSY = 0.3
"""The part of all cores' time that other programs take when the machine is called busy."""

LOOK_SECONDS = 2.0
"""How long other programs are watched for one verdict."""

LONGEST_WAIT = 600.0
"""Seconds after which waiting work goes on, one small piece of it, though the machine is busy."""


class Resources(Section):
    """Bounds on what the daemon takes.

    Attributes:
        threads: cores that compute at once; null takes all.
        niceness: how far other programs go first, from 0, not at all, to 19. Above 0 the disk is read when idle, too.
        memory_megabytes: main memory (MiB) that training and embedding together may take, beyond the program itself,
            the embeddings of the catalog and one decoded photo; null takes what works best, a GiB or two.
        gpu_memory: the part of a GPU's memory that the process may take, all in all.
    """

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    niceness: Annotated[int, Field(ge=0, le=19)] = 10
    memory_megabytes: Annotated[int, Field(ge=512, le=1 << 24)] | None = None
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = 1.0

    def batch_bytes(self, device: str) -> int | None:
        """Return what one batch on `device` may take, in bytes: training and embedding hold one each.

        None where `extraction.fitting_rows` has a bound of its own: on a GPU, or when there is no limit.
        """
        if self.memory_megabytes is None or device.startswith("cuda"):
            return None
        return self.memory_megabytes * 2**20 // 2


def apply(resources: Resources, device: str) -> None:
    """Hold this process to `resources`; `device` is what `resolve_device` returns.

    Call it before other threads start: they inherit the main thread's place on the disk's queue. A process that is
    nicer already stays so.
    """
    import torch  # takes seconds to load

    from hanse_common.vision.extraction import device_index, full_precision

    if resources.niceness:
        _step_back(resources.niceness)
    if resources.threads is not None:
        torch.set_num_threads(resources.threads)
    if device.startswith("cuda"):
        full_precision()
        torch.cuda.set_per_process_memory_fraction(resources.gpu_memory, device_index(device))


def _step_back(niceness: int) -> None:
    process = psutil.Process()
    # Linux keeps niceness by thread, and libraries have started some.
    for thread in process.threads() if psutil.LINUX else ():
        with suppress(OSError):  # it ended meanwhile
            os.setpriority(
                os.PRIO_PROCESS, thread.id, max(niceness, os.getpriority(os.PRIO_PROCESS, thread.id))
            )
    process.nice(max(niceness, process.nice()))
    if psutil.LINUX:
        process.ionice(psutil.IOPRIO_CLASS_IDLE)


class OtherWork:
    """Watches whether other programs want the machine."""

    def __init__(self, bound: float = BUSY, look_seconds: float = LOOK_SECONDS) -> None:
        self._bound = bound
        self._look_seconds = look_seconds
        self._process = psutil.Process()
        self._verdict = True  # until the first look is over
        self._lock = threading.Lock()
        self._time, self._others = self._look()

    def busy(self) -> bool:
        """Return whether other programs took more than the bound of all cores' time, by the last look that is over."""
        with self._lock:
            now, others = self._look()
            if now - self._time >= self._look_seconds:
                cores = psutil.cpu_count() or 1
                self._verdict = others - self._others > self._bound * cores * (now - self._time)
                self._time, self._others = now, others
            return self._verdict

    def give_way(self, stop: Callable[[], bool], longest: float = LONGEST_WAIT) -> None:
        """Wait until the machine is free, `stop` says so, or `longest` seconds have passed."""
        until = time.monotonic() + longest
        while self.busy() and not stop() and (left := until - time.monotonic()) > 0:
            time.sleep(min(self._look_seconds / 4, left))

    def _look(self) -> tuple[float, float]:
        """Return the time, and the seconds of cores that other processes have taken since the machine started."""
        machine, own = psutil.cpu_times(), self._process.cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        # Guests' time is in their hosts' already.
        counted = sum(machine) - getattr(machine, "guest", 0.0) - getattr(machine, "guest_nice", 0.0)
        taken = counted - idle
        return time.monotonic(), taken - own.user - own.system - own.children_user - own.children_system
