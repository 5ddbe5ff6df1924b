"""How much memory a process has had at most. Imports nothing that takes some."""

import resource
import sys


def peak_bytes():
    """Most resident memory so far, in bytes."""
    try:
        # `ru_maxrss` of a process that was started by a large one begins with what that one has.
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
