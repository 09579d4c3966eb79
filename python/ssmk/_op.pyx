# SPDX-License-Identifier: MIT
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A C function of ssmk.h that takes one argument struct, made callable by a Python declaration.

A call fills the struct on the C stack, borrows the tensors for as long as it lasts, releases the
GIL and calls.  Nothing is shared between calls, so any number of threads may use one function.

A parameter of the declaration enters the struct by its name:
  a field's name       that field; an int32 field that has an enum in the header takes its words
  a flag's name        a bit of `flags`: batch_invariant is SSMK_BATCH_INVARIANT
  dt_limit             dt_min and dt_max
  pad_slot             its field, and the bit in `flags` that says that it was given
  return_...           no field: asks `complete` to allocate outputs
None always leaves a field zero, which is "not given" to the library.

Three ways to borrow, picked once per type:
  NumPy      the array object is read directly; strides are copied, in elements instead of bytes
  exchange   the DLPack C exchange API: the framework points a DLTensor into its own tensor
  capsule    __dlpack__: any other producer; the capsule is held until the call is over
None of them takes ownership: the caller's frame keeps the objects alive.
"""
import inspect
import sys

from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cdef extern from "dlpack/dlpack.h":
    ctypedef int DLDeviceType
    enum: kDLCPU, kDLCUDA, kDLCUDAManaged, kDLInt, kDLUInt, kDLFloat, kDLBfloat, kDLComplex, kDLBool
    enum: DLPACK_FLAG_BITMASK_READ_ONLY
    ctypedef struct DLDevice:
        DLDeviceType device_type
        int32_t device_id
    ctypedef struct DLDataType:
        uint8_t code, bits
        uint16_t lanes
    ctypedef struct DLTensor:
        void *data
        DLDevice device
        int32_t ndim
        DLDataType dtype
        int64_t *shape
        int64_t *strides
        uint64_t byte_offset
    ctypedef struct DLPackVersion:
        uint32_t major, minor
    ctypedef struct DLManagedTensor:
        DLTensor dl_tensor
    ctypedef struct DLManagedTensorVersioned:
        DLPackVersion version
        uint64_t flags
        DLTensor dl_tensor
    ctypedef struct DLPackExchangeAPIHeader:
        DLPackVersion version
        DLPackExchangeAPIHeader *prev_api
    ctypedef struct DLPackExchangeAPI:
        int (*dltensor_from_py_object_no_sync)(void *, DLTensor *) noexcept
        int (*current_work_stream)(DLDeviceType, int32_t, void **) except -1

# Only what reads the fields that NumPy 1 and 2 share, and nothing of NumPy's function table: NumPy
# need not be there at run time.
cdef extern from *:
    """
    #define NPY_NO_DEPRECATED_API NPY_1_23_API_VERSION
    """
cdef extern from "numpy/ndarraytypes.h":
    enum: NPY_ARRAY_WRITEABLE, NPY_OPPBYTE, NPY_BOOL, NPY_HALF, NPY_FLOAT, NPY_DOUBLE
    enum: NPY_CFLOAT, NPY_CDOUBLE, NPY_BYTE, NPY_UBYTE, NPY_SHORT, NPY_USHORT, NPY_INT, NPY_UINT
    enum: NPY_LONG, NPY_ULONG, NPY_LONGLONG, NPY_ULONGLONG
    ctypedef Py_ssize_t npy_intp
    ctypedef struct PyArray_Descr:
        void *typeobj
        char byteorder
        int type_num
    ctypedef struct PyArrayObject:
        pass
    void *PyArray_DATA(PyArrayObject *)
    int PyArray_NDIM(PyArrayObject *)
    int PyArray_FLAGS(PyArrayObject *)
    npy_intp *PyArray_DIMS(PyArrayObject *)
    npy_intp *PyArray_STRIDES(PyArrayObject *)
    PyArray_Descr *PyArray_DESCR(PyArrayObject *)

cdef extern from *:
    """
    #define MAX_FIELDS 64   /* fields of a struct, each of at most 8 bytes */
    #define MAX_RANK 8      /* axes that are copied; no argument of any operation has more than 5 */
    typedef int (*op_fn)(const void *);
    typedef int (*workspace_fn)(const void *, uint64_t *);
    typedef const char *(*error_fn)(void);
    """
    enum: MAX_FIELDS, MAX_RANK
    ctypedef int (*op_fn)(const void *) noexcept nogil
    ctypedef int (*workspace_fn)(const void *, uint64_t *) noexcept nogil
    ctypedef const char *(*error_fn)() noexcept nogil

cdef extern from "Python.h":
    PyObject *Py_None
    PyObject *Py_True
    PyObject *Py_False
    PyObject *type_of "(PyObject *)Py_TYPE"(PyObject *)
    object PyObject_CallNoArgs(object)
    long long PyLong_AsLongLong(PyObject *)
    double PyFloat_AsDouble(PyObject *)
    PyObject *PyErr_Occurred()
    ctypedef struct PyMethodDef:
        const char *ml_name
        void *ml_meth
        int ml_flags
        const char *ml_doc
    enum: METH_FASTCALL, METH_KEYWORDS, Py_tp_descr_get
    object PyCFunction_NewEx(PyMethodDef *, object, object)
    ctypedef object (*descrgetfunc)(PyObject *, PyObject *, PyObject *)
    void *PyType_GetSlot(type, int)

cdef enum:  # ssmk_status
    kOutOfMemory = 4

_ERRORS = {1: ValueError, 2: NotImplementedError, 3: RuntimeError, kOutOfMemory: MemoryError}

cdef enum Kind:
    kInput
    kOutput
    kInt32
    kInt64
    kFloat
    kWord     # int32, by the name of an enum's constant
    kFlag     # a bit of flags
    kLimit    # dt_min and dt_max
    kPadSlot  # int64, and a bit of flags
    kAsk      # return_...

_KINDS = {"const DLTensor *": kInput, "DLTensor *": kOutput, "int32_t": kInt32,
          "int64_t": kInt64, "float": kFloat, "void *": kInt64}
# Fields that no parameter fills: `flags` is filled bit by bit, dt_min and dt_max by dt_limit.
_HIDDEN = {"size", "reserved", "workspace", "workspace_bytes", "flags", "dt_min", "dt_max"}

cdef object _IMMUTABLE = object()  # what _borrow answers where a JAX array would be written


# ---------------------------------------------------------------- how a type of tensor is borrowed

cdef enum How:
    kNumpy
    kExchange
    kCapsule

cdef class Borrower:
    """What there is to know about a type of tensor."""
    cdef How how
    cdef DLPackExchangeAPI *api
    cdef bint jax              # immutable, although its exports do not say so
    cdef object requires_grad  # torch's descriptor, and the function that asks it: an attribute
    cdef descrgetfunc get      # look-up would cost twice as much

cdef dict _borrowers = {}         # type -> Borrower
cdef object _grad_enabled = None  # torch.is_grad_enabled, once a torch tensor was met
cdef object _bfloat16 = None      # ml_dtypes.bfloat16, once an array of it was met
cdef tuple _VERSION = (1, 3)

cdef object _loaded(str module, str name):
    """An attribute of a module that somebody imported, else None."""
    return getattr(sys.modules.get(module), name, None)

cdef bint _derived(t, base):
    return base is not None and issubclass(t, base)

cdef DLPackExchangeAPI *_exchange_api(t) except? NULL:
    cdef DLPackExchangeAPIHeader *header = NULL
    capsule = getattr(t, "__dlpack_c_exchange_api__", None)
    if capsule is not None:
        header = <DLPackExchangeAPIHeader *>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    while header != NULL and header.version.major != 1:
        header = header.prev_api
    if header != NULL and (<DLPackExchangeAPI *>header).dltensor_from_py_object_no_sync == NULL:
        return NULL
    return <DLPackExchangeAPI *>header

cdef Borrower _learn(t, str where):
    global _grad_enabled
    cdef Borrower b = Borrower()
    if _derived(t, _loaded("jax.core", "Tracer")):
        raise TypeError(
            f"{where}: is a JAX tracer; ssmk runs at once on real arrays and cannot be traced by "
            "jit, grad or vmap: call it outside of them, or through jax.pure_callback")
    if _derived(t, _loaded("numpy.ma", "MaskedArray")):
        raise TypeError(f"{where}: is a masked array, whose mask would be ignored; pass .filled()")
    if not hasattr(t, "__dlpack__"):
        name = t.__qualname__ if t.__module__ == "builtins" else f"{t.__module__}.{t.__qualname__}"
        raise TypeError(f"{where}: expected a tensor (an object with __dlpack__), got {name}")
    ndarray = _loaded("numpy", "ndarray")
    if (_derived(t, ndarray) and t.__dlpack__ is ndarray.__dlpack__
            and _loaded("numpy", "__version__").split(".")[0] in ("1", "2")):
        b.how = kNumpy
    else:
        b.api = _exchange_api(t)
        b.how = kCapsule if b.api == NULL else kExchange
        b.jax = t.__module__.split(".")[0] in ("jax", "jaxlib")
        tensor = _loaded("torch", "Tensor")
        if _derived(t, tensor):
            _grad_enabled = _loaded("torch", "is_grad_enabled")
            b.requires_grad = tensor.requires_grad
            b.get = <descrgetfunc>PyType_GetSlot(type(b.requires_grad), Py_tp_descr_get)
    _borrowers[t] = b
    return b


# ---------------------------------------------------------------- borrowing one tensor

cdef struct Slot:
    DLTensor tensor
    int64_t shape[MAX_RANK]
    int64_t strides[MAX_RANK]

cdef struct Frame:
    PyObject *type                 # the last type met: the tensors of a call usually share one
    PyObject *borrower
    int grad_enabled               # -1: not asked yet
    DLPackExchangeAPI *stream_api  # of the first tensor that is not on the CPU
    DLDevice stream_device
    uint64_t stream                # of the first capsule that is on a GPU; 0: not asked yet
    uint64_t words[MAX_FIELDS]     # the argument struct
    Slot slots[MAX_FIELDS]

cdef bint _numpy_dtype(PyArray_Descr *d, DLDataType *out):
    global _bfloat16
    cdef int n = d.type_num
    out.lanes = 1
    if n == NPY_FLOAT: out.code, out.bits = kDLFloat, 32
    elif n == NPY_HALF: out.code, out.bits = kDLFloat, 16
    elif n == NPY_DOUBLE: out.code, out.bits = kDLFloat, 64
    elif n == NPY_CFLOAT: out.code, out.bits = kDLComplex, 64
    elif n == NPY_CDOUBLE: out.code, out.bits = kDLComplex, 128
    elif n == NPY_BOOL: out.code, out.bits = kDLBool, 8
    elif n == NPY_BYTE: out.code, out.bits = kDLInt, 8
    elif n == NPY_UBYTE: out.code, out.bits = kDLUInt, 8
    elif n == NPY_SHORT: out.code, out.bits = kDLInt, 8 * sizeof(short)
    elif n == NPY_USHORT: out.code, out.bits = kDLUInt, 8 * sizeof(short)
    elif n == NPY_INT: out.code, out.bits = kDLInt, 8 * sizeof(int)
    elif n == NPY_UINT: out.code, out.bits = kDLUInt, 8 * sizeof(int)
    elif n == NPY_LONG: out.code, out.bits = kDLInt, 8 * sizeof(long)
    elif n == NPY_ULONG: out.code, out.bits = kDLUInt, 8 * sizeof(long)
    elif n == NPY_LONGLONG: out.code, out.bits = kDLInt, 8 * sizeof(long long)
    elif n == NPY_ULONGLONG: out.code, out.bits = kDLUInt, 8 * sizeof(long long)
    else:
        if _bfloat16 is None:
            _bfloat16 = _loaded("ml_dtypes", "bfloat16")
        if _bfloat16 is None or d.typeobj != <void *>_bfloat16:
            return False
        out.code, out.bits = kDLBfloat, 16
    return d.byteorder != <char>NPY_OPPBYTE

cdef int _borrow_numpy(Op op, int i, PyObject *o, bint write, Slot *slot) except -1:
    cdef PyArrayObject *a = <PyArrayObject *>o
    cdef DLTensor *t = &slot.tensor
    cdef npy_intp *dims = PyArray_DIMS(a)
    cdef npy_intp *strides = PyArray_STRIDES(a)
    cdef int axis, itemsize
    t.data, t.ndim, t.byte_offset = PyArray_DATA(a), PyArray_NDIM(a), 0
    t.device.device_type, t.device.device_id = kDLCPU, 0
    t.shape, t.strides = slot.shape, slot.strides
    if not _numpy_dtype(PyArray_DESCR(a), &t.dtype):
        raise BufferError(f"{op.where(i)}: cannot be borrowed: dtype {(<object>o).dtype!r}")
    if write and not PyArray_FLAGS(a) & NPY_ARRAY_WRITEABLE:
        raise BufferError(f"{op.where(i)}: is read-only, but would be written")
    if t.ndim > MAX_RANK:
        raise ValueError(f"{op.where(i)}: has {t.ndim} axes, more than any argument may have")
    itemsize = t.dtype.bits >> 3  # a power of two
    for axis in range(t.ndim):
        slot.shape[axis] = dims[axis]
        slot.strides[axis] = strides[axis] // itemsize
        if strides[axis] & (itemsize - 1) and dims[axis] > 1:
            raise BufferError(f"{op.where(i)}: cannot be borrowed: a stride of {strides[axis]} "
                              f"bytes is no multiple of the {itemsize}-byte items")
    return 0

cdef int _check_torch(Op op, int i, PyObject *o, Borrower b, Frame *f, DLTensor *t) except -1:
    """What torch lends in silence: autograd's tensors, lazily conjugated and negated views."""
    cdef int axis
    if f.grad_enabled < 0:
        f.grad_enabled = PyObject_CallNoArgs(_grad_enabled) is True
    if f.grad_enabled and b.get(<PyObject *>b.requires_grad, o, f.type) is True:
        raise RuntimeError(f"{op.where(i)}: requires grad, but ssmk has no backward: "
                           "call it under torch.no_grad(), or pass .detach()")
    # A real tensor that is negated lazily is the imaginary part of a conjugated complex one, or a
    # view of that, and steps over the real parts: an odd stride spares the method call.
    if t.dtype.code != kDLComplex:
        for axis in range(t.ndim - 1, -1, -1):
            if t.shape[axis] == 0 or t.shape[axis] > 1 and t.strides[axis] & 1:
                return 0
    if (<object>o).is_neg() or t.dtype.code == kDLComplex and (<object>o).is_conj():
        raise ValueError(f"{op.where(i)}: is a lazily negated or conjugated view; "
                         "pass .resolve_neg() or .resolve_conj()")
    return 0

