# SPDX-License-Identifier: MIT
"""The public functions for NumPy arrays, on a device that NumPy does not reach.

The memory of the arrays goes there and comes back whole, what lies around and between their
elements included: a test that looks at gaps, guards and slots of nobody sees what the device wrote.
"""

import ctypes

import numpy as np
import pytest
import ssmk

from cases import BF16

LARGEST = 1 << 30  # bytes of memory that are carried

KIND = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}  # as DLPack numbers them


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", DLTensor),
    ]


class Strided:
    """A tensor with any strides, which torch's never have negative, over memory of a device.

    What is allocated beside it is torch's.
    """

    def __init__(self, torch, memory, address, dlpack_device, like):
        self.torch, self.memory, self.device = torch, memory, memory.device
        self.dlpack_device, self.shape, self.dtype = dlpack_device, like.shape, like.dtype
        sizes = ctypes.c_int64 * max(like.ndim, 1)
        self.sizes = sizes(*like.shape)
        self.strides = sizes(*(s // like.itemsize for s in like.strides))
        code = 4 if like.dtype == BF16 else KIND[like.dtype.kind]
        tensor = DLTensor(
            address, *dlpack_device, like.ndim, code, 8 * like.itemsize, 1, self.sizes,
            self.strides, 0,
        )
        self.managed = Managed(1, 0, None, None, 0, tensor)

    def __array_namespace__(self, api_version=None):
        return self.torch

    def __dlpack_device__(self):
        return self.dlpack_device

    def __dlpack__(self, *, stream=None, max_version=None):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor_versioned", None)


def root_of(array):
    """(address, bytes) of all the memory that an array of some elements is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    reach = [(n - 1) * s for n, s in zip(array.shape, array.strides)]
    below = sum(r for r in reach if r < 0)
    above = sum(r for r in reach if r > 0) + array.itemsize
    return array.__array_interface__["data"][0] + below, above - below


def bytes_at(address, size):
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Carried:
    """`ops` on the device of torch's that is named."""

    def __init__(self, device):
        self.torch = pytest.importorskip("torch", reason="tensors on a GPU come from PyTorch")
        self.device = self.torch.device(device)
        self.dlpack_device = (2, self.device.index or 0) if self.device.type == "cuda" else (1, 0)

    def __getattr__(self, name):
        function = getattr(ssmk, name)
        if not callable(function) or not hasattr(function, "__self__"):
            return function

        def call(*args, **kwargs):
            return self.call(function, args, kwargs)

        return call

    def call(self, function, args, kwargs):
        named = dict(zip(function.__self__.parameters, args))
        named.update(kwargs)
        arrays = {k: v for k, v in named.items() if isinstance(v, np.ndarray)}
        memories = {}
        there = {k: self.to_device(v, memories) for k, v in arrays.items()}
        try:
            results = function(**{**named, **there})
        except NotImplementedError as e:
            if "not available on CUDA" in str(e):
                pytest.skip(str(e))
            raise
        self.bring_back(memories)
        here = {id(tensor): arrays[k] for k, tensor in there.items()}

        def returned(tensor):
            array = here.get(id(tensor))
            return self.to_numpy(tensor) if array is None else array

        if isinstance(results, tuple):
            return tuple(returned(tensor) for tensor in results)
        return returned(results)

    def to_device(self, array, memories):
        torch = self.torch
        name = "bfloat16" if array.dtype == BF16 else array.dtype.name
        dtype = getattr(torch, name)
        if array.size == 0:
            return torch.empty(array.shape, dtype=dtype, device=self.device)
        strides = [s // array.itemsize for s in array.strides]
        address, size = root_of(array)
        if size > LARGEST:
            pytest.skip(f"{size >> 20} MiB are not carried to a GPU; test_cuda.py has such pools")
        if address not in memories:
            room = torch.from_numpy(bytes_at(address, size).copy()).to(self.device)
            memories[address] = (size, room)
        room = memories[address][1]
        offset = array.__array_interface__["data"][0] - address
        if min(strides, default=0) < 0 or offset % array.itemsize:
            return Strided(torch, room, room.data_ptr() + offset, self.dlpack_device, array)
        tensor = torch.empty(0, dtype=dtype, device=self.device)
        return tensor.set_(room.untyped_storage(), offset // array.itemsize, array.shape, strides)

    def bring_back(self, memories):
        for address, (size, room) in memories.items():
            here, there = bytes_at(address, size), room.cpu().numpy()
            if not np.array_equal(here, there):  # what may not be written was not
                here[...] = there

    def to_numpy(self, tensor):
        tensor = tensor.cpu()
        if tensor.dtype == self.torch.bfloat16:
            return tensor.view(self.torch.uint16).numpy().view(BF16)
        return tensor.numpy()
