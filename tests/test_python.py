# SPDX-License-Identifier: MIT
"""The Python face: how tensors of every kind go in and come out, and what it refuses.

Where a test must see what arrives in C, a probe stands in for the C function and looks at the
struct (see `probe`); the real functions are called for everything else.
"""

import ast
import copy
import ctypes
import gc
import importlib.metadata
import importlib.resources
import inspect
import pickle
import re
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import ssmk
from cases import BF16, F16, F32, I32, I64, assert_same_bits, normal
from ssmk import _op, out as ssmk_out
from ssmk._cffi import ffi, lib
from ssmk._table import OPS

OPERATIONS = tuple(OPS)
PACKAGE = importlib.resources.files(ssmk)  # an editable install is spread over folders
HEADER = PACKAGE.joinpath("include", "ssmk.h").read_text()


# Kinds of tensors


class Kind:
    """Arrays of one framework and dtype, made from float32 NumPy arrays and taken back."""

    def __init__(self, name, dtype="float32"):
        self.name, self.dtype = name, dtype

    def __str__(self):
        return f"{self.name}-{self.dtype}"

    def load(self):
        if self.name != "numpy":
            self.module = pytest.importorskip(
                {"torch": "torch", "jax": "jax.numpy", "strict": "array_api_strict"}[self.name]
            )
        return self

    def make(self, array):
        """The array in this kind; floats in its dtype, other dtypes as they are."""
        dtype = self.dtype if array.dtype == F32 else array.dtype.name
        if self.name == "numpy":
            return array.astype(dtype)
        if self.name == "torch":
            return self.module.from_numpy(array.copy()).to(getattr(self.module, dtype))
        return self.module.asarray(array.copy(), dtype=getattr(self.module, dtype))

    def back(self, tensor):
        assert type(tensor) is type(self.make(np.zeros(1, F32))), type(tensor)
        if self.name == "torch" and self.dtype == "bfloat16":
            if tensor.dtype == self.module.bfloat16:
                return tensor.view(self.module.int16).numpy().view(ml_dtypes.bfloat16)
        return np.asarray(tensor)


KINDS = [
    Kind("numpy"), Kind("numpy", "float16"), Kind("numpy", "bfloat16"),
    Kind("torch"), Kind("torch", "float16"), Kind("torch", "bfloat16"),
    Kind("jax"), Kind("jax", "float16"), Kind("jax", "bfloat16"),
    Kind("strict"),
]
MUTABLE = [kind for kind in KINDS if kind.name != "jax"]


def name_of(kind):
    return str(kind)


@pytest.fixture(params=KINDS, ids=name_of)
def kind(request):
    return request.param.load()


@pytest.fixture(params=MUTABLE, ids=name_of)
def mutable(request):
    return request.param.load()


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


# Calls

B, D, L, N, W = 2, 3, 5, 4, 4  # batch, dim, seqlen, dstate, width
POOLS = {"state_update": "state", "causal_conv1d_update": "conv_state"}


def operands(operation, rng):
    """A small call in float32 NumPy arrays."""

    def f(*shape):
        return normal(rng, shape)

    if operation == "selective_scan":
        return dict(
            x=f(B, D, L), dt=f(B, D, L), A=-np.abs(f(D, N)), B=f(B, N, L), C=f(B, N, L), D=f(D),
            z=f(B, D, L), dt_bias=f(D), dt_softplus=True, return_final_states=True,
        )
    if operation == "ssd_chunk":
        x, token, ranked = f(B, L, D, 8), f(B, L, D), f(B, L, 2, 1, N)
        return dict(
            x=x, dt=token, A=-np.abs(f(D)), B=ranked, C=f(B, L, 2, 1, N), D=f(D), z=f(B, L, D, 8),
            dt_bias=f(D), trap=f(B, L, D), angles=f(B, L, D, 2), B_bias=f(D, 2, N),
            mimo_out=f(D, 2, 8), rotary="half", dt_softplus=True, return_final_states=True,
        )
    if operation == "state_update":
        return dict(
            state=f(B, D, N), x=f(B, D), dt=f(B, D), A=-np.abs(f(D, N)), B=f(B, N), C=f(B, N),
            D=f(D), z=f(B, D), dt_bias=f(D), dt_softplus=True,
        )
    if operation == "causal_conv1d":
        return dict(
            x=f(B, D, L), weight=f(D, W), bias=f(D), activation="silu", return_final_states=True
        )
    return dict(x=f(B, D), conv_state=f(B, D, W - 1), weight=f(D, W), bias=f(D), activation="silu")


def converted(kind, arguments):
    return {
        name: kind.make(value) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }


def results(operation, arguments):
    """Everything that a call gives: what it returns, and the pool that it updates in place."""
    got = getattr(ssmk, operation)(**arguments)
    got = got if isinstance(got, tuple) else (got,)
    if operation in POOLS and len(got) == 1:
        got += (arguments[POOLS[operation]],)
    return got


CALLS = ("selective_scan", "ssd_chunk", "state_update", "causal_conv1d", "causal_conv1d_update")


# A probe in the place of a C function


class Seen(dict):
    """The struct of a call: tensors as dicts, scalars as numbers; what is NULL or 0 is left out."""


def look(operation, args):
    seen = Seen()
    for field, ctype in OPS[operation][1]:
        value = getattr(args, field)
        if "DLTensor" in ctype:
            if value:
                dims = range(value.ndim)
                seen[field] = dict(
                    data=int(ffi.cast("uintptr_t", value.data)) + value.byte_offset,
                    device=(value.device.device_type, value.device.device_id),
                    dtype=(value.dtype.code, value.dtype.bits, value.dtype.lanes),
                    shape=tuple(value.shape[i] for i in dims),
                    strides=tuple(value.strides[i] for i in dims) if value.strides else None,
                )
        elif ctype == "void *":
            seen[field] = int(ffi.cast("uintptr_t", value))
        elif value:
            seen[field] = value
    return seen


@pytest.fixture
def probe():
    """probe(operation, answer) -> (function, seen): the function calls answer(args) instead of C.

    `answer` gets the struct and returns a status; what it raises comes out of the test.
    """
    alive, raised = [], []

    def make(operation, answer=lambda args: 0, need=0, allocate=ssmk_out.allocate):
        struct, fields = OPS[operation]
        seen = []

        def entry(args):
            seen.append(look(operation, args))
            return answer(args)

        def workspace(args, nbytes):
            nbytes[0] = need
            return 0

        def failed(_, error, __):
            raised.append(error)

        alive.append((
            ffi.callback(f"ssmk_status(*)(const {struct} *)", entry, error=1, onerror=failed),
            ffi.callback(f"ssmk_status(*)(const {struct} *, uint64_t *)", workspace),
            ffi.callback("const char *(*)()", lambda: text),
        ))
        text = ffi.new("char[]", b"the library's words")
        alive.append(text)
        real = getattr(ssmk, operation)
        fn, workspace_fn, error_fn = (int(ffi.cast("uintptr_t", f)) for f in alive[-2])
        op = _op.Op(
            real, [(field, ctype, ffi.offsetof(struct, field)) for field, ctype in fields],
            {name: getattr(lib, name) for name in dir(lib) if name.startswith("SSMK_")},
            real.__self__.results, real.__self__.only_with, fn=fn, workspace=workspace_fn, last_error=error_fn,
            size=ffi.sizeof(struct), complete=ssmk_out.complete, allocate=allocate,
        )  # fmt: skip
        return op.function, seen

    yield make
    assert not raised, raised


