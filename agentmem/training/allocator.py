"""Training on a CPU without giving memory back to the system after every step.

glibc maps large blocks afresh and unmaps them when freed; a training step that frees its activations then pays for as
many page faults in the next one, about half of its time for small models. The setting holds for the whole process.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Let freed blocks stay with the process; True where the C library has the setting (glibc)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))
    taken = [mallopt(name, value) for name, value in settings]
    return all(answer == 1 for answer in taken)
