"""The file descriptors of this process: how many are open, and how many may be."""

import os
import resource
from logging import getLogger

from keylatch_sidecar.http_server.limits import MAX_DESCRIPTORS

log = getLogger("keylatch.serving")


def open_descriptors() -> int:
    """How many file descriptors this process has open. Counting 16,000 takes 10 ms."""
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - no paths are wanted


def descriptor_limit() -> int:
    """How many file descriptors this process may use."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MAX_DESCRIPTORS)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of this process and its workers to what the sidecar uses; systemd and
    Docker leave it at 1,024 for programs that use `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= target:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (OSError, ValueError) as error:  # a system call filter, for instance
        log.warning("the limit of file descriptors stays at %d: %s", soft, error)