# The interface


@pytest.mark.parametrize("operation", OPERATIONS)
def test_table_lists_the_fields_of_the_header(operation):
    struct, fields = OPS[operation]
    assert struct == f"ssmk_{operation}_args"
    compiled = ffi.typeof(struct).fields
    assert [name for name, _ in fields] == [name for name, _ in compiled]
    for (_, ctype), (_, field) in zip(fields, compiled):
        assert ffi.getctype(ctype.replace("const ", "")) == field.type.cname
    body = re.search(r"typedef struct %s \{(.*?)\n\} " % struct, HEADER, re.S).group(1)
    constant = re.findall(r"const DLTensor \*(\w+);", body)
    assert constant and constant == [n for n, ctype in fields if ctype == "const DLTensor *"]


def test_table_lists_every_operation_of_the_header():
    declared = re.findall(r"ssmk_status ssmk_(\w+)\(const \w+ \*args\);", HEADER)
    assert sorted(OPERATIONS) == sorted(declared)
    assert len(OPERATIONS) == len(re.findall(r"^\} ssmk_\w+_args;", HEADER, re.M))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_field_can_be_given(operation):
    given = set(inspect.signature(getattr(ssmk, operation)).parameters)
    hidden = {"size", "reserved", "workspace", "workspace_bytes", "flags", "dt_min", "dt_max"}
    fields = {name for name, _ in OPS[operation][1]}
    assert fields - hidden <= given
    assert ("dt_min" in fields) == ("dt_limit" in given)
    comment = re.search(r"uint64_t flags;\s*/\*(.*?)\*/\n\} ssmk_%s_args" % operation, HEADER)
    flags = {flag.lower() for flag in re.findall(r"SSMK_(\w+)", comment.group(1))}
    asks = {name for name in given if name.startswith("return_")}
    assert flags <= given and given == (fields - hidden) | flags | asks | (given & {"dt_limit"})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_docstrings_name_every_parameter(operation):
    function = getattr(ssmk, operation)
    missing = [
        name for name in inspect.signature(function).parameters
        if not re.search(rf"(?<![\w.]){name}(?!\w)", function.__doc__)
    ]  # fmt: skip
    assert not missing


def test_every_public_function_is_documented():
    for name in ssmk.__all__:
        assert getattr(ssmk, name).__doc__.strip(), name
    for word in ("Sequences", "Slots", "Errors", "JAX", "SSMK_ISA", "Sources"):
        assert word in ssmk.__doc__


def test_stubs_agree_with_the_functions():
    stub = ast.parse(PACKAGE.joinpath("__init__.pyi").read_text())
    declared = [node for node in stub.body if isinstance(node, ast.FunctionDef)]
    assert {node.name for node in declared} == set(ssmk.__all__)
    for node in declared:
        a = node.args
        assert not a.posonlyargs and not a.vararg and not a.kwarg
        got = [(p.arg, False) for p in a.args] + [(p.arg, True) for p in a.kwonlyargs]
        signature = inspect.signature(getattr(ssmk, node.name)).parameters.values()
        assert got == [(p.name, p.kind == p.KEYWORD_ONLY) for p in signature], node.name
        defaults = [None] * (len(a.args) - len(a.defaults)) + a.defaults + a.kw_defaults
        for p, default in zip(signature, defaults):
            if default is not None:  # an overload may require what the function does not
                assert ast.literal_eval(default) == p.default, (node.name, p.name)
            elif p.default is not p.empty:
                assert any("overload" in ast.dump(d) for d in node.decorator_list), p.name
    assert PACKAGE.joinpath("py.typed").is_file()


def test_version_is_one():
    macros = dict(re.findall(r"#define SSMK_VERSION_(\w+) (\d+)", HEADER))
    assert ssmk.__version__ == "{MAJOR}.{MINOR}.{PATCH}".format(**macros)
    try:
        assert importlib.metadata.version("ssmk") == ssmk.__version__
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed as a distribution")


def test_functions_look_like_functions():
    f = ssmk.state_update
    assert callable(f) and f.__name__ == "state_update" and f.__module__ == "ssmk"
    assert str(inspect.signature(f)).startswith("(state, x, dt, A, B, C, D=None, z=None, dt_bias=")
    assert pickle.loads(pickle.dumps(f)) == f and copy.deepcopy(f) == f
    assert not hasattr(f.__self__, "no_such_attribute")