cdef int _raise_pending() except -1:
    return -1  # a C function has set an exception

cdef int _refused(Op op, int i) except -1:
    try:
        _raise_pending()
    except Exception as e:
        raise BufferError(f"{op.where(i)}: cannot be borrowed: {e}") from e

cdef object _capsule(object o, PyObject *stream):
    try:
        if stream == Py_None or o.__dlpack_device__()[0] == kDLCPU:
            return o.__dlpack__(max_version=_VERSION)
        return o.__dlpack__(max_version=_VERSION, stream=<object>stream)
    except (TypeError, NotImplementedError):  # a producer older than DLPack 1.0
        return o.__dlpack__()

cdef uint64_t _current_stream(object o, int device) except 0:
    """The stream that the framework of `o` works on, in DLPack's numbers: 1 is CUDA's default."""
    if _derived(type(o), _loaded("torch", "Tensor")):
        return _loaded("torch", "cuda").current_stream(device).cuda_stream or 1
    if _derived(type(o), _loaded("cupy", "ndarray")):
        return _loaded("cupy", "cuda").get_current_stream(device).ptr or 1
    return 1

cdef object _borrow_capsule(Op op, int i, PyObject *o, bint write, PyObject *stream, Frame *f,
                            DLTensor **out):
    cdef object number, capsule = _export(op, i, o, write, stream, out)
    if stream == Py_None and out[0].device.device_type in (kDLCUDA, kDLCUDAManaged):
        # Once more, so that the producer's work comes before ours on the stream that we use.
        if f.stream == 0:
            f.stream = _current_stream(<object>o, out[0].device.device_id)
        number = f.stream
        capsule = _export(op, i, o, write, <PyObject *>number, out)
    return capsule

