# SPDX-License-Identifier: MIT
"""`import ssmk.transformers`: Hugging Face transformers runs its state-space layers on ssmk.

From then on Mamba, Mamba-2, FalconMamba, Jamba, Zamba, Zamba2, Bamba, FalconH1, GraniteMoeHybrid
and NemotronH use ssmk's scan, SSD, decode step and convolutions for tensors on the CPU.  Classes,
checkpoints and caches stay as they are, tensors are not copied, and it does not matter whether a
model's module was imported before or will be later.

    disable(), enable()   take that back, and do it again; modules imported later included
    disabled()            a context in which it is taken back
    hooked()              the models, among those imported so far, that use ssmk

What happens.  A modeling file of transformers 5.15 or newer holds the layer's four operations as
    functions of the module (mamba2_chunk_scan, mamba2_selective_state_update, causal_conv1d_fn,
    causal_conv1d_update ...), and the mixer looks them up there on every call.  These names, and
    nothing else, are bound to functions that hand their arguments on to ssmk, or else to the
    function that was there.  A module that is not imported yet is watched for on sys.meta_path,
    and bound at the end of its import.  Nothing poses as the packages mamba_ssm or causal_conv1d:
    who asks whether they are installed gets the true answer.  Before binding, the functions'
    parameters and the mixer's use of the names are checked; a module that has changed is left
    alone, with a warning that names the model and the version of transformers.

What ssmk is not for goes to the function that was there:
    - tensors that are not on the CPU, silently: with mamba_ssm installed, CUDA tensors keep it;
    - gradients: a tensor requires grad and grad mode is on, with one warning.  A model that is
      merely evaluated wants torch.no_grad();
    - float64, an activation other than silu, a convolution wider than 8 or of width 1, each with
      one warning;
    - torch.export and torch.jit.trace, silently: exported graphs hold torch's own operations.
    Under torch.compile ssmk's operations are custom operators: they run, without breaking the
    graph; where the compiled call records gradients, the graph is torch's own, without a warning.

Packed sequences: with seq_idx, or cu_seqlens for a batch of one row, the models of the Mamba-2
    kind keep the sequences apart, in convolution and SSD.  Those of the Mamba-1 kind do not hand
    them to their scan; their convolution then is the one that was there, which refuses them.

Rounding: results in float32 agree with torch's to rounding.  In 16-bit models ssmk computes in
    float32 what torch rounds at every step, and so is the closer of the two.
"""
import contextlib
import functools
import importlib.util
import inspect
import sys
import types
import warnings

import torch
import transformers

import ssmk

from . import _torch

__all__ = ["enable", "disable", "disabled", "hooked"]


# ---------------------------------------------------------------- whom a call goes to

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_warned = set()


def _warn_once(reason, message):
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(message, stacklevel=4)


def _refused(why, advice=""):
    """False, after the one warning for this reason."""
    if not torch.compiler.is_compiling():
        _warn_once(
            why, f"ssmk.transformers: {why}: torch's own, much slower, path is taken{advice}")
    return False


def _takes(x, *others):
    """Whether ssmk takes a call with these tensors (None: not given)."""
    if x.device.type != "cpu" or type(x) not in _TENSORS:
        return False  # other devices, and tensors that only pose as memory (traced, wrapped ...)
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    grad = torch.is_grad_enabled()
    for t in (x, *others):
        if t is None:
            continue
        if t.dtype not in _FLOATS:
            return _refused(f"{t.dtype} is no dtype of its operations")
        if grad and t.requires_grad:
            return _refused(
                "gradients are recorded, which its operations do not have",
                "; to run a model without training it, use torch.no_grad()")
    return True


def _takes_conv(x, weight, bias, activation, *others):
    if not _takes(x, weight, bias, *others):
        return False
    if activation not in (None, "silu", "swish"):
        return _refused(f"its convolution has no activation {activation!r}")
    if not 2 <= weight.shape[1] <= 8:
        return _refused(f"its convolution has no width {weight.shape[1]}")
    return True


def _sequences(kwargs):
    """seq_idx and cu_seqlens of a call, at most one of which ssmk takes; both say the same."""
    seq_idx, cu_seqlens = kwargs.get("seq_idx"), kwargs.get("cu_seqlens")
    return seq_idx, cu_seqlens if seq_idx is None else None


def _packed(kwargs):
    return kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None


# ---------------------------------------------------------------- the functions of a modeling file
#
# Each gets the function that was there, and returns the one that takes its place.  Parameters are
# named as in transformers.  What else comes in **kwargs is what the model was called with; the
# functions that were there drop it as well.


