"""What the processor at hand makes of 8-bit products."""

import platform
from pathlib import Path


def sums_in_16_bits() -> bool:
    """Whether integer kernels add pairs of products in 16 bits here, which 8-bit weights overflow, and 7-bit ones not.

    So do x86 processors without VNNI; where that cannot be told, False.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    file = Path("/proc/cpuinfo")
    flags = file.read_text().split() if file.is_file() else ["vnni"]
    return not any("vnni" in flag for flag in flags)
