"""Runs keylatch's command line behind the locks of `deploy/systemd/keylatch.service`.

    python worker_seccomp.py SYSCALL,SYSCALL,… serve --uds …

They are made as systemd makes them, of seccomp filters: SystemCallFilter allows the calls that are
named, MemoryDenyWriteExecute forbids memory that can be written and run.
"""

import ctypes
import mmap
import os
import sys

PR_SET_NO_NEW_PRIVS = 38
SCMP_ACT_ALLOW = 0x7FFF0000
SCMP_ACT_EPERM = 0x00050000 | 1
SCMP_CMP_MASKED_EQ = 7
BOTH = mmap.PROT_WRITE | mmap.PROT_EXEC
CODE = {"mmap": BOTH, "mprotect": mmap.PROT_EXEC, "pkey_mprotect": mmap.PROT_EXEC}


class Comparison(ctypes.Structure):
    """libseccomp's `scmp_arg_cmp`: some bits of an argument have a value."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    )


def lock(syscalls: list[str]) -> None:
    """From here on nothing but these, and nothing that was written becomes code."""
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    done = [ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)]

    code = ctypes.c_void_p(seccomp.seccomp_init(SCMP_ACT_ALLOW))
    for name, bits in CODE.items():
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        third = Comparison(2, SCMP_CMP_MASKED_EQ, bits, bits)
        done.append(seccomp.seccomp_rule_add(code, SCMP_ACT_EPERM, number, 1, third))
    done.append(seccomp.seccomp_load(code))

    calls = ctypes.c_void_p(seccomp.seccomp_init(SCMP_ACT_EPERM))
    for name in syscalls:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # or this machine has no such call
            done.append(seccomp.seccomp_rule_add(calls, SCMP_ACT_ALLOW, number, 0))
    done.append(seccomp.seccomp_load(calls))
    try:
        mmap.mmap(-1, 4096, prot=mmap.PROT_READ | BOTH)
    except OSError:
        done.append(0)
    else:
        done.append(1)
    if any(done):
        raise SystemExit(f"the locks do not hold: {done}")


if __name__ == "__main__":
    lock(sys.argv[1].split(","))
    os.execv(sys.executable, [sys.executable, "-m", "keylatch_sidecar", *sys.argv[2:]])
