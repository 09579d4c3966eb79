# SPDX-License-Identifier: MIT
"""What Meson asks about CUDA: `find_cuda.py NVCC` prints the path of the static runtime library and
the targets of the GPUs in this machine (`90a`; an empty line without any)."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Targets whose machine code runs on that very chip only, with all of its instructions.
SPECIFIC = {"90", "100", "103", "110", "120", "121"}


def runtime(nvcc):
    """libcudart_static.a of a compiler: in lib64, lib or targets/*/lib of its toolkit."""
    with tempfile.NamedTemporaryFile(suffix=".cu") as source:
        plan = subprocess.run(
            [nvcc, "--dryrun", "-c", source.name], capture_output=True, text=True, check=True
        ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.M).group(1)
    for pattern in ("lib64", "lib", "targets/*/lib"):
        for library in sorted(Path(top).glob(f"{pattern}/libcudart_static.a")):
            return library.resolve()
    sys.exit(f"no libcudart_static.a beside {nvcc}, in {top}")


def gpus():
    if not shutil.which("nvidia-smi"):
        return []
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
        capture_output=True, text=True,
    )
    found = re.findall(r"^(\d+)\.(\d)\s*$", asked.stdout, re.M) if asked.returncode == 0 else []
    targets = sorted({major + minor for major, minor in found}, key=int)
    return [t + "a" if t in SPECIFIC else t for t in targets if int(t) >= 80]


if __name__ == "__main__":
    print(runtime(sys.argv[1]))
    print(",".join(gpus()))
