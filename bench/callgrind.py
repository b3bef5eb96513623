"""Callgrind's switches, from inside of the process that it runs."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform

MARK = os.getloadavg
"""Callgrind writes down its count and begins anew whenever the C library's `getloadavg` is called:
a function that nothing else calls, and that is found without debugging symbols."""

REQUEST = bytes.fromhex("4889f831d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db c3")
"""What `valgrind.h` compiles a client request to, for x86-64; to a processor it does nothing."""

START, STOP = 0x43540004, 0x43540005
"""To instrument; from `callgrind.h`."""

CAN_START = platform.machine() in {"x86_64", "AMD64"}
"""Whether the counting can begin later. To count from the start is the same, and takes longer:
imports are slow where they are counted."""


def options(out: str) -> list[str]:
    """Start a program with these: its dumps are called OUT.1, OUT.2 and so on."""
    later = ["--instr-atstart=no"] if CAN_START else []
    return [
        *("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"),
        *(f"--dump-before={MARK.__name__}", *later),
    ]


def start() -> None:
    """Begin to count."""
    _ask(START)


def stop() -> None:
    """Count no more, and be faster."""
    _ask(STOP)


def _ask(request: int) -> None:
    if not CAN_START:
        return
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(REQUEST)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    arguments = (ctypes.c_uint64 * 6)(request)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(ctypes.addressof(arguments))
