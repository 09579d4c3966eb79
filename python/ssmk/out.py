# SPDX-License-Identifier: MIT
"""Who allocates a result, and how a JAX array stands in for memory that is written.

A call comes here, into `complete`, when `out` was not given, when a return_... argument asked for
another output, or when a tensor to be written is a JAX array.  Results lie compact in row-major
order, in the framework and on the device of the call's first tensor.

JAX arrays are immutable: where one would be written a copy is, and comes back as a new JAX array.
"""
import math
import sys


# ---------------------------------------------------------------- frameworks

def _framework(tensor):
    module = type(tensor).__module__.partition(".")[0]
    if module in ("jax", "jaxlib"):
        return "jax"
    for name, base in ("torch", "Tensor"), ("numpy", "ndarray"):
        if name in sys.modules and isinstance(tensor, getattr(sys.modules[name], base)):
            return name
    return module


def _dtype_name(tensor):
    """Its dtype as all frameworks spell it: float32, bfloat16, ..."""
    return getattr(tensor.dtype, "name", None) or str(tensor.dtype).rpartition(".")[2]


def _numpy_empty(shape, dtype, alignment=1):
    import numpy as np
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + alignment - 1, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start:start + nbytes].view(dtype).reshape(shape)


def empty(like, shape, dtype):
    """Memory for a result; for JAX it is a NumPy array that `_finish` hands over."""
    framework = _framework(like)
    if framework == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if framework == "numpy":
        return _numpy_empty(shape, dtype)
    if framework == "jax":
        if like.__dlpack_device__()[0] != 1:
            raise NotImplementedError("JAX arrays work on the CPU only")
        return _numpy_empty(shape, dtype, alignment=64)  # what XLA takes over without a copy
    from array_api_compat import array_namespace, device
    try:
        namespace = array_namespace(like)
    except TypeError as e:
        raise TypeError(f"no result can be allocated like a {type(like).__module__}."
                        f"{type(like).__qualname__}; pass a tensor to write into") from e
    return namespace.empty(shape, dtype=getattr(namespace, dtype), device=device(like))


def allocate(like, nbytes):
    """Scratch where `like` is."""
    return empty(like, (nbytes,), "uint8")


def _writable(array):
    memory = empty(array, array.shape, _dtype_name(array))
    memory[...] = array
    return memory


def _finish(like, memory):
    if _framework(like) != "jax":
        return memory
    import jax
    # device_put takes aligned memory over without a copy.  jax.dlpack.from_dlpack would too, but
    # may deadlock: NumPy's deleter needs the GIL, on a thread that the GIL's holder waits for.
    return jax.device_put(memory, like.device)


# ---------------------------------------------------------------- shapes of outputs not given

class _Arguments(dict):
    def __init__(self, op, arguments):
        super().__init__(arguments)
        self.name = op.name

    def given(self, name):
        if self[name] is None:
            raise ValueError(f"{self.name}: {name}: is missing")
        return self[name]

    def axes(self, name, layout):
        """The shape of an argument that must have these axes."""
        shape = tuple(self.given(name).shape)
        if len(shape) != len(layout.split(", ")):
            raise ValueError(f"{self.name}: {name}: shape must be ({layout}), got {shape}")
        return shape

    def like(self, name):
        return tuple(self.given(name).shape), _dtype_name(self[name])

    def nseq(self):
        if self["state_indices"] is not None:
            raise ValueError(f"{self.name}: final_states: is missing; with state_indices it is a "
                             "pool, which only the caller can size")
        if self["cu_seqlens"] is not None:
            return self.axes("cu_seqlens", "nseq + 1")[0] - 1
        return self["x"].shape[0]

    def dim(self):
        _, rows, columns = self.axes("x", "batch, dim, seqlen")
        return columns if self["channels_last"] else rows

    def state_dtype(self, initial="initial_states", default="float32"):
        return default if self[initial] is None else _dtype_name(self[initial])


