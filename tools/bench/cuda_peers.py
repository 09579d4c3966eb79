# SPDX-License-Identifier: MIT
"""Other people's kernels on the GPU, from the folder that `tools/gpu --pack` fills.

    mamba-ssm       its Triton and TileLang kernels, out of the sdist (the package itself wants
                    compiled extensions)
    FlashInfer      its selective_state_update, compiled from the wheel's sources with nvcc
    causal-conv1d   its update, compiled from the sdist through PyTorch

Nothing is looked for on the network: what is not in the folder, or cannot be built, is Missing.
"""

import ctypes
import functools
import importlib
import os
import re
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


def stub_of_driver(work):
    """A library by the name of the driver's, to link with where there is no driver."""
    subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null",
                    "-o", str(work / "libcuda.so")], check=True)


@remembered
def mamba_ssm_module(peers, name):
    """A module of mamba-ssm's by its name inside the package, whose own __init__ is not run."""
    source = folder(peers, "mamba_ssm-") / "mamba_ssm"
    package = sys.modules.setdefault("mamba_ssm", types.ModuleType("mamba_ssm"))
    package.__path__ = [str(source)]
    try:
        return importlib.import_module(f"mamba_ssm.{name}")
    except ImportError as e:
        raise Missing(f"needs {e.name}") from e


def mamba_ssm_state_update(peers):
    """selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus,
    state_batch_indices)."""
    return mamba_ssm_module(peers, "ops.triton.selective_state_update").selective_state_update


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
    stub_of_driver(work)
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


# mamba-ssm's Mamba-3 MIMO kernel: TileLang writes CUDA for it, which needs neither TileLang nor
# Python any more once it is compiled


MIMO_PARTS = ("mamba3_mimo_fwd", "mamba3_mimo_fwd_varlen", "mamba3_mimo_bwd",
              "mamba3_mimo_bwd_varlen")


def compile_mimo(peers, work, dstate, headdim, rank, target="90a"):
    """work/module.so, with init() and call(tensors, sizes, stream), and its source beside it."""
    import tilelang
    from tilelang import tvm
    from tilelang.jit.adapter.wrapper import TLWrapper

    kernel = mamba_ssm_module(peers, f"ops.tilelang.mamba3.{MIMO_PARTS[0]}").mamba_mimo_fwd
    sizes = [tilelang.language.dynamic(name) for name in "BSHG"]
    function = kernel.get_tir(
        *sizes, dstate, headdim, rank, True, True, True, return_final_state=True,
        chunk_size=64 // rank, rotary_dim_divisor=4, dtype="bfloat16")
    goal = tvm.target.Target({"kind": "cuda", "arch": f"sm_{target}"})
    with tvm.transform.PassContext(opt_level=3, config=kernel.pass_configs), goal:
        lowered = tilelang.lower(function, target=goal)
    wrapper = TLWrapper(goal)
    wrapper.assign_optimized_module(tvm.IRModule({function.attrs["global_symbol"]: function}))
    wrapper.assign_pass_configs(kernel.pass_configs)
    wrapper.assign_host_module(lowered.host_mod)
    wrapper.assign_device_module(lowered.device_mod)
    (work / "module.cu").write_text(wrapper.wrap(lowered.kernel_source))
    stub_of_driver(work)
    home = Path(tilelang.__file__).parent
    done = subprocess.run(
        ["nvcc", "-std=c++20", "-w", "-shared", "-Xcompiler=-fPIC", "--use_fast_math",
         f"-gencode=arch=compute_{target},code=sm_{target}",
         f"-I{home / '3rdparty/cutlass/include'}", f"-I{home / 'src'}", str(work / "module.cu"),
         "-o", str(work / "module.so"), f"-L{work}", "-lcuda"], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or ["nvcc failed"]
        raise Missing(f"did not compile: {next((x for x in lines if 'error' in x), lines[-1])}")


def mimo_work(peers, dstate, headdim, rank):
    """The folder with the compiled kernel."""
    work = folder(peers, "mamba_ssm-") / "built" / f"mimo_{dstate}_{headdim}_{rank}"
    if not (work / "module.so").exists():
        work.mkdir(parents=True, exist_ok=True)
        try:
            compile_mimo(peers, work, dstate, headdim, rank)
        except ImportError as e:
            raise Missing(f"TileLang's kernel is not compiled, which needs {e.name}") from e
    return work


@remembered
def mimo_library(peers, dstate, headdim, rank):
    """(its library, the names of the sizes behind its tensors)."""
    work = mimo_work(peers, dstate, headdim, rank)
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(work / "module.so"))
    library.get_last_error.restype = ctypes.c_char_p
    if library.init():
        raise Missing(f"does not start: {library.get_last_error().decode()}")
    head = re.search(r"int call\((.*?)\)", (work / "module.cu").read_text(), re.S).group(1)
    return library, re.findall(r"\bint (\w+)", head)


def mamba_ssm_mimo(peers, dstate, headdim, rank):
    """mamba3_mimo(Q, K, V, ADT, DT, Trap, ...) as the package has it, with bfloat16 inputs, all of
    its options in use, and the kernel from mimo_library."""
    import torch

    library, sizes = mimo_library(peers, dstate, headdim, rank)

    def forward(q, k, v, q_bias, k_bias, mimo_v, mimo_o, z, D, mimo_z, angles, dA_cs, dA_cs_rev, dt,
                trap, segsum, chunk_size, rotary_dim_divisor, dtype, return_state):
        batch, seqlen, _, groups, _ = q.shape
        nheads = v.shape[2]
        out = torch.empty_like(v)
        h = v.new_empty(batch, nheads, dstate, headdim, dtype=torch.float32)
        last_k = v.new_empty(batch, rank, nheads, dstate)
        tensors = (q, k, v, out, q_bias, k_bias, mimo_v, mimo_o, z, D, mimo_z, angles, dA_cs,
                   dA_cs_rev, dt, trap, segsum, h, last_k)
        known = dict(B=batch, S=seqlen, H=nheads, G=groups)
        failed = library.call(
            *(ctypes.c_void_p(t.data_ptr()) for t in tensors), *(known[name] for name in sizes),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        if failed:
            raise RuntimeError(library.get_last_error().decode())
        return out, h, last_k

    # What the package's own host code imports beside the kernel, TileLang's absence unnoticed.
    for part in MIMO_PARTS:
        name = f"mamba_ssm.ops.tilelang.mamba3.{part}"
        sys.modules[name] = stub = types.ModuleType(name)
        work = part[len("mamba3_mimo_"):]
        wanted = {"fwd": "forward", "fwd_varlen": "forward_varlen", "bwd": "bwd_combined",
                  "bwd_varlen": "bwd_combined_varlen"}[work]
        setattr(stub, f"mamba_mimo_{wanted}", forward if work == "fwd" else None)
    return mamba_ssm_module(peers, "ops.tilelang.mamba3.mamba3_mimo").mamba3_mimo


if __name__ == "__main__":  # cuda_peers.py DIR WHAT: what tools/gpu --pack can compile before
    folder_of_peers, what = Path(sys.argv[1]), sys.argv[2]
    if what == "flashinfer":
        for state in ("bfloat16", "float32"):
            flashinfer_module(
                folder_of_peers, state, "bfloat16", "float32", "float32", "int32", 64, 128, 1)
    else:
        mimo_work(folder_of_peers, 128, 64, 4)
