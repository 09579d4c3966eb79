# SPDX-License-Identifier: MIT
"""The C functions called through cffi, for arguments that Python's functions would never pass."""

import numpy as np
from ssmk._cffi import ffi, lib

from cases import BF16

# DLPack's numbers
CPU, CUDA, METAL, ROCM = 1, 2, 8, 10
INT, UINT, FLOAT, HANDLE, BFLOAT, COMPLEX, BOOL = range(7)
KIND = {"i": INT, "u": UINT, "f": FLOAT, "c": COMPLEX, "b": BOOL}

OPERATIONS = (
    "selective_scan", "ssd_chunk", "state_update", "causal_conv1d", "causal_conv1d_update",
    "mla_decode",
)
BUILT = OPERATIONS
STATUS = {0: "OK", 1: "INVALID_ARGUMENT", 2: "UNSUPPORTED", 3: "DEVICE_ERROR", 4: "OUT_OF_MEMORY"}


class Tensor:
    """A DLTensor over the memory of an array.  Its fields may be changed: `tensor.c.ndim = 7`."""

    def __init__(self, array):
        self.array = array
        self.shape = ffi.new("int64_t[]", array.shape or (0,))
        self.strides = ffi.new("int64_t[]", [s // array.itemsize for s in array.strides] or (0,))
        self.c = ffi.new("DLTensor *")
        self.c.data = ffi.cast("void *", array.__array_interface__["data"][0])
        self.c.device.device_type = CPU
        self.c.ndim = array.ndim
        self.c.dtype.code = BFLOAT if array.dtype == BF16 else KIND[array.dtype.kind]
        self.c.dtype.bits = array.itemsize * 8
        self.c.dtype.lanes = 1
        self.c.shape = self.shape
        self.c.strides = self.strides

    def reshape(self, shape, strides=None):
        """Another shape (and strides) over the same data."""
        self.shape = ffi.new("int64_t[]", list(shape) or (0,))
        self.c.ndim, self.c.shape = len(shape), self.shape
        self.strides = ffi.NULL if strides is None else ffi.new("int64_t[]", list(strides) or (0,))
        self.c.strides = self.strides


class Call:
    """One call: `fields` are arrays, Tensors, or scalars by the names of the struct."""

    def __init__(self, operation, **fields):
        self.operation = operation
        self.type = ffi.typeof(f"ssmk_{operation}_args")
        self.args = ffi.new(f"ssmk_{operation}_args *")
        self.args.size = ffi.sizeof(self.type)
        self.tensors = {}
        self.set(**fields)

    def set(self, **fields):
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                value = Tensor(value)
            if isinstance(value, Tensor):
                self.tensors[name] = value
                value = value.c
            elif value is None:
                self.tensors.pop(name, None)
                value = ffi.NULL
            setattr(self.args, name, value)
        return self

    def __call__(self, args=None):
        """(status, message)."""
        status = getattr(lib, f"ssmk_{self.operation}")(self.args if args is None else args)
        return STATUS[int(status)], ffi.string(lib.ssmk_last_error()).decode() if status else ""

    def workspace(self):
        """(status, message, bytes)."""
        wanted = ffi.new("uint64_t *", 2**64 - 1)
        status = getattr(lib, f"ssmk_{self.operation}_workspace")(self.args, wanted)
        return (
            STATUS[int(status)],
            ffi.string(lib.ssmk_last_error()).decode() if status else "",
            wanted[0],
        )

    def with_workspace(self):
        """Gives the call the scratch that it asks for."""
        status, message, size = self.workspace()
        assert status == "OK", message
        self.scratch = np.zeros(size + 64, np.uint8)
        address = -(-self.scratch.ctypes.data // 64) * 64
        return self.set(workspace=ffi.cast("void *", address), workspace_bytes=size)


def tensor_fields(operation):
    """The names of the fields that are tensors."""
    fields = ffi.typeof(f"ssmk_{operation}_args").fields
    return [name for name, field in fields if field.type is ffi.typeof("DLTensor *")]


def scalar_fields(operation):
    """{name: C type} of the fields that are numbers, size excepted."""
    fields = ffi.typeof(f"ssmk_{operation}_args").fields
    return {
        name: field.type.cname
        for name, field in fields
        if field.type.kind == "primitive" and name != "size"
    }