def test_importing_ssmk_imports_no_array_library():
    code = (
        "import sys; sys.modules['numpy'] = None; import ssmk; ssmk.cpu_isa();"
        "assert not {'torch', 'jax', 'array_api_compat', 'ml_dtypes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_devices():
    assert ssmk.device_count() == ssmk.device_count("cpu") == 1
    assert ssmk.backend_built("cpu") is True
    for kind in ("cuda", "metal"):
        assert ssmk.device_count(kind) >= 0
        assert ssmk.backend_built(kind) in (False, True)
        assert ssmk.backend_built(kind) or ssmk.device_count(kind) == 0
    for wrong in ("tpu", None, 2):
        with pytest.raises(ValueError, match="kind: expected one of 'cpu', 'cuda', 'metal', got"):
            ssmk.device_count(wrong)
        with pytest.raises(ValueError, match="kind: expected one of"):
            ssmk.backend_built(wrong)


# Every kind in, the same kind out


@pytest.mark.parametrize("operation", CALLS)
def test_results_come_in_the_kind_of_x(operation, kind, rng):
    arguments = operands(operation, rng)
    given = converted(kind, arguments)
    want = results(operation, converted(Kind("numpy", kind.dtype), arguments))
    got = results(operation, given)
    assert len(got) == len(want) == (5 if operation == "ssd_chunk" else 2)
    for i, (tensor, array) in enumerate(zip(got, want)):
        assert_same_bits(kind.back(tensor), array, f"result {i}")
    assert kind.back(got[0]).dtype == kind.dtype


@pytest.mark.parametrize("operation", CALLS)
def test_out_is_written_and_returned_as_it_is(operation, mutable, rng):
    arguments = converted(mutable, operands(operation, rng))
    fresh = copy.deepcopy(arguments)
    out = mutable.make(np.full(np.shape(arguments["x"]), np.nan, F32))
    got = results(operation, {**arguments, "out": out})
    assert got[0] is out
    for tensor, want in zip(got, results(operation, fresh), strict=True):
        assert_same_bits(mutable.back(tensor), mutable.back(want))


@pytest.mark.parametrize("operation", ("selective_scan", "causal_conv1d"))
def test_final_states_are_written_and_returned_as_they_are(operation, mutable, rng):
    arguments = operands(operation, rng)
    want = results(operation, converted(mutable, arguments))[1]
    states = mutable.make(np.full(np.shape(want), np.nan, F32))
    del arguments["return_final_states"]
    arguments = converted(mutable, arguments)
    out, got = getattr(ssmk, operation)(**arguments, final_states=states)
    assert got is states
    assert np.isfinite(mutable.back(states).astype(F32)).all()
    alone = getattr(ssmk, operation)(**arguments)
    assert_same_bits(mutable.back(alone), mutable.back(out))


SSD_STATES = ("states", "angle_states", "k_states", "v_states")


def test_all_states_of_prefill_are_written_and_returned_as_they_are(mutable, rng):
    """Final and captured ones, in the order of the signature, whichever are given."""
    arguments = operands("ssd_chunk", rng)
    want = results("ssd_chunk", converted(mutable, arguments))
    del arguments["return_final_states"]
    arguments["capture_positions"] = np.array([L - 1, 2 * L - 1])  # the last tokens: final states
    arguments = converted(mutable, arguments)
    shapes = [np.shape(states) for states in want[1:]]
    for names in (SSD_STATES, SSD_STATES[1::2], SSD_STATES[:1]):
        rooms = {
            f"{when}_{name}": mutable.make(np.full(shape, np.nan, F32))
            for when in ("final", "captured")
            for name, shape in zip(SSD_STATES, shapes)
            if name in names
        }
        backwards = dict(reversed(rooms.items()))
        out, *states = ssmk.ssd_chunk(**arguments, **backwards)
        assert [id(tensor) for tensor in states] == [id(tensor) for tensor in rooms.values()]
        for tensor, (name, room) in zip(states, rooms.items()):
            array = mutable.back(want[1 + SSD_STATES.index(name.partition("_")[2])])
            assert_same_bits(mutable.back(tensor), array.astype(mutable.back(tensor).dtype), name)
        assert_same_bits(mutable.back(out), mutable.back(want[0]))


def test_prefill_returns_the_states_of_the_parts_in_use(kind, rng):
    """Allocated in the dtype of the initial state, float32 without one."""
    arguments = operands("ssd_chunk", rng)
    initial = normal(rng, (B, D, 8))
    for missing, count in (((), 5), (("angles",), 4), (("trap",), 3), (("trap", "angles"), 2)):
        given = {k: v for k, v in arguments.items() if k not in missing}
        if "trap" in given:
            given["initial_v_states"] = initial
        got = results("ssd_chunk", converted(kind, given))
        assert len(got) == count
        dtypes = {str(kind.back(tensor).dtype) for tensor in got[1:2]}
        assert dtypes == {"float32"}
        if "trap" in given:
            assert kind.back(got[-1]).dtype == kind.dtype
    alone = ssmk.ssd_chunk(**converted(kind, {**given, "return_final_states": False}))
    assert_same_bits(kind.back(alone), kind.back(got[0]))


def test_jax_gets_all_states_of_prefill(jax, rng):
    """Pools that are updated in place, and captures: all come back as new arrays."""
    arguments = operands("ssd_chunk", rng)
    shapes = [states.shape for states in results("ssd_chunk", arguments)[1:]]
    del arguments["return_final_states"]
    arguments["state_indices"] = np.array([3, 0], I32)
    arguments["capture_positions"] = np.array([2, 7], I32)
    pools = {name: normal(rng, (4, *shape[1:])) for name, shape in zip(SSD_STATES, shapes)}
    captured = {f"captured_{name}": normal(rng, shape) for name, shape in zip(SSD_STATES, shapes)}
    both = {f"{when}_{name}": pool for when in ("initial", "final") for name, pool in pools.items()}
    kind = Kind("jax").load()
    given, old = converted(kind, {**arguments, **captured}), converted(kind, pools)
    got = ssmk.ssd_chunk(
        **given, **{f"{when}_{name}": old[name] for when in ("initial", "final") for name in old}
    )
    want = ssmk.ssd_chunk(**arguments, **captured, **both)
    assert len(got) == len(want) == 9
    for i, (tensor, array) in enumerate(zip(got, want)):
        assert isinstance(tensor, jax.Array)
        assert_same_bits(np.asarray(tensor), array, f"result {i}")
    for name in pools:
        assert (np.asarray(old[name]) != pools[name]).any(), f"{name} was changed"


@pytest.mark.parametrize("operation", POOLS)
def test_states_are_updated_in_place(operation, mutable, rng):
    arguments = converted(mutable, operands(operation, rng))
    pool = arguments[POOLS[operation]]
    before = mutable.back(pool).copy()
    out = getattr(ssmk, operation)(**arguments)
    assert not isinstance(out, tuple)
    assert (mutable.back(pool) != before).any()


@pytest.mark.parametrize("operation", POOLS)
def test_jax_gets_its_states_back_and_keeps_the_old(operation, jax, rng):
    arguments = operands(operation, rng)
    given = converted(Kind("jax").load(), arguments)
    before = {k: np.array(v) for k, v in given.items() if isinstance(v, jax.Array)}
    out, state = getattr(ssmk, operation)(**given)
    want = results(operation, arguments)
    assert_same_bits(np.asarray(out), want[0])
    assert_same_bits(np.asarray(state), want[1])
    for name, array in before.items():
        assert_same_bits(np.asarray(given[name]), array, name)


def test_jax_states_beside_numpy_inputs(jax, rng):
    arguments = operands("state_update", rng)
    want = results("state_update", copy.deepcopy(arguments))
    memory = np.empty_like(arguments["x"])
    arguments["state"] = jax.numpy.asarray(arguments["state"])
    out, state = ssmk.state_update(**arguments, out=memory)
    assert out is memory and isinstance(state, jax.Array)
    assert_same_bits(out, want[0])
    assert_same_bits(np.asarray(state), want[1])


def test_jax_returns_every_state_that_is_updated(jax, rng):
    arguments = operands("state_update", rng)
    for name in ("x", "dt", "B", "C", "z"):
        arguments[name] = np.stack([arguments[name]] * 2, axis=1)
    arguments["intermediate_states"] = np.zeros((B, 2, D, N), F32)
    given = converted(Kind("jax").load(), arguments)
    out, state, intermediate = ssmk.state_update(**given)
    want = ssmk.state_update(**arguments)
    assert_same_bits(np.asarray(out), want)
    assert_same_bits(np.asarray(state), arguments["state"])
    assert_same_bits(np.asarray(intermediate), arguments["intermediate_states"])
    assert not np.asarray(given["intermediate_states"]).any()


def test_jax_pools_of_final_states_are_returned(jax, rng):
    arguments = operands("causal_conv1d", rng)
    del arguments["return_final_states"]
    pool = normal(rng, (4, D, W - 1))
    given = dict(converted(Kind("jax").load(), arguments), state_indices=jax.numpy.array([3, 0]))
    old = jax.numpy.asarray(pool.copy())
    out, new = ssmk.causal_conv1d(**given, initial_states=old, final_states=old)
    want = ssmk.causal_conv1d(
        **arguments, state_indices=np.array([3, 0]), initial_states=pool, final_states=pool
    )
    assert_same_bits(np.asarray(out), want[0])
    assert_same_bits(np.asarray(new), pool)
    assert (np.asarray(old) != pool).any()


def test_kinds_may_be_mixed(torch, jax, rng):
    arguments = operands("selective_scan", rng)
    want = ssmk.selective_scan(**arguments)
    arguments.update(
        x=torch.from_numpy(arguments["x"]), A=jax.numpy.asarray(arguments["A"]),
        B=Kind("strict").load().make(arguments["B"]),
    )
    got = ssmk.selective_scan(**arguments)
    assert all(isinstance(tensor, torch.Tensor) for tensor in got)
    for tensor, array in zip(got, want):
        assert_same_bits(tensor.numpy(), array)


# Shapes and dtypes of what is allocated


@pytest.mark.parametrize(
    "operation, axis",
    [(c, "batch") for c in CALLS] + [(c, "seqlen") for c in CALLS if c not in POOLS],
)
def test_empty_shapes_work(operation, axis, kind, rng):
    arguments = operands(operation, rng)
    per_batch = {"x", "dt", "z", "B", "C", "trap", "angles"}
    for name, value in arguments.items():
        if isinstance(value, np.ndarray) and axis == "batch":
            arguments[name] = value[:0] if name in per_batch and value.ndim > 1 else value
        elif isinstance(value, np.ndarray) and name in per_batch:
            arguments[name] = value[:, :0] if operation == "ssd_chunk" else value[..., :0]
    got = results(operation, converted(kind, arguments))
    assert kind.back(got[0]).shape == arguments["x"].shape
    if operation not in POOLS and axis == "seqlen":
        assert kind.back(got[1]).shape[0] == B and not kind.back(got[1]).any()


def test_final_states_have_the_dtype_that_is_promised(kind, rng):
    scan, conv = operands("selective_scan", rng), operands("causal_conv1d", rng)
    assert kind.back(ssmk.selective_scan(**converted(kind, scan))[1]).dtype == F32
    assert kind.back(ssmk.causal_conv1d(**converted(kind, conv))[1]).dtype == F32
    for operation, arguments, shape in (
        ("selective_scan", scan, (B, D, N)), ("causal_conv1d", conv, (B, D, W + 2)),
    ):
        arguments = converted(kind, {**arguments, "initial_states": np.zeros(shape, F32)})
        states = kind.back(getattr(ssmk, operation)(**arguments)[1])
        assert states.dtype == kind.dtype and states.shape == shape


@pytest.mark.parametrize("name", ("numpy", "torch", "jax"))
def test_complex_scans_have_complex_states(name, rng):
    arguments = operands("selective_scan", rng)
    for what in ("A", "B", "C"):
        arguments[what] = (arguments[what] * (1 + 0.5j)).astype(np.complex64)
    kind = Kind(name).load()
    want = ssmk.selective_scan(**arguments)
    got = ssmk.selective_scan(**converted(kind, arguments))
    assert want[1].dtype == np.complex64 and want[1].imag.any()
    for tensor, array in zip(got, want):
        assert_same_bits(kind.back(tensor), array)


def test_final_states_follow_layout_and_packing(rng):
    scan, conv = operands("selective_scan", rng), operands("causal_conv1d", rng)
    for arguments, operation in ((scan, "selective_scan"), (conv, "causal_conv1d")):
        one = {k: v[:1] if getattr(v, "ndim", 0) == 3 else v for k, v in arguments.items()}
        last = {
            k: v.swapaxes(1, 2) if getattr(v, "ndim", 0) == 3 else v for k, v in one.items()
        }
        function = getattr(ssmk, operation)
        width = N if operation == "selective_scan" else W - 1
        assert function(**one, cu_seqlens=np.array([0, 2, 2, L]))[1].shape == (3, D, width)
        a, b = function(**one), function(**last, channels_last=True)
        assert b[1].shape == (1, D, width)
        np.testing.assert_allclose(a[1], b[1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a[0], b[0].swapaxes(1, 2), rtol=1e-5, atol=1e-6)


def test_a_pool_of_final_states_is_never_guessed(rng):
    arguments = operands("causal_conv1d", rng)
    with pytest.raises(ValueError, match="^causal_conv1d: final_states: .*state_indices"):
        ssmk.causal_conv1d(**arguments, state_indices=np.array([1, 0]))


@pytest.mark.parametrize("name, change, message", [
    ("x", None, "x: is missing"),
    ("x", np.zeros(3, F32), r"x: shape must be \(batch, dim, seqlen\), got \(3,\)"),
    ("A", None, "A: is missing"),
    ("A", np.zeros(3, F32), r"A: shape must be \(dim, dstate\), got \(3,\)"),
    ("cu_seqlens", np.zeros((1, 2), I32), r"cu_seqlens: shape must be \(nseq \+ 1\), got \(1, 2\)"),
])  # fmt: skip
def test_shapes_that_size_nothing_are_named(name, change, message, rng):
    with pytest.raises(ValueError, match="^selective_scan: " + message):
        ssmk.selective_scan(**{**operands("selective_scan", rng), name: change})


def test_outputs_of_mimo_layers_keep_their_ranks_apart(probe, rng):
    f, seen = probe("ssd_chunk")
    x, dt, A = normal(rng, (1, L, 2, 8)), normal(rng, (1, L, 2)), normal(rng, (2,))
    ranked, plain = normal(rng, (1, L, 3, 1, N)), normal(rng, (1, L, 1, N))
    phi = normal(rng, (2, 3, 8))
    assert f(x, dt, A, plain, plain).shape == x.shape
    assert f(x, dt, A, plain[:, :, None], plain[:, :, None]).shape == x.shape
    assert f(x, dt, A, ranked, ranked).shape == (1, L, 3, 2, 8)
    assert f(x, dt, A, ranked, ranked, mimo_out=phi).shape == x.shape
    got = f(x, dt, A, ranked, ranked, mimo_out=phi, trap=dt, angles=normal(rng, (1, L, 2, 2)),
            return_final_states=True, initial_k_states=np.zeros((1, 3, 2, N), F16))  # fmt: skip
    assert [(t.shape, t.dtype) for t in got[1:]] == [
        ((1, 2, 8, N), F32), ((1, 2, 2), F32), ((1, 3, 2, N), F16), ((1, 2, 8), F32),
    ]
    assert len(f(x, dt, A, plain, plain, return_final_states=True)) == 2
    f, seen = probe("state_update")
    state = normal(rng, (1, 2, 8, N))
    assert f(state, x[:, 0], dt[:, 0], A, ranked[:, 0], ranked[:, 0]).shape == (1, 3, 2, 8)
    assert f(state, x, dt, A, ranked, ranked).shape == (1, L, 3, 2, 8)
    # without heads a B with one axis more has groups, not ranks
    state, x = normal(rng, (2, D, N)), normal(rng, (2, D))
    assert f(state, x, x, normal(rng, (D, N)), *[normal(rng, (2, 3, N))] * 2).shape == (2, D)


def test_lse_is_returned_where_it_is_wanted(probe, rng):
    f, seen = probe("mla_decode")
    q, seqlens = normal(rng, (2, 3, 8), F16), np.array([1, 2])
    out = f(q, seqlens, latent=normal(rng, (2, 4, 8)))
    assert out.shape == q.shape and out.dtype == F16
    out, lse = f(q, seqlens, return_lse=True)
    assert lse.shape == (2, 3) and lse.dtype == F32 and "softmax_scale" not in seen[-1]
    assert f(q, seqlens, lse=lse, softmax_scale=0.5)[1] is lse
    assert seen[-1]["softmax_scale"] == 0.5


# What arrives in C


@pytest.mark.parametrize("name", ("numpy", "torch", "jax", "strict"))
def test_inputs_are_not_copied(name, probe, rng):
    kind = Kind(name).load()
    f, seen = probe("state_update")
    arguments = converted(kind, operands("state_update", rng))
    if name == "jax":
        arguments["state"] = operands("state_update", rng)["state"]
    f(**arguments, out=np.zeros((B, D), F32))
    for field, tensor in arguments.items():
        if not hasattr(tensor, "shape"):
            continue
        if hasattr(tensor, "data_ptr"):
            where = tensor.data_ptr()
        elif hasattr(tensor, "unsafe_buffer_pointer"):
            where = tensor.unsafe_buffer_pointer()
        else:
            where = np.asarray(tensor).ctypes.data
        assert seen[0][field]["data"] == where, field
        assert seen[0][field]["shape"] == tuple(tensor.shape)
        assert seen[0][field]["device"] == (1, 0)


def test_jax_takes_results_over_without_a_copy(jax, probe, rng):
    f, seen = probe("state_update")
    out, state = f(**converted(Kind("jax", "bfloat16").load(), operands("state_update", rng)))
    assert out.unsafe_buffer_pointer() == seen[0]["out"]["data"]
    assert state.unsafe_buffer_pointer() == seen[0]["state"]["data"]
    assert seen[0]["out"]["dtype"] == (4, 16, 1)


def test_strides_and_offsets_arrive_in_elements(probe, rng, torch):
    f, seen = probe("causal_conv1d")
    base = normal(rng, (4, 6, 10))
    for x in (
        base, base[1:, ::2, 3:], base.transpose(2, 0, 1), base[:, ::-1, ::-3], base[..., None, 0],
        np.broadcast_to(base[:1, :, :1], (4, 6, 10)), base[0, 0], base[:0], np.array(1, F32),
        np.asfortranarray(base), base.astype(BF16)[:, 1:, ::2],
    ):  # fmt: skip
        f(x, base, out=base)
        tensor = seen[-1]["x"]
        assert tensor["data"] == x.ctypes.data and tensor["shape"] == x.shape
        if x.size:
            assert tensor["strides"] == tuple(s // x.itemsize for s in x.strides)
        if x.dtype == F32 and min(x.strides, default=0) >= 0:
            f(torch.from_numpy(np.asarray(base))[1:, ::2, 3:].transpose(0, 2), base, out=base)
            assert seen[-1]["x"]["strides"] == (1, 20, 60)


def test_strides_of_axes_of_length_one_are_anything(probe):
    f, seen = probe("causal_conv1d")
    base = np.zeros(64, np.uint8)
    x = np.ndarray((1, 3), F32, base, strides=(6, 4))  # 6 bytes: never stepped
    f(x, x, out=np.zeros(1, F32))
    assert seen[0]["x"]["shape"] == (1, 3) and seen[0]["x"]["strides"][1] == 1


@pytest.mark.parametrize("dtype, want", [
    ("f4", (2, 32)), ("f2", (2, 16)), ("f8", (2, 64)), ("c8", (5, 64)), ("c16", (5, 128)),
    ("?", (6, 8)), ("i1", (0, 8)), ("u1", (1, 8)), ("i2", (0, 16)), ("u2", (1, 16)),
    ("i4", (0, 32)), ("u4", (1, 32)), ("i8", (0, 64)), ("u8", (1, 64)),
    ("longlong", (0, 64)), ("intc", (0, 32)),
    ("ulonglong", (1, 64)), ("uintc", (1, 32)), (ml_dtypes.bfloat16, (4, 16)),
])  # fmt: skip
def test_numpy_dtypes_are_recognised(dtype, want, probe):
    f, seen = probe("causal_conv1d")
    x = np.zeros((2, 3), dtype)
    f(x, x, out=x)
    assert seen[0]["x"]["dtype"] == (*want, 1) and seen[0]["out"]["dtype"] == (*want, 1)


def test_what_dlpack_says_of_a_dtype_is_what_is_read(probe):
    f, seen = probe("causal_conv1d")

    class Plain:  # goes through __dlpack__
        def __init__(self, array):
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

        __dlpack__ = None

    for code in "?bBhHiIlLqQefdFD":
        x = np.zeros((2, 3), code)
        f(x, Plain(x), out=x)
        got = dict(seen[-1]["weight"], strides=None)
        assert got == dict(seen[-1]["x"], strides=None), code


def test_memory_maps_are_read_where_they_lie(probe, tmp_path):
    f, seen = probe("causal_conv1d")
    for dtype in (F32, BF16):
        data = np.memmap(tmp_path / dtype.name, np.uint8, "w+", shape=96).view(dtype).reshape(2, -1)
        assert type(data) is np.memmap
        f(data, data, out=np.zeros(1, F32))
        assert seen[-1]["x"]["data"] == data.ctypes.data
        assert seen[-1]["x"]["dtype"] == ((2, 32, 1) if dtype == F32 else (4, 16, 1))


def test_a_subclass_that_exports_otherwise_is_heard(probe):
    elsewhere = np.ones((2, 3), F32)

    class Subclass(np.ndarray):
        def __dlpack__(self, **options):
            return elsewhere.__dlpack__(**options)

    f, seen = probe("causal_conv1d")
    x = np.zeros((2, 3), F32)
    f(x.view(Subclass), x, out=x)
    assert seen[0]["x"]["data"] == elsewhere.ctypes.data


def test_arguments_that_are_not_given_are_zero(probe, rng):
    x, weight = normal(rng, (B, D, L)), normal(rng, (D, W))
    f, seen = probe("causal_conv1d")
    f(x, weight)
    assert set(seen[0]) == {"size", "x", "weight", "out", "stream", "workspace"}
    assert seen[0]["size"] == ffi.sizeof("ssmk_causal_conv1d_args")
    assert seen[0]["stream"] == seen[0]["workspace"] == 0


def test_scalars_flags_and_words_arrive(probe, rng):
    f, seen = probe("state_update")
    a = operands("state_update", rng)
    del a["dt_softplus"]

    def arrives(**options):
        f(**a, **options)
        return {k: v for k, v in seen[-1].items() if not isinstance(v, dict) and v and k != "size"}

    eps = {"norm_eps": np.float32(1e-5)}
    assert arrives() == eps
    assert arrives(dt_softplus=True) == arrives(dt_softplus=1) == {"dt_softplus": 1, **eps}
    assert arrives(norm_eps=0) == arrives(norm_eps=None) == {}
    assert arrives(norm_eps=0.5) == {"norm_eps": 0.5}
    assert arrives(dt_limit=(0.5, 2)) == arrives(dt_limit=[0.5, 2.0]) == {
        "dt_min": 0.5, "dt_max": 2.0, **eps,
    }
    assert arrives(dt_limit=(0.0, float("inf"))) == {"dt_max": float("inf"), **eps}
    assert arrives(pad_slot=0) == {"flags": lib.SSMK_PAD_SLOT, **eps}
    assert arrives(pad_slot=-7) == {"flags": lib.SSMK_PAD_SLOT, "pad_slot": -7, **eps}
    assert arrives(pad_slot=np.int64(2**40))["pad_slot"] == 2**40
    assert arrives(keep_state=True) == {"flags": lib.SSMK_KEEP_STATE, **eps}
    flags = lib.SSMK_KEEP_STATE | lib.SSMK_TRAP_SIGMOID | lib.SSMK_PAD_SLOT
    several = arrives(keep_state=2, trap_sigmoid=True, pad_slot=3)
    assert several == {"flags": flags, "pad_slot": 3, **eps}
    assert arrives(keep_state=False, trap_sigmoid=None) == eps
    assert arrives(rotary="half") == {"rotary": lib.SSMK_ROTARY_HALF, **eps}
    assert arrives(rotary="interleaved") == eps
    assert arrives(stream=2**47 + 1) == {"stream": 2**47 + 1, **eps}

    f, seen = probe("selective_scan")
    f(*[a[k] for k in ("x", "dt", "A", "B", "C")], channels_last=True, batch_invariant=True)
    assert seen[0]["channels_last"] == 1 and seen[0]["flags"] == lib.SSMK_BATCH_INVARIANT
    f, seen = probe("causal_conv1d_update")
    f(a["x"], a["state"], a["A"], activation="silu")
    assert seen[0]["activation"] == lib.SSMK_ACTIVATION_SILU
    f(a["x"], a["state"], a["A"], activation=None)
    assert "activation" not in seen[1]


def test_arguments_may_come_by_position_or_by_name(probe, rng):
    f, seen = probe("state_update")
    a = operands("state_update", rng)
    a.pop("dt_softplus")
    a["out"] = np.zeros((B, D), F32)
    names = ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"]
    for cut in range(len(names) + 1):
        f(*[a[n] for n in names[:cut]], **{n: a[n] for n in reversed([*names[cut:], "out"])})
        assert seen[-1] == seen[0]
    assert {n: t["data"] for n, t in seen[0].items() if n in a} == {
        n: t.ctypes.data for n, t in a.items()
    }


@pytest.mark.parametrize("arguments, options, message", [
    ((), {}, r"state_update\(\) is missing the argument 'state'"),
    ((1, 2, 3, 4, 5), {}, r"missing the argument 'C'"),
    ((1,) * 10, {}, r"takes at most 9 positional arguments, got 10"),
    ((1,) * 6, {"state": 1}, r"multiple values for argument 'state'"),
    ((1,) * 6, {"no_such": 1}, r"unexpected keyword argument 'no_such'"),
    ((1,) * 6, {"NO\udc80": 1}, r"unexpected keyword argument"),
])  # fmt: skip
def test_calls_that_do_not_fit_the_signature(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        ssmk.state_update(*arguments, **options)


def test_a_declaration_that_does_not_fit_the_struct_is_refused():
    def state_update(x, out=None, stream=None):
        """Leaves fields out."""

    fields = [(field, ctype, 0) for field, ctype in OPS["state_update"][1]]
    with pytest.raises(ValueError, match="does not fit"):
        _op.Op(
            state_update, fields, {}, ("out",), {}, fn=0, workspace=0, last_error=0, size=8,
            complete=None, allocate=None,
        )  # fmt: skip


# What is refused


@pytest.mark.parametrize("options, error, message", [
    (dict(dt_softplus=1.5), TypeError, "dt_softplus: expected an integer, got float"),
    (dict(dt_softplus="yes"), TypeError, "dt_softplus: expected an integer, got str"),
    (dict(dt_softplus=2**31), ValueError, "dt_softplus: 2147483648 is too large"),
    (dict(pad_slot=0.0), TypeError, "pad_slot: expected an integer, got float"),
    (dict(pad_slot=2**63), ValueError, "pad_slot: 9223372036854775808 is too large"),
    (dict(norm_eps="small"), TypeError, "norm_eps: expected a number, got str"),
    (dict(dt_limit=1.0), TypeError, r"dt_limit: expected None or \(smallest, largest\)"),
    (dict(dt_limit=(1.0,)), TypeError, r"dt_limit: expected None or \(smallest, largest\)"),
    (dict(dt_limit=("a", 1)), TypeError, "dt_limit: expected a number, got str"),
    (dict(dt_limit=(0, 0.0)), ValueError, "dt_limit: .*no limit"),
    (dict(rotary="both"), ValueError, "rotary: expected one of 'half', 'interleaved', got 'both'"),
    (dict(stream="s"), TypeError, "stream: expected an integer, got str"),
])  # fmt: skip
def test_scalars_that_cannot_be_used_are_named(options, error, message, rng):
    arguments = {**operands("state_update", rng), **options}
    with pytest.raises(error, match="^state_update: " + message):
        ssmk.state_update(**arguments)


@pytest.mark.parametrize("value, what", [
    (1.5, "float"), (3, "int"), ([1.0], "list"), ((1.0, 2.0), "tuple"), ("x", "str"),
    (np.float32(1), "numpy.float32"), (object(), "object"), (np.ndarray, "type"),
])  # fmt: skip
def test_what_is_no_tensor_is_named(value, what, rng):
    message = rf"^state_update: %s: expected a tensor \(an object with __dlpack__\), got {what}$"
    for name in ("A", "state", "dt_bias", "out"):
        with pytest.raises(TypeError, match=message % name):
            ssmk.state_update(**{**operands("state_update", rng), name: value})


def test_masked_arrays_are_refused(rng):
    a = operands("state_update", rng)
    with pytest.raises(TypeError, match="^state_update: x: is a masked array"):
        ssmk.state_update(**{**a, "x": np.ma.masked_less(a["x"], 0)})


@pytest.mark.parametrize("make, message", [
    (lambda a: a.astype(">f4"), "dtype dtype"),
    (lambda a: a.astype(object), "dtype"),
    (lambda a: a.astype("U4"), "dtype"),
    (lambda a: np.zeros(a.shape, "f4,i4"), "dtype"),
    (lambda a: a.astype(np.longdouble), "dtype"),
    (lambda a: a.astype("M8[s]"), "dtype"),
    (lambda a: a.astype(ml_dtypes.float8_e4m3fn), "dtype"),
    (lambda a: np.zeros(a.shape, np.dtype("f4,i2"))["f0"], "a stride of 18 bytes"),
])  # fmt: skip
def test_numpy_memory_that_dlpack_cannot_describe_is_refused(make, message, rng):
    a = operands("state_update", rng)
    with pytest.raises(BufferError, match=f"^state_update: x: cannot be borrowed: {message}"):
        ssmk.state_update(**{**a, "x": make(a["x"])})


def test_more_axes_than_any_argument_has_are_refused(rng):
    a = operands("state_update", rng)
    with pytest.raises(ValueError, match="^state_update: x: has 22 axes"):
        ssmk.state_update(**{**a, "x": a["x"].reshape(a["x"].shape + (1,) * 20)})


@pytest.mark.parametrize("through_capsules", (False, True))
def test_what_is_read_only_is_read_but_never_written(through_capsules, rng):
    a = operands("state_update", rng)
    want = ssmk.state_update(**copy.deepcopy(a))

    def locked(array):
        array = array.copy()
        array.flags.writeable = False
        return Exporter(array) if through_capsules else array

    for name, array in ("out", a["x"]), ("state", a["state"]):
        before = copy.deepcopy(a)
        with pytest.raises(BufferError, match=f"^state_update: {name}: is read-only"):
            ssmk.state_update(**{**a, "out": np.zeros((B, D), F32), name: locked(array)})
        assert_same_bits(a["state"], before["state"])
    with pytest.raises(BufferError, match="^state_update: out: is read-only"):
        ssmk.state_update(**a, out=np.broadcast_to(np.zeros(1, F32), (B, D)))
    inputs = {k: locked(v) if k in "x dt A B C D z dt_bias".split() else v for k, v in a.items()}
    assert_same_bits(ssmk.state_update(**inputs, out=np.zeros((B, D), F32)), want)


def test_the_library_s_answers_become_exceptions(probe, rng):
    a = operands("state_update", rng)
    for status, error in (
        (1, ValueError), (2, NotImplementedError), (3, RuntimeError), (99, RuntimeError),
    ):
        f, _ = probe("state_update", lambda args: status)
        with pytest.raises(error, match="^the library's words$") as caught:
            f(**a)
        assert caught.type is error


def test_the_library_s_words_reach_python(rng):
    a = operands("state_update", rng)
    with pytest.raises(ValueError, match=r"^state_update: B: shape must be .*, got \(2, 3\)"):
        ssmk.state_update(**{**a, "B": a["B"][:, :3]})
    with pytest.raises(ValueError, match="^state_update: x: .*float64"):
        ssmk.state_update(**{**a, "x": a["x"].astype(np.float64)})
    with pytest.raises(ValueError, match="^mla_decode: seqlens: .*capacity, got 5"):
        ssmk.mla_decode(normal(rng, (1, 2, 32)), np.array([5]), latent=normal(rng, (1, 4, 32)))


# Workspace


def test_a_workspace_is_made_when_the_library_asks_for_one(probe, rng):
    def answer(args):
        if args.workspace_bytes < 1000:
            return 4
        assert args.workspace_bytes == 1000
        assert int(ffi.cast("uintptr_t", args.workspace)) % 64 == 0
        ffi.buffer(args.workspace, 1000)[:] = b"\xff" * 1000
        return 0

    f, seen = probe("state_update", answer, need=1000)
    a = operands("state_update", rng)
    out = np.zeros((B, D), F32)
    assert f(**a, out=out) is out
    first, second = seen
    assert first["workspace"] == 0 and "workspace_bytes" not in first
    assert {**second, "workspace": 0} == {**first, "workspace_bytes": 1000}


def test_a_workspace_that_is_never_large_enough_is_an_error(probe, rng):
    f, seen = probe("state_update", lambda args: 4, need=64)
    with pytest.raises(MemoryError, match="the library's words"):
        f(**operands("state_update", rng))
    assert len(seen) == 2


def test_a_workspace_elsewhere_is_the_framework_s(probe, rng):
    asked, made = [], []

    def allocate(tensor, nbytes):
        asked.append((tensor, nbytes))
        made.append(np.zeros(nbytes, np.uint8))
        return Exporter(made[0], device=(2, 1))

    def answer(args):
        return 0 if args.workspace_bytes else 4

    f, seen = probe("causal_conv1d", answer, need=300, allocate=allocate)
    x, weight = (Exporter(normal(rng, s), device=(2, 1)) for s in ((B, D, L), (D, W)))
    out = Exporter(normal(rng, (B, D, L)), device=(2, 1))
    assert f(x, weight, out=out, stream=77) is out
    assert asked[0][0] is x and asked[0][1] >= 300
    start = seen[1]["workspace"]
    assert start % 256 == 0 and seen[1]["workspace_bytes"] == 300
    assert made[0].ctypes.data <= start and start + 300 <= made[0].ctypes.data + made[0].size
    assert {e.options.get("stream") for e in (x, weight, out)} == {77}


# Other producers of DLPack


class Exporter:
    """A producer of DLPack: on some device, old (it knows no max_version), or of the future."""

    def __init__(self, array, device=(1, 0), old=None, major=1, fails=None):
        if np.lib.NumpyVersion(np.__version__) < "2.1.0":
            pytest.skip("this NumPy exports no versioned capsules to try this with")
        self.array, self.device, self.old, self.major = array, device, old, major
        self.fails, self.options, self.shape = fails, None, array.shape

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if self.old and options:
            raise self.old
        if self.fails:
            raise self.fails
        self.options = options
        version = {} if self.old else {"max_version": options["max_version"]}
        capsule = self.array.__dlpack__(**version)
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        if not self.old:  # DLManagedTensorVersioned: version, context, deleter, flags, tensor
            start = get(capsule, b"dltensor_versioned")
            ffi.cast("uint32_t *", start)[0] = self.major
            tensor = ffi.cast("DLTensor *", start + 32)
            tensor.device.device_type, tensor.device.device_id = self.device
        return capsule


def test_producers_old_and_new_are_read(probe, rng):
    f, seen = probe("causal_conv1d")
    x, weight = normal(rng, (B, D, L)), normal(rng, (D, W))
    for error in (TypeError("no such argument"), NotImplementedError("not yet")):
        old, new = Exporter(x, old=error), Exporter(weight)
        f(old, new, out=x)
        assert seen[-1]["x"]["data"] == x.ctypes.data
        assert seen[-1]["weight"]["data"] == weight.ctypes.data
        assert old.options == {} and new.options == {"max_version": (1, 3)}


def test_producers_are_told_the_stream(probe, rng):
    f, seen = probe("causal_conv1d")
    x, weight = normal(rng, (B, D, L)), normal(rng, (D, W))
    on_host, on_gpu = Exporter(x), Exporter(weight, device=(2, 3))
    f(on_host, on_gpu, out=x, stream=5)
    assert "stream" not in on_host.options and on_gpu.options["stream"] == 5
    assert seen[0]["weight"]["device"] == (2, 3) and seen[0]["stream"] == 5


def test_a_gpu_s_tensors_without_a_stream_go_to_the_current_one(probe, rng, monkeypatch):
    f, seen = probe("causal_conv1d")
    x, weight = normal(rng, (B, D, L)), normal(rng, (D, W))
    on_host, on_gpu = Exporter(x), Exporter(weight, device=(2, 3))
    f(on_host, on_gpu, out=x)
    assert "stream" not in on_host.options and on_gpu.options["stream"] == seen[-1]["stream"] == 1

    class Tensor(Exporter):
        requires_grad = property(lambda self: False)

        def is_neg(self):
            return False

    class Cuda:
        def current_stream(device):
            return SimpleNamespace(cuda_stream={3: 0, 4: 77}[device])

    torch = SimpleNamespace(Tensor=Tensor, cuda=Cuda, is_grad_enabled=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", torch)
    for device, stream in ((3, 1), (4, 77)):
        class OnGpu(Tensor):  # what is known of a type is kept
            pass
        on_gpu = OnGpu(weight, device=(2, device))
        f(on_host, on_gpu, out=x)
        assert on_gpu.options["stream"] == seen[-1]["stream"] == stream
        assert seen[-1]["weight"]["device"] == (2, device)


def test_what_a_producer_refuses_is_told_with_the_argument_s_name(probe, rng):
    f, _ = probe("causal_conv1d")
    x, weight = normal(rng, (B, D, L)), normal(rng, (D, W))
    for error in (BufferError("no"), RuntimeError("no"), ValueError("no")):
        with pytest.raises(BufferError, match="^causal_conv1d: weight: cannot be borrowed: no$"):
            f(x, Exporter(weight, fails=error))
    with pytest.raises(BufferError, match="^causal_conv1d: weight: .*DLPack version 2"):
        f(x, Exporter(weight, major=2))


def test_exports_live_as_long_as_the_call_and_no_longer(probe, rng):
    held = []

    class Counted(np.ndarray):
        pass

    f, _ = probe("causal_conv1d", lambda args: held.append(alive() is not None) or 0)
    x, weight = normal(rng, (B, D, L)), normal(rng, (D, W))

    class Once:
        """Exports memory that only the capsule keeps."""

        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **options):
            nonlocal alive
            array = weight.copy().view(Counted)
            alive = weakref.ref(array)
            return array.__dlpack__(**options)

    alive = None
    f(x, Once(), out=x)
    gc.collect()
    assert held == [True] and alive() is None


def test_nothing_is_kept_of_a_call(rng, kind):
    arguments = converted(kind, operands("state_update", rng))
    ssmk.state_update(**arguments)
    tensors = [value for value in arguments.values() if hasattr(value, "shape")]
    before = [sys.getrefcount(tensor) for tensor in tensors]
    for _ in range(50):
        ssmk.state_update(**arguments)
        with pytest.raises(ValueError):
            ssmk.state_update(**{**arguments, "B": arguments["A"]})
    gc.collect()
    assert [sys.getrefcount(tensor) for tensor in tensors] == before


def test_kinds_without_a_namespace_need_out(rng):
    a = operands("causal_conv1d_update", rng)
    want = results("causal_conv1d_update", copy.deepcopy(a))[0]
    x = Exporter(a["x"])
    x.dtype = a["x"].dtype
    with pytest.raises(TypeError, match="no result can be allocated like a .*Exporter; pass"):
        ssmk.causal_conv1d_update(**{**a, "x": x})
    out = np.zeros((B, D), F32)
    assert ssmk.causal_conv1d_update(**{**a, "x": x}, out=out) is out
    assert_same_bits(out, want)


# Torch


def test_torch_tensors_that_require_grad_are_refused(torch, rng):
    a = converted(Kind("torch").load(), operands("state_update", rng))
    for name in ("A", "x", "state"):
        parameter = torch.nn.Parameter(a[name])
        with pytest.raises(RuntimeError, match=f"^state_update: {name}: requires grad.*no_grad"):
            ssmk.state_update(**{**a, name: parameter})
        with pytest.raises(RuntimeError, match="requires grad"):
            ssmk.state_update(**{**a, name: a[name].clone().requires_grad_() * 2})
    want = ssmk.state_update(**copy.deepcopy(a))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            given = copy.deepcopy({**a, "A": torch.nn.Parameter(a["A"])})
            got = ssmk.state_update(**given)
            assert torch.equal(got, want) and type(got) is torch.Tensor and not got.requires_grad
    got = ssmk.state_update(**{**a, "A": torch.nn.Parameter(a["A"]).detach()})
    assert torch.equal(got, want)


def test_lazy_views_of_torch_are_refused(torch, rng):
    a = converted(Kind("torch").load(), operands("selective_scan", rng))
    a["A"] = torch.complex(a["A"], a["A"])
    a["B"], a["C"] = (torch.complex(a[k], a[k]) for k in "BC")
    lazy = r"is a lazily negated or conjugated view; pass \.resolve_neg\(\)"
    want = ssmk.selective_scan(**{**a, "B": a["B"].conj().resolve_conj()})
    with pytest.raises(ValueError, match="^selective_scan: B: " + lazy):
        ssmk.selective_scan(**{**a, "B": a["B"].conj()})
    assert torch.equal(ssmk.selective_scan(**{**a, "B": a["B"].conj().clone()})[0], want[0])

    for shape in ((B, D, L), (B, D, 1), (1, 1, 1)):
        source = torch.complex(torch.randn(shape), torch.randn(shape)).conj()
        a = converted(Kind("torch").load(), operands("causal_conv1d", rng))
        for x in (source.imag, source.imag[:, -1:], source.imag.expand(*shape)):
            assert x.is_neg()
            a["weight"] = torch.randn(x.shape[1], W)
            a.pop("bias", None)
            with pytest.raises(ValueError, match="^causal_conv1d: x: " + lazy):
                ssmk.causal_conv1d(**{**a, "x": x})
            assert torch.equal(
                ssmk.causal_conv1d(**{**a, "x": x.resolve_neg()})[0],
                ssmk.causal_conv1d(**{**a, "x": x.clone()})[0],
            )
        ssmk.causal_conv1d(**{**a, "x": source.real, "weight": torch.randn(shape[1], W)})


def test_torch_tensors_without_memory_are_refused(torch, rng):
    from torch._subclasses import FakeTensorMode

    a = converted(Kind("torch").load(), operands("state_update", rng))
    with FakeTensorMode():
        fake = torch.zeros(B, D)
    with pytest.raises(ValueError, match="^state_update: x: "):
        ssmk.state_update(**{**a, "x": fake}, out=torch.zeros(B, D))
    for wrong in (
        torch.zeros(B, D, device="meta"), torch.eye(B, D).to_sparse(),
        torch.zeros(B, D).to_mkldnn(),
    ):  # fmt: skip
        with pytest.raises((BufferError, ValueError), match="^state_update: x: "):
            ssmk.state_update(**{**a, "x": wrong}, out=torch.zeros(B, D))
    with pytest.raises((BufferError, ValueError), match="^state_update: x: "):
        torch.vmap(lambda x: ssmk.state_update(**{**a, "x": x}, out=torch.zeros(B, D)))(
            torch.zeros(3, B, D)
        )


def test_torch_subclasses_are_tensors(torch, rng):
    class Subclass(torch.Tensor):
        pass

    class Old(torch.Tensor):
        """As of a torch without the exchange API."""

        __dlpack_c_exchange_api__ = None

    a = converted(Kind("torch").load(), operands("state_update", rng))
    want = ssmk.state_update(**copy.deepcopy(a))
    for kind in (Subclass, Old):
        given = copy.deepcopy(a)
        got = ssmk.state_update(**{**given, "x": a["x"].as_subclass(kind)})
        assert torch.equal(got, want)
        negated = torch.complex(a["x"], a["x"]).conj().imag.as_subclass(kind)
        assert negated.is_neg()
        with pytest.raises(ValueError, match="^state_update: x: is a lazily negated"):
            ssmk.state_update(**{**given, "x": negated})


# JAX


def test_jax_tracers_are_refused(jax, rng):
    a = converted(Kind("jax").load(), operands("state_update", rng))

    def step(x):
        return ssmk.state_update(**{**a, "x": x})[0]

    message = "^state_update: x: is a JAX tracer; .*jit, grad or vmap.*pure_callback"
    for traced in (
        lambda: jax.jit(step)(a["x"]),
        lambda: jax.grad(lambda x: step(x).sum())(a["x"]),
        lambda: jax.vmap(step)(jax.numpy.stack([a["x"]] * 2)),
    ):
        with pytest.raises(TypeError, match=message):
            traced()


def test_jax_works_through_pure_callback(jax, rng):
    a = operands("causal_conv1d", rng)
    x, weight = jax.numpy.asarray(a["x"]), a["weight"]

    @jax.jit
    def layer(x):
        return jax.pure_callback(
            lambda x: ssmk.causal_conv1d(np.asarray(x), weight),
            jax.ShapeDtypeStruct(x.shape, x.dtype), x,
        )  # fmt: skip

    assert_same_bits(np.asarray(layer(x)), ssmk.causal_conv1d(a["x"], weight))


def test_jax_arrays_as_out_are_refused(jax, rng):
    a = converted(Kind("jax").load(), operands("state_update", rng))
    for state in (a["state"], np.array(a["state"])):
        with pytest.raises(TypeError, match="^state_update: out: is a JAX array.*immutable"):
            ssmk.state_update(**{**a, "state": state}, out=jax.numpy.zeros((B, D)))


def test_jax_results_that_are_still_computed_are_waited_for(jax, rng):
    x, weight = normal(rng, (1, 512, 512)), normal(rng, (512, W))
    slow = jax.jit(lambda x: jax.numpy.linalg.matrix_power(x[0] * 0.01, 20)[None])
    want = np.asarray(slow(x))
    for _ in range(5):
        late = slow(x)
        got = ssmk.causal_conv1d(late, weight)
        assert_same_bits(np.asarray(got), ssmk.causal_conv1d(want, weight))


# Threads


def test_the_gil_is_released(rng):
    """Python goes on in one thread while another one is in a long call."""
    x = normal(rng, (4, 256, 16384))
    A, BC, out = -np.abs(normal(rng, (256, 16))), normal(rng, (4, 16, 16384)), np.empty_like(x)
    inside, beats = [], []

    def work():
        inside.append(time.perf_counter())
        ssmk.selective_scan(x, x, A, BC, BC, dt_softplus=True, out=out)
        inside.append(time.perf_counter())

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        beats.append(time.perf_counter())
        time.sleep(1e-3)
    worker.join()
    start, end = inside
    # Not near the ends, where the worker has the GIL anyhow.
    margin = (end - start) / 4
    assert sum(start + margin < beat < end - margin for beat in beats) >= 2, (start, end, beats)