cdef object _export(Op op, int i, PyObject *o, bint write, PyObject *stream, DLTensor **out):
    cdef DLManagedTensorVersioned *m
    try:
        capsule = _capsule(<object>o, stream)
    except Exception as e:
        raise BufferError(f"{op.where(i)}: cannot be borrowed: {e}") from e
    if not PyCapsule_IsValid(capsule, "dltensor_versioned"):
        out[0] = &(<DLManagedTensor *>PyCapsule_GetPointer(capsule, "dltensor")).dl_tensor
        return capsule
    m = <DLManagedTensorVersioned *>PyCapsule_GetPointer(capsule, "dltensor_versioned")
    if m.version.major != 1:
        raise BufferError(f"{op.where(i)}: cannot be borrowed: DLPack version {m.version.major}")
    if write and m.flags & DLPACK_FLAG_BITMASK_READ_ONLY:
        raise BufferError(f"{op.where(i)}: is read-only, but would be written")
    out[0] = &m.dl_tensor
    return capsule

cdef int _meet(Op op, int i, PyObject *o, Frame *f) except -1:
    """Find what there is to know about the type of tensor argument i."""
    cdef PyObject *t = type_of(o)
    if t != f.type:
        known = _borrowers.get(<object>t)
        if known is None:
            known = _learn(<object>t, op.where(i))
        f.type, f.borrower = t, <PyObject *>known  # _borrowers keeps both
    return 0

