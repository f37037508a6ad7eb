"""Takes memory away from everybody else, for real: holds as much as leaves a given number of bytes available.

    python tools/memory_thief.py TARGET_FILE

Reads the number again and again from the file, looks at MemAvailable, and takes or gives back pages until both agree;
so what other processes do meanwhile is made up for. Ends when the file is gone. Standard library only.
"""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path

CHUNK_BYTES = 1 << 20
MOST_CHUNKS_AT_ONCE = 64
LOOK_SECONDS = 0.02


def available_bytes() -> int:
    """Return MemAvailable."""
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/meminfo has no MemAvailable")


def main() -> None:
    """Hold memory until the file named by the first argument is gone."""
    target, held = Path(sys.argv[1]), list[mmap.mmap]()
    while True:
        try:
            wanted_bytes = int(target.read_text("ascii") or "0")
        except FileNotFoundError:
            return
        excess = (available_bytes() - wanted_bytes) // CHUNK_BYTES
        for _ in range(min(excess, MOST_CHUNKS_AT_ONCE)):
            chunk = mmap.mmap(-1, CHUNK_BYTES)
            for page in range(0, CHUNK_BYTES, mmap.PAGESIZE):
                chunk[page] = 1  # untouched pages are nobody's
            held.append(chunk)
        for _ in range(min(-excess, len(held))):
            held.pop().close()
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