def _selective_scan(original):
    def mamba_selective_scan(
            hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
            return_last_state=False, use_mambapy=False, use_associative_scan=False, **kwargs):
        if _packed(kwargs) or not _takes(hidden_states, dt, A, B, C, D, z, delta_bias):
            return original(
                hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias,
                delta_softplus=delta_softplus, return_last_state=return_last_state,
                use_mambapy=use_mambapy, use_associative_scan=use_associative_scan, **kwargs)
        return _torch.selective_scan(
            hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    return mamba_selective_scan


def _chunk_scan(original):
    def mamba2_chunk_scan(
            hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None,
            dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, **kwargs):
        z = kwargs.get("z")
        if not _takes(hidden_states, dt, A, B, C, D, z, dt_bias, initial_states):
            return original(
                hidden_states, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias,
                initial_states=initial_states, dt_softplus=dt_softplus, dt_limit=dt_limit,
                return_final_states=return_final_states, **kwargs)
        return _torch.ssd_chunk(
            hidden_states, dt, A, B, C, D, z, dt_bias, initial_states, *_sequences(kwargs),
            dt_softplus, dt_limit, return_final_states)
    return mamba2_chunk_scan


def _state_update(original):
    def selective_state_update(
            state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None,
            **kwargs):
        if not _takes(hidden_states, state, dt, A, B, C, D, dt_bias, z):
            return original(
                state, hidden_states, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus,
                z=z, **kwargs)
        return _torch.state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return selective_state_update


def _conv(keeps_sequences_apart):
    def make(original):
        def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
            if (_packed(kwargs) and not keeps_sequences_apart
                    or not _takes_conv(hidden_states, weight, bias, activation)):
                return original(hidden_states, weight, bias, activation=activation, **kwargs)
            return _torch.causal_conv1d(
                hidden_states, weight, bias, *_sequences(kwargs), activation is not None)
        return causal_conv1d_fn
    return make


def _conv_update(original):
    def causal_conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None):
        if not _takes_conv(hidden_states, weight, bias, activation, conv_state):
            return original(hidden_states, conv_state, weight, bias, activation=activation)
        return _torch.causal_conv1d_update(
            hidden_states, conv_state, weight, bias, activation is not None)
    return causal_conv1d_update


_MAMBA1 = {
    "mamba_selective_scan": _selective_scan,
    "mamba_selective_state_update": _state_update,
    "causal_conv1d_fn": _conv(keeps_sequences_apart=False),
    "causal_conv1d_update": _conv_update,
}
_MAMBA2 = {
    "mamba2_chunk_scan": _chunk_scan,
    "mamba2_selective_state_update": _state_update,
    "causal_conv1d_fn": _conv(keeps_sequences_apart=True),
    "causal_conv1d_update": _conv_update,
}
_MODELS = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba", "zamba"), _MAMBA1),
    **dict.fromkeys(
        ("mamba2", "zamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h"), _MAMBA2),
}
_MODULES = {f"transformers.models.{model}.modeling_{model}": model for model in _MODELS}


# ---------------------------------------------------------------- binding

_hooked = {}  # module name -> {function name: (the function that was there, the one in its place)}


def _parameters(function):
    """Name, kind and default of every parameter, but what is caught by **kwargs."""
    return [
        (p.name, p.default) for p in inspect.signature(function).parameters.values()
        if p.kind is not p.VAR_KEYWORD]


def _names_used(module):
    """All names that the methods of a module's classes look up, those behind decorators too."""
    names, seen = set(), set()
    functions = [
        method for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ == module.__name__
        for method in vars(cls).values()]
    while functions:
        function = functions.pop()
        if not isinstance(function, types.FunctionType) or function in seen:
            continue
        seen.add(function)
        names.update(function.__code__.co_names)
        functions.append(getattr(function, "__wrapped__", None))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                functions.append(cell.cell_contents)
    return names


def _mismatch(module, makers):
    """What differs from the modeling files that this is written for; None if nothing does."""
    used = _names_used(module)
    for name, make in makers.items():
        function = vars(module).get(name)
        if not callable(function):
            return f"it has no function {name}"
        if _parameters(function) != _parameters(make(function)):
            return f"the parameters of {name} are {inspect.signature(function)}"
        if name not in used:
            return f"its layers do not call {name}"
    return None


def _hook(module):
    """Bind a modeling module's functions, once."""
    name = module.__name__
    if name in _hooked and all(
            getattr(module, function) is new for function, (_, new) in _hooked[name].items()):
        return
    model, makers = _MODULES[name], _MODELS[_MODULES[name]]
    if trouble := _mismatch(module, makers):
        _warn_once(name, f"ssmk.transformers does not know {model} as it is in transformers "
                         f"{transformers.__version__} ({trouble}): the model runs without ssmk")
        return
    _hooked[name] = {}
    for function, make in makers.items():
        original = getattr(module, function)
        new = functools.wraps(original)(make(original))
        _hooked[name][function] = original, new
        setattr(module, function, new)


class _Watch:
    """A finder that finds nothing of its own: it lets the others find a modeling module, and has
    it bound when it has been executed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in _MODULES:
            return None
        for finder in sys.meta_path:
            if finder is not cls and (find := getattr(finder, "find_spec", None)):
                if spec := find(name, path, target):
                    cls._watch(spec.loader)
                    return spec
        return None

    @classmethod
    def _watch(cls, loader):
        if not hasattr(loader, "exec_module"):
            return
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            if cls in sys.meta_path:  # not disabled since
                _hook(module)
        loader.exec_module = exec_module


def enable():
    """Bind what is imported, and what will be.  Importing this module does it."""
    if _Watch not in sys.meta_path:
        sys.meta_path.insert(0, _Watch)
    for name in _MODULES:
        if module := sys.modules.get(name):
            _hook(module)


def disable():
    """Put every function back that is still bound, and watch no imports."""
    if _Watch in sys.meta_path:
        sys.meta_path.remove(_Watch)
    for name, functions in _hooked.items():
        module = sys.modules.get(name)
        for function, (original, new) in functions.items():
            if getattr(module, function, None) is new:
                setattr(module, function, original)
    _hooked.clear()


@contextlib.contextmanager
def disabled():
    """A context in which transformers runs without ssmk; for all threads."""
    was = _Watch in sys.meta_path
    disable()
    try:
        yield
    finally:
        if was:
            enable()


def hooked():
    """The models, among those imported so far, whose layers use ssmk: ("mamba2", ...)."""
    return tuple(_MODULES[name] for name in _hooked)


enable()