def _scan_states(a):
    dstate = a.axes("A", "dim, dstate")[1]
    default = "complex64" if "complex" in _dtype_name(a["A"]) else "float32"
    return (a.nseq(), a.dim(), dstate), a.state_dtype(default=default)


def _conv_states(a):
    state_len = a.axes("weight", "dim, width")[1] - 1
    if a["initial_states"] is not None:
        state_len = a.axes("initial_states", "nseq, dim, state_len")[2]
    return (a.nseq(), a.dim(), state_len), a.state_dtype()


def _heads_out(a):
    """As x; without mimo_out the rank vectors stay apart, on an axis that B has and x lacks."""
    (shape, dtype), B = a.like("x"), a.given("B").shape
    if len(B) == len(shape) + 1 > 3 and B[-3] > 1 and a["mimo_out"] is None:
        shape = (*shape[:-2], B[-3], *shape[-2:])
    return shape, dtype


def _heads_states(initial, axes, part=None):
    """`part`: the input that makes this state exist."""
    def rule(a):
        if part and a[part] is None:
            return None
        _, _, nheads, headdim = a.axes("x", "batch, seqlen, nheads, headdim")
        B, angles = a.given("B").shape, a["angles"]
        sizes = {"nheads": nheads, "headdim": headdim, "dstate": B[-1],
                 "rank": B[2] if len(B) == 5 else 1,
                 "nangles": 0 if angles is None else angles.shape[-1]}
        return (a.nseq(), *(sizes[axis] for axis in axes)), a.state_dtype(initial)
    return rule


# operation -> output -> its shape and dtype from the other arguments, or None: there is none
_RULES = {
    "selective_scan": {"out": lambda a: a.like("x"), "final_states": _scan_states},
    "ssd_chunk": {
        "out": _heads_out,
        "final_states": _heads_states("initial_states", ("nheads", "headdim", "dstate")),
        "final_angle_states": _heads_states(
            "initial_angle_states", ("nheads", "nangles"), "angles"),
        "final_k_states": _heads_states("initial_k_states", ("rank", "nheads", "dstate"), "trap"),
        "final_v_states": _heads_states("initial_v_states", ("nheads", "headdim"), "trap"),
    },
    "state_update": {
        "out": lambda a: _heads_out(a) if len(a.given("state").shape) == 4 else a.like("x")},
    "causal_conv1d": {"out": lambda a: a.like("x"), "final_states": _conv_states},
    "causal_conv1d_update": {"out": lambda a: a.like("x")},
    "mla_decode": {
        "out": lambda a: a.like("q_nope"),
        "lse": lambda a: (tuple(a["q_nope"].shape[:-1]), "float32"),
    },
}


_ASKS = {"return_final_states": "final_", "return_lse": "lse"}  # -> how the outputs' names begin


def complete(op, arguments):
    """Allocate the outputs that are missing, stand in for JAX arrays, and call again.

    Returns what the call returns, and behind it the other tensors that JAX sees updated.
    """
    args = _Arguments(op, arguments)
    asked = tuple(begin for ask, begin in _ASKS.items() if args.pop(ask, False))
    like = {}  # output in memory of ours -> whose kind it takes in the end
    for name in op.outputs:
        if args[name] is None:
            wanted = name == "out" or name.startswith(asked)
            shape_dtype = _RULES[op.name][name](args) if wanted else None
            if shape_dtype:
                like[name] = args.given(op.first)
                args[name] = empty(like[name], *shape_dtype)
        elif args[op.only_with.get(name, name)] is None:
            continue  # a cache that this call only reads
        elif _framework(args[name]) == "jax":
            if name == "out":
                raise TypeError(f"{op.name}: out: is a JAX array, which is immutable; "
                                "leave out= away and take the result")
            like[name] = args[name]
            args[name] = _writable(like[name])
    op.function(**args)
    returned = [name for name in op.results if args[name] is not None]
    returned += [name for name in like if name not in returned]
    finished = tuple(_finish(like[name], args[name]) if name in like else args[name]
                     for name in returned)
    return finished[0] if len(finished) == 1 else finished
