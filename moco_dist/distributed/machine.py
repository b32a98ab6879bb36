"""Which machine and container this is."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

BOOT = ""
with suppress(OSError):
    BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    BOOT += os.readlink("/proc/self/ns/pid")  # each container numbers its own processes
