# SPDX-License-Identifier: MIT
"""Runs nvcc and keeps what ptxas says of each kernel: `compile_cuda.py REPORT NVCC ARGUMENTS...`.

The report has a line for each kernel and target: target, registers, bytes of stack, of spill
stores, of spill loads and of static shared memory, how many losses of speed ptxas warns of (such as
matrix products that wait for each other), and the kernel's mangled name.
"""

import re
import subprocess
import sys

FUNCTION = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
LOSS = re.compile(r"Potential Performance Loss.* function '(\S+)'")
NOISE = re.compile(r"ptxas info|bytes stack frame|^$|^(tmpxft|\S+\.cu$)")


def main(report, command):
    done = subprocess.run(
        [*command, "-Xptxas", "-v"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    losses = LOSS.findall(done.stdout)
    lines, kernel, frame = [], None, None
    for line in done.stdout.splitlines():
        if found := FUNCTION.search(line):
            kernel, frame = found.groups(), None
        # What a call inside a kernel needs is reported too, before the kernel's own line.
        elif found := FRAME.search(line):
            frame = found.groups()
        elif (found := USED.search(line)) and kernel:
            shared = SHARED.search(line)
            name, target = kernel
            lost = str(losses.count(name))
            fields = (found.group(1), *frame, shared.group(1) if shared else "0", lost)
            lines.append(" ".join((target, *fields, name)))
            kernel = None
        elif not NOISE.search(line):
            print(line)
    if done.returncode == 0:
        with open(report, "w") as f:
            f.write("".join(f"{line}\n" for line in sorted(lines)))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