cdef object _borrow(Op op, int i, PyObject *o, bint write, PyObject *stream, Frame *f,
                    DLTensor **out):
    """Point `out` at tensor argument i, which the call writes or only reads.

    Returns what must be kept until the call is over: None, or a capsule, which is never renamed,
    so that its destructor frees the export.  _IMMUTABLE: a JAX array would be written.
    """
    _meet(op, i, o, f)
    cdef Slot *slot = &f.slots[i]
    cdef Borrower b = <Borrower>f.borrower
    out[0] = &slot.tensor
    if b.how == kNumpy:
        _borrow_numpy(op, i, o, write, slot)
        return None
    capsule = None
    if b.how == kCapsule:
        if write and b.jax:
            return _IMMUTABLE
        capsule = _borrow_capsule(op, i, o, write, stream, f, out)
    else:
        if b.api.dltensor_from_py_object_no_sync(o, &slot.tensor):
            _refused(op, i)
        if f.stream_api == NULL and slot.tensor.device.device_type != kDLCPU:
            f.stream_api, f.stream_device = b.api, slot.tensor.device
    if b.get != NULL:
        _check_torch(op, i, o, b, f, out[0])
    return capsule


# ---------------------------------------------------------------- one operation

cdef class Op:
    """Where the struct of an operation keeps what, and what to call.

    `complete(op, arguments)` takes over a call that lacks `out`, asks for another output by a
    return_... argument, or would write into a JAX array.  `allocate(tensor, nbytes)` gives memory
    in the framework and on the device of a tensor.
    """
    cdef readonly str name
    cdef readonly tuple parameters  # their names
    cdef readonly tuple outputs     # those that are tensors to be written, in the struct's order
    cdef readonly dict only_with    # {one of these that is written only with another argument: it}
    cdef readonly tuple results     # those that a call returns: `out`, and others where given
    cdef readonly str first         # the first tensor of the struct, which sets kind and device
    cdef object complete, allocate
    cdef op_fn fn
    cdef workspace_fn workspace
    cdef error_fn last_error
    cdef uint64_t size
    cdef int n, positional, required, out, stream
    cdef uint16_t at_first, at_workspace, at_workspace_bytes, at_flags, at_dt_max
    cdef uint8_t kind[MAX_FIELDS]
    cdef uint16_t offset[MAX_FIELDS]
    cdef uint64_t bit[MAX_FIELDS]
    cdef int with_argument[MAX_FIELDS]  # of only_with, as numbers; -1: written in any case
    cdef bint returned[MAX_FIELDS]
    cdef PyObject *default[MAX_FIELDS]
    cdef dict index                 # name -> number of a parameter
    cdef list words                 # of a kWord parameter: {word: value}
    cdef list held                  # what the pointers here point to
    cdef PyMethodDef method

    # fields: (name, C type, offset) of each member of the struct; constants: those of the header
    def __init__(self, declaration, fields, constants, tuple results, dict only_with, *,
                 uintptr_t fn, uintptr_t workspace, uintptr_t last_error, uint64_t size, complete,
                 allocate):
        signature = inspect.signature(declaration)
        names = tuple(signature.parameters)
        ctype = {field: ctype for field, ctype, _ in fields}
        at = {field: offset for field, _, offset in fields}
        self.name, self.parameters, self.results = declaration.__name__, names, results
        self.only_with = only_with
        self.complete, self.allocate, self.size = complete, allocate, size
        self.fn, self.workspace = <op_fn>fn, <workspace_fn>workspace
        self.last_error = <error_fn>last_error
        if size > 8 * MAX_FIELDS or len(names) >= MAX_FIELDS or set(ctype) - set(names) - _HIDDEN:
            raise ValueError(f"{self.name}: the declaration does not fit the struct")

        # Where things are
        self.outputs = tuple(field for field in ctype if ctype[field] == "DLTensor *")
        self.first = next(field for field in ctype if "DLTensor" in ctype[field])
        self.n, self.out, self.stream = len(names), names.index("out"), names.index("stream")
        self.at_first, self.at_flags = at[self.first], at["flags"]
        self.at_workspace, self.at_workspace_bytes = at["workspace"], at["workspace_bytes"]
        self.at_dt_max = at.get("dt_max", 0)
        self.index = {name: i for i, name in enumerate(names)}
        self.words = [None] * self.n
        self.held = []

        # Parameters
        for i, parameter in enumerate(signature.parameters.values()):
            name, constant = parameter.name, f"SSMK_{parameter.name.upper()}"
            words = {word[len(constant) + 1:].lower(): value for word, value in constants.items()
                     if ctype.get(name) == "int32_t" and word.startswith(constant + "_")}
            if name.startswith("return_"):
                self.kind[i] = kAsk
            elif name == "dt_limit":
                self.kind[i], self.offset[i] = kLimit, at["dt_min"]
            elif name == "pad_slot":
                self.kind[i], self.offset[i], self.bit[i] = kPadSlot, at[name], constants[constant]
            elif constant in constants:
                self.kind[i], self.bit[i] = kFlag, constants[constant]
            elif words:
                self.kind[i], self.offset[i], self.words[i] = kWord, at[name], words
            else:
                self.kind[i], self.offset[i] = _KINDS[ctype[name]], at[name]
            self.returned[i] = name in results and name != "out"
            self.with_argument[i] = names.index(only_with[name]) if name in only_with else -1
            self.positional += parameter.kind != parameter.KEYWORD_ONLY
            if parameter.default is parameter.empty:
                self.required = i + 1
                self.default[i] = NULL
            else:
                default = words.get(parameter.default, parameter.default) and parameter.default
                default = default or None  # what leaves the field zero is left out, as None is
                self.held.append(default)
                self.default[i] = <PyObject *>default
        self.kind[self.n] = kOutput  # the workspace, where it is borrowed like a tensor

        # The built-in
        name_bytes = self.name.encode()
        doc_bytes = f"{self.name}{signature}\n--\n\n{inspect.getdoc(declaration)}".encode()
        self.held += [name_bytes, doc_bytes]
        self.method.ml_name, self.method.ml_doc = name_bytes, doc_bytes
        self.method.ml_meth, self.method.ml_flags = <void *>_call, METH_FASTCALL | METH_KEYWORDS

    @property
    def function(self):
        """The callable, with signature and docstring of the declaration.

        A built-in, since a Python function spends longer on its keywords than this on a call.
        """
        return PyCFunction_NewEx(&self.method, self, "ssmk")

    # For pickle, to which a built-in is an attribute of the object that it is bound to.

    def __getattr__(self, name):
        if name == self.name:
            return self.function
        raise AttributeError(name)

    def __reduce__(self):
        return _unpickled, (self.name,)

    cdef str where(self, int i):
        return f"{self.name}: {self.parameters[i] if i < self.n else 'workspace'}"


