"""The C library's heap, told to keep what an engine frees.

By default glibc returns a freed activation of some megabytes to the system and asks for it again a layer later, and
every page of it is then cleared anew: up to a fifth of an engine's time, and more where several streams wait for the
kernel's lock on the process's memory.
"""

import ctypes
import logging

logger = logging.getLogger(__name__)

# Numbers of options in glibc's malloc.h; values are ints.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST, _PAD = 2**31 - 1, 64 * 2**20


def keep_freed_memory() -> None:
    """Let this process keep freed memory for its next allocation; without glibc, nothing is changed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        logger.info("this C library has no mallopt: freed memory goes back to the system at once")
        return
    for option, value in ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, _PAD)):
        mallopt(option, value)
