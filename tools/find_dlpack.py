# SPDX-License-Identifier: MIT
"""Print the folder that holds dlpack/dlpack.h, version 1.3 or newer.

Looked for in the folder that DLPACK_INCLUDE names, else in the apache-tvm-ffi package, which carries the header (the
package is found, not imported).  Debian's own copy is too old.
"""
import importlib.util
import os
import re
import sys


def candidates():
    if os.environ.get("DLPACK_INCLUDE"):
        yield os.environ["DLPACK_INCLUDE"]
        return
    spec = importlib.util.find_spec("tvm_ffi")
    if spec:
        yield os.path.join(os.path.dirname(spec.origin), "include")


for folder in candidates():
    header = os.path.join(folder, "dlpack", "dlpack.h")
    if os.path.isfile(header):
        with open(header, encoding="utf-8") as f:
            found = dict(re.findall(r"#define DLPACK_(MAJOR|MINOR)_VERSION (\d+)", f.read()))
        if (int(found["MAJOR"]), int(found["MINOR"])) >= (1, 3):
            print(folder)
            sys.exit(0)
sys.exit("dlpack/dlpack.h 1.3 was not found: pip install apache-tvm-ffi, or set DLPACK_INCLUDE")
