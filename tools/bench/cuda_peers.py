# SPDX-License-Identifier: MIT
"""Other people's kernels on the GPU, from the folder that `tools/gpu --pack` fills.

    mamba-ssm       its Triton selective_state_update, out of the sdist (the package itself wants
                    compiled extensions)
    FlashInfer      its selective_state_update, compiled from the wheel's sources with nvcc
    causal-conv1d   its update, compiled from the sdist through PyTorch

Nothing is looked for on the network: what is not in the folder, or cannot be built, is Missing.
"""

import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path


class Missing(Exception):
    """Why a peer is not here, in one line."""


def folder(peers, name):
    """The unpacked sources of a peer."""
    found = sorted(Path(peers).glob(f"{name}*")) if peers else []
    if not found:
        raise Missing("not packed (tools/gpu --pack)")
    return found[-1].resolve()


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as e:
        raise Missing(f"needs {e.name}") from e
    return module


def remembered(function):
    """As functools.cache, failures included."""

    @functools.cache
    def attempt(*args):
        try:
            return function(*args), None
        except Missing as e:
            return None, str(e)

    @functools.wraps(function)
    def call(*args):
        result, why = attempt(*args)
        if why is not None:
            raise Missing(why)
        return result

    return call


@remembered
def mamba_ssm_state_update(peers):
    """selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus,
    state_batch_indices)."""
    triton = folder(peers, "mamba_ssm-") / "mamba_ssm/ops/triton"
    for package in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        sys.modules.setdefault(package, types.ModuleType(package))
    load("mamba_ssm.ops.triton.softplus", triton / "softplus.py")
    name = "selective_state_update"
    return getattr(load(f"mamba_ssm.ops.triton.{name}", triton / f"{name}.py"), name)


@remembered
def causal_conv1d_update(peers):
    """update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)."""
    source = folder(peers, "causal_conv1d-")
    from torch.utils import cpp_extension

    csrc = source / "csrc"
    # The update alone: what the binding names besides is bound when called, which it never is.
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        extension = cpp_extension.load(
            "causal_conv1d_cuda",
            [str(csrc / f"causal_conv1d{part}") for part in (".cpp", "_update.cu")],
            extra_include_paths=[str(csrc)],
            extra_ldflags=["-Wl,-z,lazy"],
            extra_cuda_cflags=[
                "-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda",
                "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__",
                "-U__CUDA_NO_BFLOAT16_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
            ],
        )
    except (RuntimeError, OSError, ImportError) as e:
        raise Missing(f"did not compile: {str(e).splitlines()[0][:80]}") from e
    finally:
        sys.setdlopenflags(flags)

    def update(x, state, weight, bias, activation, cache_seqlens, slots):
        import torch

        single = x.dim() == 2
        x = x.unsqueeze(-1) if single else x
        out = torch.empty_like(x)
        extension.causal_conv1d_update(
            x, state, weight, bias, out, activation == "silu", cache_seqlens, slots)
        return out.squeeze(-1) if single else out

    return update


# FlashInfer


C_TYPES = {"float32": "float", "bfloat16": "nv_bfloat16", "float16": "half",
           "int32": "int32_t", "int64": "int64_t"}


def flashinfer_command(source, work, target="90a"):
    """nvcc's command line for one configuration, whose include file stands in `work`."""
    import tvm_ffi.libinfo

    data = source / "flashinfer/data"
    names = ("selective_state_update.cu", "selective_state_update_kernel_inst.cu",
             "flashinfer_mamba_binding.cu")
    for name in names:  # they include the configuration from where they stand
        (work / name).write_text((data / "csrc" / name).read_text())
    # The driver's library is named, which a machine without a GPU lacks.
    subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null",
                    "-o", str(work / "libcuda.so")], check=True)
    includes = [data / "include", data / "csrc", data / "cutlass/include",
                *tvm_ffi.libinfo.include_paths()]
    return ["nvcc", "-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "--threads=4",
            f"-gencode=arch=compute_{target},code=sm_{target}", "-DFLASHINFER_MAMBA_ENABLE_SM90",
            "--expt-relaxed-constexpr", "-use_fast_math", "-DFLASHINFER_ENABLE_BF16",
            "-DFLASHINFER_ENABLE_F16", "-DNDEBUG", "-w", "-static-global-template-stub=false",
            # Its narrowing conversions are errors outside of system headers.
            *(word for path in includes for word in ("-isystem", str(path))), f"-I{work}",
            *(str(work / name) for name in names), "-o", str(work / "module.so"),
            tvm_ffi.libinfo.find_libtvm_ffi(), f"-L{work}", "-lcuda"]


@remembered
def flashinfer_module(peers, state, inputs, weights, A, index, headdim, dstate, tokens):
    """FlashInfer's module for these dtypes (by torch's names) and sizes."""
    source = folder(peers, "flashinfer")
    name = "_".join(map(str, (state, inputs, weights, A, index, headdim, dstate, tokens)))
    work = source / "built" / name
    library = work / "module.so"
    try:
        import jinja2
        import tvm_ffi
    except ImportError as e:
        raise Missing(f"needs {e.name}") from e
    if not library.exists():
        work.mkdir(parents=True, exist_ok=True)
        template = source / "flashinfer/data/csrc/selective_state_update_customize_config.jinja"
        text = jinja2.Template(template.read_text()).render(
            state_dtype=C_TYPES[state], input_dtype=C_TYPES[inputs], weight_dtype=C_TYPES[weights],
            matrixA_dtype=C_TYPES[A], stateIndex_dtype=C_TYPES[index], cu_seqlens_dtype="int32_t",
            num_accepted_tokens_dtype="int64_t", dim=headdim, dstate=dstate, ntokens_mtp=tokens,
            state_scale_type="void", philox_rounds=0)
        (work / "selective_state_update_config.inc").write_text(text)
        done = subprocess.run(flashinfer_command(source, work), capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.splitlines() or ["nvcc failed"]
            error = next((line for line in lines if "error" in line), lines[-1])
            raise Missing(f"did not compile: {error[-100:]}")
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)  # linked where there was no driver
    return tvm_ffi.load_module(str(library))


def flashinfer_state_update(peers, algorithm, state, x, dt, A, B, C, D, index, tokens=1):
    """A function of the same tensors that updates in place: (state, x, dt, A, B, C, D, z, dt_bias,
    slots, out).  FlashInfer reads A, dt, D and dt_bias as expanded views: (nheads, headdim,
    dstate), (batch, nheads, headdim), (nheads, headdim).  algorithm: auto, simple, vertical or
    horizontal; tokens > 1 has an axis of tokens after batch."""
    name = lambda tensor: str(tensor.dtype).rpartition(".")[2]  # noqa: E731
    module = flashinfer_module(
        peers, name(state), name(x), name(dt), name(A), name(index), *state.shape[2:], tokens)
    which = ("auto", "simple", "vertical", "horizontal").index(algorithm)

    def run(state, x, dt, A, B, C, D, z, dt_bias, slots, out):
        module.selective_state_update(
            state, x, dt, A, B, C, D, z, dt_bias, True, slots, None, -1, None, out, False, None,
            None, None, None, tokens if tokens > 1 else 0, None, None, which)

    return run


if __name__ == "__main__":  # cuda_peers.py DIR: compiles what tools/gpu --pack can compile before
    for state in ("bfloat16", "float32"):
        flashinfer_module(
            Path(sys.argv[1]), state, "bfloat16", "float32", "float32", "int32", 64, 128, 1)
