# SPDX-License-Identifier: MIT
"""The machine and the software that a run was measured on."""

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import ssmk

PACKAGES = ("numpy", "ml_dtypes", "torch", "transformers", "typeseg", "onnxruntime")
ASSUMED_CACHE = 64 << 20


def cpus():
    """The processors that this process may run on."""
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count()))
    )


def sysctl(name):
    """One value of macOS or BSD, None elsewhere."""
    try:
        return subprocess.run(
            ["sysctl", "-n", name], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_model():
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)
        if found:
            return found.group(1).strip()
    return sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def last_level_cache():
    """(bytes, known): all last-level caches that our processors share in."""
    caches = {}
    for cpu in cpus():
        levels = Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")
        entries = [
            {
                name: (level / name).read_text().strip()
                for name in ("level", "type", "size", "shared_cpu_list")
            }
            for level in levels
            if (level / "size").exists()
        ]
        entries = [entry for entry in entries if entry["type"] != "Instruction"]
        if entries:
            last = max(entries, key=lambda entry: int(entry["level"]))
            scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[last["size"][-1]]
            caches[last["shared_cpu_list"]] = int(last["size"][:-1]) * scale
    if caches:
        return sum(caches.values()), True
    for name in ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize"):
        if int(sysctl(name) or 0):
            return int(sysctl(name)), True
    return ASSUMED_CACHE, False


def memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions():
    found = {"ssmk": ssmk.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe(threads):
    """What a reader needs to judge the figures, as JSON."""
    cache, known = last_level_cache()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "processors": len(cpus()),
        "threads": threads,
        "isa": ssmk.cpu_isa(),
        "last_level_cache": cache,
        "last_level_cache_known": known,
        "memory": memory(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }
