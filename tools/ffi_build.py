# SPDX-License-Identifier: MIT
"""Turn the public header into the Python binding:  ffi_build.py ssmk.h _cffi.c _table.py

The header is the only description of the interface.  cffi compiles it into `ssmk._cffi` (types,
constants, plain functions).  `_table.py` lists the fields of each operation's struct in order; it
is read from the text because cffi forgets `const`, which is what tells an input from an output.
"""
import re
import sys

import cffi

# ssmk.h takes these from dlpack.h, whose prose and macros cffi cannot read.
DLPACK = """
typedef struct { int32_t device_type; int32_t device_id; } DLDevice;
typedef struct { uint8_t code; uint8_t bits; uint16_t lanes; } DLDataType;
typedef struct {
  void *data; DLDevice device; int32_t ndim; DLDataType dtype;
  int64_t *shape; int64_t *strides; uint64_t byte_offset;
} DLTensor;
"""


def declarations(header):
    """What stands between the marks, without comments and without the export macro."""
    text = re.sub(r"/\*\s*(\[cffi-(?:begin|end)\]).*?\*/", r"\1", header, flags=re.S)
    text = re.search(r"\[cffi-begin\](.*)\[cffi-end\]", text, re.S).group(1)
    return re.sub(r"/\*.*?\*/|\bSSMK_API\b", " ", text, flags=re.S)


def fields(text, struct):
    """(name, C type) of each field of a struct."""
    body = re.search(r"typedef struct %s \{(.*?)\} %s;" % (struct, struct), text, re.S).group(1)
    for declaration in filter(None, map(str.strip, body.split(";"))):
        base, declarators = re.fullmatch(r"((?:const\s+)?\w+)\b(.*)", declaration, re.S).groups()
        for declarator in declarators.split(","):
            pointer, name = re.fullmatch(r"\s*(\*?)\s*(\w+)\s*", declarator).groups()
            yield name, " ".join(base.split()) + (" *" if pointer else "")


def operations(text):
    """{X: (its struct, [(field, C type), ...])} of each ssmk_status ssmk_X(const ssmk_X_args *)."""
    found = re.findall(r"ssmk_status\s+ssmk_(\w+)\s*\(\s*const\s+(\w+)\s*\*\s*\w*\s*\)\s*;", text)
    return {name: (struct, list(fields(text, struct))) for name, struct in found}


def main(header, c_out, table_out):
    with open(header, encoding="utf-8") as file:
        text = declarations(file.read())
    ffi = cffi.FFI()
    ffi.cdef(DLPACK + text)
    ffi.set_source("ssmk._cffi", "#include <ssmk.h>\n")
    ffi.emit_c_code(c_out)
    with open(table_out, "w", encoding="utf-8") as file:
        file.write('"""The argument structs of ssmk.h, read by tools/ffi_build.py."""\nOPS = {\n')
        for name, (struct, members) in operations(text).items():
            file.write(f'    "{name}": ("{struct}", [\n')
            file.writelines(f'        ("{field}", "{ctype}"),\n' for field, ctype in members)
            file.write("    ]),\n")
        file.write("}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