def _unpickled(name):
    return getattr(sys.modules["ssmk"], name).__self__


# ---------------------------------------------------------------- one call

cdef int _no_scalar(Op op, int i, str kind, o) except -1:
    try:
        _raise_pending()
    except OverflowError:
        raise ValueError(f"{op.where(i)}: {o} is too large") from None
    except TypeError:
        raise TypeError(f"{op.where(i)}: expected {kind}, got {type(o).__name__}") from None

cdef int64_t _integer(Op op, int i, PyObject *o) except? -1:
    cdef int64_t v = PyLong_AsLongLong(o)
    if v == -1 and PyErr_Occurred() != NULL:
        _no_scalar(op, i, "an integer", <object>o)
    return v

cdef double _number(Op op, int i, PyObject *o) except? -1:
    cdef double v = PyFloat_AsDouble(o)
    if v == -1 and PyErr_Occurred() != NULL:
        _no_scalar(op, i, "a number", <object>o)
    return v

cdef int _scalar(Op op, int i, PyObject *o, char *words) except -1:
    cdef char *p = words + op.offset[i]
    cdef uint64_t *flags = <uint64_t *>(words + op.at_flags)
    cdef int kind = op.kind[i]
    cdef int64_t v
    if kind == kFlag:
        if <object>o:
            flags[0] |= op.bit[i]
    elif kind == kInt32:
        v = 1 if o == Py_True else 0 if o == Py_False else _integer(op, i, o)
        if v != <int32_t>v:
            raise ValueError(f"{op.where(i)}: {v} is too large")
        (<int32_t *>p)[0] = <int32_t>v
    elif kind == kInt64:
        (<int64_t *>p)[0] = _integer(op, i, o)
    elif kind == kFloat:
        (<float *>p)[0] = <float>_number(op, i, o)
    elif kind == kPadSlot:
        (<int64_t *>p)[0] = _integer(op, i, o)
        flags[0] |= op.bit[i]
    elif kind == kWord:
        value = op.words[i].get(<object>o)
        if value is None:
            expected = ", ".join(map(repr, op.words[i]))
            raise ValueError(f"{op.where(i)}: expected one of {expected}, got {<object>o!r}")
        (<int32_t *>p)[0] = value
    else:  # kLimit
        try:
            low, high = <object>o
        except (TypeError, ValueError):
            raise TypeError(f"{op.where(i)}: expected None or (smallest, largest)") from None
        if low == 0 and high == 0:
            raise ValueError(f"{op.where(i)}: (0, 0) means no limit to the library; pass None")
        (<float *>p)[0] = <float>_number(op, i, <PyObject *>low)
        (<float *>(words + op.at_dt_max))[0] = <float>_number(op, i, <PyObject *>high)
    return 0

cdef int _arguments(Op op, PyObject **given, Py_ssize_t ngiven, PyObject *keywords,
                    PyObject **args) except -1:
    """Sort what was given into the parameters' order, as CPython does for a Python function."""
    cdef int i
    if ngiven > op.positional:
        raise TypeError(f"{op.name}() takes at most {op.positional} positional arguments, "
                        f"got {ngiven}")
    memcpy(args, given, ngiven * sizeof(PyObject *))
    memcpy(args + ngiven, op.default + ngiven, (op.n - ngiven) * sizeof(PyObject *))
    if keywords != NULL:
        for k, keyword in enumerate(<tuple>keywords):
            at = op.index.get(keyword)
            if at is None:
                raise TypeError(f"{op.name}() got an unexpected keyword argument {keyword!r}")
            i = at
            if i < ngiven:
                raise TypeError(f"{op.name}() got multiple values for argument {keyword!r}")
            args[i] = given[ngiven + k]
    for i in range(ngiven, op.required):
        if args[i] == NULL:
            raise TypeError(f"{op.name}() is missing the argument {op.parameters[i]!r}")
    return 0

cdef int _call_with_workspace(Op op, Frame *f, PyObject **args) except -1:
    """The struct is filled, but lacks the scratch that the call needs."""
    cdef uint64_t nbytes = 0, align = 64
    cdef uintptr_t start
    cdef void *memory = NULL
    cdef char *words = <char *>f.words
    cdef DLTensor *t = (<DLTensor **>(words + op.at_first))[0]
    cdef int rc = op.workspace(words, &nbytes)
    if rc:
        return rc
    if t == NULL or t.device.device_type == kDLCPU:
        memory = malloc(nbytes + align)
        if memory == NULL:
            raise MemoryError(f"{op.name}: no memory for a workspace of {nbytes} bytes")
        start = <uintptr_t>memory
    else:
        align = 256
        array = op.allocate(<object>args[<int>op.index[op.first]], nbytes + align)
        kept = _borrow(op, op.n, <PyObject *>array, True, args[op.stream], f, &t)
        start = <uintptr_t>t.data + t.byte_offset
    (<uintptr_t *>(words + op.at_workspace))[0] = (start + align - 1) & ~(align - 1)
    (<uint64_t *>(words + op.at_workspace_bytes))[0] = nbytes
    with nogil:
        rc = op.fn(words)
        free(memory)
    return rc

cdef object _call(Op op, PyObject **given, Py_ssize_t ngiven, PyObject *keywords):
    cdef Frame f
    cdef PyObject *args[MAX_FIELDS]
    cdef char *words = <char *>f.words
    cdef list held = None  # made when it is needed
    cdef int i, rc, n = op.n, returned = 1
    cdef bint write, whole = True  # every output has memory
    _arguments(op, given, ngiven, keywords, args)

    # Fill the struct
    memset(words, 0, op.size)
    f.words[0] = op.size
    f.type, f.grad_enabled, f.stream_api, f.stream = NULL, -1, NULL, 0
    for i in range(n):
        if args[i] == Py_None:
            whole = whole and i != op.out
        elif op.kind[i] == kAsk:
            whole = whole and not <object>args[i]
        elif op.kind[i] > kOutput:
            _scalar(op, i, args[i], words)
        elif not whole:
            _meet(op, i, args[i], &f)
        else:
            write = op.kind[i] == kOutput and (
                op.with_argument[i] < 0 or args[op.with_argument[i]] != Py_None)
            kept = _borrow(op, i, args[i], write, args[op.stream], &f,
                           <DLTensor **>(words + op.offset[i]))
            returned += op.returned[i]
            if kept is _IMMUTABLE:
                whole = False
            elif kept is not None:
                if held is None:
                    held = []
                held.append(kept)
    if not whole:
        return op.complete(op, {op.parameters[i]: <object>args[i] for i in range(n)})
    if f.stream_api != NULL and args[op.stream] == Py_None:
        f.stream_api.current_work_stream(f.stream_device.device_type, f.stream_device.device_id,
                                         <void **>(words + op.offset[op.stream]))
    elif f.stream != 0 and args[op.stream] == Py_None:
        (<uint64_t *>(words + op.offset[op.stream]))[0] = f.stream

    # Call
    with nogil:
        rc = op.fn(words)
    if rc == kOutOfMemory:
        rc = _call_with_workspace(op, &f, args)
    if rc:
        raise _ERRORS.get(rc, RuntimeError)(op.last_error().decode())
    if returned == 1:
        return <object>args[op.out]
    return tuple([<object>args[<int>op.index[name]] for name in op.results
                  if args[<int>op.index[name]] != Py_None])
