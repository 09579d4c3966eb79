# SPDX-License-Identifier: MIT
"""The CUDA backend apart from its results, for which the other tests have --backend cuda: what it
does without a device, and graphs, streams, pads, pools and failures with one."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ssmk
from ssmk._cffi import ffi

from capi import CUDA, Call, Tensor
from cases import F32

NOWHERE = itertools.count(1 << 40, 1 << 30)  # addresses that neither host nor device has
OPERATIONS = ("causal_conv1d_update", "state_update")

built = pytest.mark.skipif(
    not ssmk.backend_built("cuda"), reason="this build has no CUDA backend (SSMK_CUDA=enabled)"
)


# Without a device


def on_cuda(shape, dtype=F32, device=0):
    """A tensor that says it is on a GPU: whoever reads it on the host crashes."""
    t = Tensor(np.empty(shape, dtype))
    t.c.data = ffi.cast("void *", next(NOWHERE))
    t.c.device.device_type, t.c.device.device_id = CUDA, device
    return t


def conv_update(**changes):
    fields = dict(
        x=on_cuda((2, 8)), conv_state=on_cuda((3, 8, 3)), weight=on_cuda((8, 4)),
        out=on_cuda((2, 8)), state_indices=on_cuda(2, np.int32), num_tokens=on_cuda(2, np.int64),
    )
    return Call("causal_conv1d_update", **{**fields, **changes})


def cpu_works():
    x, state, weight = (np.ones(s, F32) for s in ((1, 2), (1, 2, 3), (2, 4)))
    assert (ssmk.causal_conv1d_update(x, state, weight) == 4).all()


@pytest.mark.skipif(ssmk.backend_built("cuda"), reason="this build has a CUDA backend")
def test_a_build_without_cuda_says_so():
    assert ssmk.device_count("cuda") == 0
    status, message = conv_update()()
    assert status == "UNSUPPORTED"
    assert message.startswith("causal_conv1d_update: x: is on cuda:0 ")
    assert message.endswith("this build has a backend for cpu only")


@built
@pytest.mark.skipif(ssmk.device_count("cuda") > 0, reason="this machine has a CUDA device")
def test_without_a_device_a_call_fails_in_the_driver_s_words_and_the_cpu_goes_on():
    for _ in range(2):
        status, message = conv_update()()
        assert status == "DEVICE_ERROR"
        assert message.startswith("causal_conv1d_update: selecting cuda:0 failed: ")
        assert "(cudaError" in message
        cpu_works()


@built
def test_arguments_are_checked_before_the_device_is_asked():
    status, message = conv_update(x=on_cuda((2, 9)))()
    assert status == "INVALID_ARGUMENT" and "weight: shape must be (dim, width)" in message
    status, message = conv_update(weight=on_cuda((8, 4), device=1))()
    assert status == "INVALID_ARGUMENT"
    assert "weight: must be on the device of x (cuda:0), got cuda:1" in message
    status, message = conv_update(state_indices=np.zeros(2, np.int32))()
    assert status == "INVALID_ARGUMENT"
    assert "state_indices: must be on the device of x (cuda:0), got cpu:0" in message
    status, message, _ = conv_update(x=on_cuda((2, 9))).workspace()
    assert status == "INVALID_ARGUMENT"


@built
def test_workspace_queries_need_no_device():
    assert conv_update().workspace() == ("OK", "", 0)


@built
def test_operations_that_are_not_on_cuda_are_refused_by_name():
    x, A = on_cuda((1, 4, 5)), on_cuda((4, 2))
    B = on_cuda((1, 2, 5))
    call = Call("selective_scan", x=x, dt=on_cuda((1, 4, 5)), A=A, B=B, C=on_cuda((1, 2, 5)),
                out=on_cuda((1, 4, 5)))
    expected = "selective_scan: is not available on CUDA in this version"
    assert call() == ("UNSUPPORTED", expected)
    assert call.workspace()[:2] == ("UNSUPPORTED", expected)
    call = Call("causal_conv1d", x=x, weight=on_cuda((4, 3)), out=on_cuda((1, 4, 5)))
    expected = "causal_conv1d: is not available on CUDA in this version"
    assert call() == ("UNSUPPORTED", expected)


@built
def test_the_library_needs_no_driver():
    library = next((Path(ssmk.__file__).parent / "lib").glob("libssmk.so*"))
    needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed and "cuda" not in needed


@built
def test_no_kernel_spills_or_serializes_its_products():
    reports = list((Path(ssmk.__file__).parent / "lib").glob("*.ptxas.txt"))
    kernels = [line.split() for report in reports for line in report.read_text().splitlines()]
    assert any("any_step" in kernel[-1] for kernel in kernels), "the report lacks a known kernel"
    for target, registers, stack, stores, loads, shared, losses, name in kernels:
        assert target.startswith("sm_") and 0 < int(registers) <= 255 and int(shared) <= 49152, name
        assert stores == loads == "0", f"{name} for {target} spills {stores} and {loads} bytes"
        assert stack == "0", f"{name} for {target} keeps {stack} bytes in local memory"
        assert losses == "0", f"{name} for {target}: ptxas warns of a loss of speed"


# With a device


@pytest.fixture(scope="module")
def torch():
    if ssmk.device_count("cuda") == 0:
        pytest.skip("this machine has no CUDA device that this build can use")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch cannot use the CUDA device")
    return torch


@pytest.fixture(params=OPERATIONS)
def operation(request, torch):
    return request.param


# batch, T (None: no such axis), dtype, extra arguments
VARIANTS = {
    "one token": (5, None, "float32", ()),
    "bfloat16": (33, None, "bfloat16", ()),
    "tokens": (4, 3, "float32", ("num_tokens",)),
    "odd": (3, None, "float16", ("odd",)),
    "many rows": (90, None, "bfloat16", ("float32 state",)),
    "bfloat16 tokens": (70, 3, "bfloat16", ("num_tokens",)),
    "tokens of float32 states": (5, 4, "bfloat16", ("num_tokens", "float32 state")),
    "channels": (300, None, "bfloat16", ("channels",)),
    "channels, many rows": (1500, None, "bfloat16", ("channels",)),
    "channels, float32 states": (300, None, "bfloat16", ("channels", "float32 state")),
    "channels, many float32 rows": (1500, None, "bfloat16", ("channels", "float32 state")),
    "channels, tokens": (150, 3, "bfloat16", ("channels", "num_tokens")),
    "channels, dstate 128": (40, None, "float16", ("channels", "float32 state", "long")),
}
# On these state_update takes tensor cores where the layout allows it: the bits are the layout's.
TENSOR_CORES = ("bfloat16 tokens", "tokens of float32 states")
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def arguments(torch, operation, batch, T, dtype, has, entries=None, seed=0):
    """(state, keyword arguments, out among them): tensors on the GPU, a slot a row, shuffled."""
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype = getattr(torch, dtype)
    entries = entries or 2 * batch
    time = () if T is None else (T,)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    slots = torch.randperm(entries, generator=generator, device="cuda")[:batch].to(torch.int32)
    if operation == "causal_conv1d_update":
        dim = 301 if "odd" in has else 512
        state = normal(entries, dim, 3)
        x = normal(batch, *time, dim)
        a = dict(weight=normal(dim, 4), bias=normal(dim), activation="silu")
        if T is not None:
            a["channels_last"] = True
    elif "channels" in has:  # Mamba-1
        dim, dstate = 640, 128 if "long" in has else 16
        wide = torch.float32 if "float32 state" in has else dtype
        state = normal(entries, dim, dstate, dtype=wide)
        x = normal(batch, *time, dim)
        a = dict(
            dt=normal(batch, *time, dim) - 2, A=-normal(dim, dstate, dtype=torch.float32).exp(),
            B=normal(batch, *time, dstate), C=normal(batch, *time, dstate), D=normal(dim),
            z=normal(*x.shape), dt_bias=normal(dim), dt_softplus=True,
        )
    else:
        nheads, headdim, dstate = (3, 5, 19) if "odd" in has else (8, 64, 128)
        wide = torch.float32 if "float32 state" in has else dtype
        state = normal(entries, nheads, headdim, dstate, dtype=wide)
        x = normal(batch, *time, nheads, headdim)
        a = dict(
            dt=normal(batch, *time, nheads) - 2, A=-normal(nheads).float().exp(),
            B=normal(batch, *time, 1, dstate), C=normal(batch, *time, 1, dstate),
            D=normal(nheads), z=normal(*x.shape), dt_bias=normal(nheads), dt_softplus=True,
        )
    a.update(x=x, state_indices=slots, out=torch.full_like(x, float("nan")))
    if "num_tokens" in has:
        a["num_tokens"] = torch.arange(batch, device="cuda") % (T + 1)
    return state, a


def call(operation, state, a, **more):
    name = "conv_state" if operation == "causal_conv1d_update" else "state"
    try:
        return getattr(ssmk, operation)(**{name: state}, **{**a, **more})
    except NotImplementedError as e:
        pytest.skip(str(e))


def bits(tensor):
    item = tensor.element_size()
    flat = tensor.cpu().contiguous().view(-1)
    return flat.view(getattr(sys.modules["torch"], f"int{8 * item}")).numpy()


def same(got, want, what="out"):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert np.array_equal(bits(got), bits(want)), f"{what}: bits differ"


def spread(torch, value):
    """A tensor of the same values that no kernel takes for packed."""
    if not torch.is_tensor(value):
        return value
    room = torch.full((*value.shape, 3), 0 if not value.is_floating_point() else float("nan"),
                      device="cuda", dtype=value.dtype)
    room[..., 1] = value
    return room[..., 1]


def fresh(a):
    """The arguments with an output of its own."""
    return {**a, "out": a["out"].clone().fill_(float("nan"))}


@variants
def test_runs_and_batches_do_not_change_a_bit(torch, operation, variant):
    state, a = arguments(torch, operation, *variant)
    first, again = state.clone(), state.clone()
    out = call(operation, first, a)
    assert torch.isfinite(out).all()
    same(call(operation, again, fresh(a)), out)
    same(again, first, "state")
    rows = ("x", "dt", "B", "C", "z", "state_indices", "num_tokens", "out")
    for batch in (slice(0, 1), slice(1, 3)):
        part = {k: v[batch] if k in rows else v for k, v in fresh(a).items()}
        alone = state.clone()
        same(call(operation, alone, part), out[batch])
        slots = a["state_indices"][batch].long()
        same(alone[slots], first[slots], "state")


@variants
def test_replayed_graphs_give_the_bits_of_calls(torch, operation, variant):
    state, a = arguments(torch, operation, *variant)
    eager = state.clone()
    wants = [call(operation, eager, fresh(a)) for _ in range(3)]
    replayed, out = state.clone(), fresh(a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(operation, replayed, out)
    same(replayed, state, "a capture is no call: state")
    for want in wants:
        graph.replay()
        torch.cuda.synchronize()
        same(out["out"], want)
    same(replayed, eager, "state")


FIRST_CALL = """
import torch, ssmk
x, state, weight = (torch.ones(s, device="cuda") for s in ((2, 8), (2, 8, 3), (8, 4)))
out = torch.empty_like(x)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    ssmk.causal_conv1d_update(x, state, weight, out=out)
graph.replay()
torch.cuda.synchronize()
assert (out == 4).all()
"""


def test_the_first_call_of_a_process_may_be_captured(torch):
    subprocess.run([sys.executable, "-c", FIRST_CALL], check=True)


def test_calls_run_on_the_stream_that_is_named_or_current(torch, operation):
    state, a = arguments(torch, operation, *VARIANTS["bfloat16"])
    eager = state.clone()
    want = call(operation, eager, fresh(a))
    stream = torch.cuda.Stream()
    want.isnan().any()  # loads its kernels, for which the device would be waited for
    spin = 200_000_000  # cycles that come before the call on its stream, and hold it up
    for handle in (None, stream.cuda_stream):
        after, room = state.clone(), fresh(a)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(spin)
            done = torch.cuda.Event()
            if handle is None:
                call(operation, after, room)
        if handle is not None:
            call(operation, after, room, stream=handle)
        done.record(stream)
        assert not done.query(), "the call has waited for the device, or ran on another stream"
        early = room["out"].isnan().any()  # on the default stream, beside the spinning one
        assert early, "the call did not run behind what was on its stream"
        done.synchronize()
        same(room["out"], want)
        same(after, eager, "state")


def test_captured_on_whatever_stream(torch, operation):
    """Nothing of a call strays to another stream, where a capture would refuse it."""
    state, a = arguments(torch, operation, *VARIANTS["one token"])
    call(operation, state.clone(), fresh(a))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="global"):
        call(operation, state, a)
    before = state.clone()
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(before, state)


@variants
def test_pads_and_slots_out_of_range_leave_every_byte(torch, operation, variant):
    state, a = arguments(torch, operation, *variant)
    entries = len(state)
    slots = a["state_indices"]
    bad = torch.tensor([-1, entries, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda")
    where = torch.arange(len(slots), device="cuda") % 2 == 0
    some = torch.where(where, bad[torch.arange(len(slots), device="cuda") // 2 % 4], slots)
    for pads in (bad.repeat(len(slots))[: len(slots)], some):
        after = state.clone()
        out = call(operation, after, fresh(a), state_indices=pads)
        real = (pads >= 0) & (pads < entries)
        assert (out[~real] == 0).all()
        rest = torch.ones(entries, dtype=torch.bool, device="cuda")
        rest[pads[real].long()] = False
        same(after[rest], state[rest], "slots of nobody")
    after = state.clone()
    out = call(operation, after, fresh(a), state_indices_out=bad.repeat(len(slots))[: len(slots)])
    assert (out == 0).all()
    same(after, state, "state")
    pad = int(slots[0])
    out = call(operation, after, fresh(a), pad_slot=pad)
    assert (out[0] == 0).all()
    same(after[pad], state[pad], "the pad slot")


def test_counts_out_of_range_stay_inside(torch, operation):
    state, a = arguments(torch, operation, 3, 4, "float32", ("num_tokens",))
    want_state = state.clone()
    counts = torch.tensor([0, 4, 2], device="cuda")
    want = call(operation, want_state, fresh(a), num_tokens=counts)
    wild = torch.tensor([-(2**40), 2**40, 2], device="cuda")
    same(call(operation, state, fresh(a), num_tokens=wild), want)
    same(state, want_state, "state")


def test_pools_past_two_to_the_31_elements(torch, operation):
    entries = {"causal_conv1d_update": 2**31 // (512 * 3), "state_update": 2**31 // (8 * 64 * 128)}
    room = 2 * (2**31 + 2**27)
    if torch.cuda.mem_get_info()[0] < 2 * room:
        pytest.skip("the GPU has not enough free memory")
    small, a = arguments(torch, operation, *VARIANTS["bfloat16"])
    count, batch = entries[operation] + 64, len(a["x"])
    want_state = small.clone()
    want = call(operation, want_state, fresh(a))
    pool = torch.zeros((count, *small.shape[1:]), dtype=small.dtype, device="cuda")
    far = count - 1 - torch.arange(batch, device="cuda")
    far[0] = 0
    near = a["state_indices"].long()
    pool[far] = small[near]
    same(call(operation, pool, fresh(a), state_indices=far), want)
    same(pool[far], want_state[near], "pool")
    pool[far] = 0
    assert not pool.view(torch.int16).any(), "other slots were written"


@pytest.mark.parametrize("name", VARIANTS)
def test_strided_tensors_give_the_bits_of_packed_ones(torch, operation, name):
    """The general path and the fast ones."""
    state, a = arguments(torch, operation, *VARIANTS[name])
    packed = state.clone()
    want = call(operation, packed, fresh(a))
    apart = {k: spread(torch, v) for k, v in fresh(a).items()}
    strided = spread(torch, state)
    got = call(operation, strided, apart)
    if operation == "state_update" and name in TENSOR_CORES:
        near(torch, got, want)
        return near(torch, strided, packed)
    same(got, want)
    same(strided, packed, "state")


def near(torch, got, want):
    """Within a rounding of the dtype, and of float32 sums."""
    got, want, one = got.double(), want.double(), torch.finfo(want.dtype).eps
    assert ((got - want).abs() <= one * want.abs() + 1e-5 * want.abs().max()).all()


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("headdim", [6, 48, 64, 80, 96, 192])
@pytest.mark.parametrize("dstate", [16, 32, 64, 96, 128, 192, 256])
def test_heads_of_every_size(torch, dstate, headdim, dtype, tokens):
    """A bfloat16 model's decode against float64, with few rows and with many."""
    generator = torch.Generator("cuda").manual_seed(dstate * headdim + tokens)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    nheads, ngroups, f32 = 6, 3, torch.float32
    A, D, dt_bias = -normal(nheads, dtype=f32).exp(), normal(nheads), normal(nheads, dtype=f32)
    for batch in (2, 400):
        x, z = (normal(batch, tokens, nheads, headdim) for _ in range(2))
        B, C = (normal(batch, tokens, ngroups, dstate) for _ in range(2))
        dt = normal(batch, tokens, nheads) - 2
        state = normal(batch + 1, nheads, headdim, dstate, dtype=getattr(torch, dtype))
        slots = torch.randperm(batch + 1, generator=generator, device="cuda")[:batch]
        out = torch.full_like(x, float("nan"))
        h = state[slots].double()
        after = state.clone()
        ssmk.state_update(after, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True,
                          state_indices=slots, out=out)
        for t in range(tokens):
            step = torch.nn.functional.softplus(dt[:, t].double() + dt_bias.double())
            b, c = (v[:, t].double().repeat_interleave(2, 1)[:, :, None] for v in (B, C))
            h = (step * A.double()).exp()[..., None, None] * h
            h = h + (step[..., None] * x[:, t].double())[..., None] * b
            y = (h * c).sum(-1) + D.double()[:, None] * x[:, t].double()
            near(torch, out[:, t], (y * torch.nn.functional.silu(z[:, t].double())).to(out.dtype))
        near(torch, after[slots], h.to(after.dtype))
        kept = torch.ones(batch + 1, dtype=torch.bool, device="cuda")
        kept[slots] = False
        same(after[kept], state[kept], "the slot of nobody")


@pytest.mark.parametrize("batch, has", [(5, ()), (5, ("channels",)), (300, ("channels",))])
def test_slots_and_states_that_the_kernel_before_writes(torch, operation, batch, has):
    """A kernel may look at them while those before it still run."""
    state, a = arguments(torch, operation, batch, None, "bfloat16", has)
    generator = torch.Generator("cuda").manual_seed(1)
    turns = [torch.randperm(len(state), generator=generator, device="cuda") for _ in range(12)]
    turns = [turn[:batch] for turn in turns]
    turns = [turn.to(torch.int32) for turn in turns]
    turns[4][2], turns[7][:] = -1, len(state)
    eager, wants = state.clone(), []
    for turn in turns:
        out = fresh(a)
        torch.cuda.synchronize()
        call(operation, eager, out, state_indices=turn.clone())
        torch.cuda.synchronize()
        wants.append(out["out"])
    chained, slots, outs = state.clone(), turns[0].clone(), [fresh(a) for _ in turns]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn, out in zip(turns, outs):
            slots.copy_(turn)
            call(operation, chained, out, state_indices=slots)
    graph.replay()
    torch.cuda.synchronize()
    for i, (out, want) in enumerate(zip(outs, wants)):
        same(out["out"], want, f"out of call {i}")
    same(chained, eager, "state")


def conv_variants():
    """Some of what the kernels of the convolution tell apart."""
    rng = np.random.default_rng(3)
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    for i in range(120):
        x, width = pick("bfloat16", "float16", "float32"), pick(2, 3, 4, 4, 4, 5)
        yield dict(
            x=x, state=pick(x, x, "float32"), weight=pick(x, x, "float32"), width=width,
            bias=pick(None, x, "float32"), length=pick(width - 1, width - 1, width, width + 3),
            T=pick(None, 1, 2, 3, 4, 7, 8), last=pick(True, False), batch=pick(1, 3, 9, 1100),
            dim=pick(520, 516, 301), by_input=pick(False, True), counts=pick(False, False, True),
            out=pick(False, False, True), wide=pick(False, True), silu=pick(False, True),
        )


def conv_arguments(torch, v, seed=0):
    """(conv_state, the other arguments without out) of one of conv_variants()."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, dtype):
        room = torch.randn(shape, generator=generator, device="cuda")
        return room.to(getattr(torch, dtype))

    batch, dim, T = v["batch"], v["dim"], v["T"]
    entries = 2 * batch + 1
    shape = (batch, dim) if T is None else (batch, T, dim) if v["last"] else (batch, dim, T)
    state = normal(entries, dim, v["length"], dtype=v["state"])
    if v["by_input"]:
        state = state.swapaxes(1, 2).contiguous().swapaxes(1, 2)
    index = torch.int64 if v["wide"] else torch.int32
    slots = torch.randperm(entries, generator=generator, device="cuda").to(index)
    a = dict(x=normal(*shape, dtype=v["x"]), weight=normal(dim, v["width"], dtype=v["weight"]),
             activation="silu" if v["silu"] else None, state_indices=slots[:batch])
    if v["bias"]:
        a["bias"] = normal(dim, dtype=v["bias"])
    if T is not None:
        a["channels_last"] = v["last"]
    if v["counts"]:
        a["num_tokens"] = torch.arange(batch, device="cuda").to(index) % ((T or 1) + 1)
    if v["out"]:
        a["state_indices_out"] = slots[batch : 2 * batch]
    if batch > 2:
        a["state_indices"][2] = -1
    return state, a


def test_every_kernel_of_the_convolution_gives_the_same_bits(torch):
    """Packed tensors, tensors with gaps, and an output of another dtype are three kernels."""

    def spread(tensor):
        room = torch.full((*tensor.shape, 2), float("nan"), device="cuda").to(tensor.dtype)
        room[..., 1] = tensor
        return room[..., 1]

    for v in conv_variants():
        state, a = conv_arguments(torch, v)
        narrow = torch.bfloat16 if v["x"] == "float32" else a["x"].dtype
        results = []
        for kind in ("packed", "gaps", "dtype"):
            after, out, b = state.clone(), torch.full_like(a["x"], float("nan")), a
            if kind == "gaps":
                b = {k: spread(t) if torch.is_tensor(t) else t for k, t in a.items()}
                after, out = spread(after), spread(out)
            elif kind == "dtype":
                out = out.to(torch.bfloat16 if v["x"] == "float32" else torch.float32)
            ssmk.causal_conv1d_update(conv_state=after, out=out, **b)
            results.append((out, after))
        (out, after), (gaps_out, gaps_after), (any_out, any_after) = results
        same(gaps_out, out, f"{v}: out, with gaps")
        same(gaps_after, after, f"{v}: conv_state, with gaps")
        same(any_out.to(narrow), out.to(narrow), f"{v}: out of another dtype")
        same(any_after, after, f"{v}: conv_state, out of another dtype")
        assert torch.isfinite(out).all()


SLOTS = ("intermediate states", "a slot a token", "accepted choices", "other slots", "kept states")


@pytest.mark.parametrize("kind", SLOTS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("channels")])
def test_channels_of_many_rows_give_the_bits_of_strided_ones(torch, variant, kind):
    """Mamba-1, in kernels that walk along the batch, with whatever can be asked of slots."""
    batch, _, dtype, has = VARIANTS[variant]
    T, entries = 3, 4 * batch
    state, a = arguments(torch, "state_update", batch, T, dtype, {*has, "num_tokens"}, entries)
    generator = torch.Generator("cuda").manual_seed(1)
    order = torch.randperm(entries, generator=generator, device="cuda")
    pads = torch.arange(batch, device="cuda") % 7 == 3
    accepted = torch.arange(batch, device="cuda") % (T + 2)
    room = torch.empty(0, device="cuda")
    if kind == "intermediate states":
        rows = torch.randperm(batch, generator=generator, device="cuda")
        room = torch.randn((batch, T, *state.shape[1:]), generator=generator, device="cuda")
        room = room.to(state.dtype)
        more = dict(intermediate_indices=rows.masked_fill(pads, -1), num_accepted_tokens=accepted)
    elif kind == "a slot a token":
        to = order[batch:].view(batch, T).clone()
        to[pads] = -1
        more = dict(state_indices=order[:batch], state_indices_out=to)
    elif kind == "accepted choices":
        more = dict(state_indices=order.view(batch, 4), num_accepted_tokens=accepted)
    elif kind == "other slots":
        to = order[batch : 2 * batch].masked_fill(pads, entries)
        more = dict(state_indices=order[:batch], state_indices_out=to)
    else:
        more = dict(keep_state=True)
    results = []
    for place in (torch.Tensor.clone, lambda v: spread(torch, v)):
        after, kept = place(state), place(room)
        if len(room):
            more["intermediate_states"] = kept
        b = {k: place(v) if torch.is_tensor(v) else v for k, v in fresh(a).items()}
        results.append((call("state_update", after, b, **more), after, kept))
    for got, want, what in zip(*results, ("out", "state", "intermediate_states")):
        same(got, want, what)
    moved = kind not in ("kept states", "intermediate states")
    assert not moved or not torch.equal(results[0][1], state)


def test_conv_states_input_by_input(torch):
    """As serving engines keep them: the channels of one input side by side."""
    for variant in VARIANTS.values():
        for extra in (0, 1):
            state, a = arguments(torch, "causal_conv1d_update", *variant)
            state = torch.cat([state[..., :extra], state], -1)
            by_input = state.swapaxes(1, 2).contiguous().swapaxes(1, 2)
            by_channel = state.clone()
            want = call("causal_conv1d_update", by_channel, fresh(a))
            same(call("causal_conv1d_update", by_input, fresh(a)), want)
            same(by_input, by_channel, "conv_state")


def test_negative_counts_of_a_ring_stay_inside_the_slot(torch):
    state, a = arguments(torch, "causal_conv1d_update", 2, 3, "float32", ())
    before = state.clone()
    counts = torch.tensor([-5, -(2**62)], device="cuda")
    call("causal_conv1d_update", state, a, cache_seqlens=counts)
    rest = torch.ones(len(state), dtype=torch.bool, device="cuda")
    rest[a["state_indices"].long()] = False
    same(state[rest], before[rest], "slots of nobody")


def test_a_device_that_is_not_there_is_an_error_of_that_call_only(torch):
    status, message = conv_update(
        **{
            name: on_cuda(shape, dtype, device=99)
            for name, shape, dtype in (
                ("x", (2, 8), F32), ("conv_state", (3, 8, 3), F32), ("weight", (8, 4), F32),
                ("out", (2, 8), F32), ("state_indices", 2, np.int32), ("num_tokens", 2, np.int64),
            )
        }
    )()
    assert status == "DEVICE_ERROR" and "selecting cuda:99 failed: " in message
    state, a = arguments(torch, "causal_conv1d_update", *VARIANTS["one token"])
    assert torch.isfinite(call("causal_conv1d_update", state, a)).all()


@pytest.mark.parametrize("T", [None, 2])
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(torch, T):
    for dtype in ("float32", "bfloat16"):
        long, time = 40_000, () if T is None else (T,)  # states of a row
        state, a = arguments(torch, "state_update", 2, T, dtype, ())
        heads, dtype = state.shape[1], state.dtype
        before = torch.ones((4, heads, 1, long), dtype=dtype, device="cuda")
        a.update(x=a["x"][..., :1], z=a["z"][..., :1])
        a.update(B=torch.ones((2, *time, 1, long), dtype=dtype, device="cuda"))
        a.update(C=a["B"], out=torch.full_like(a["x"], float("nan")))
        state = before.clone()
        expected = rf"state_update: state: dstate must be at most \d+ on CUDA, got {long}"
        with pytest.raises(NotImplementedError, match=expected):
            ssmk.state_update(state, **a)
        assert torch.equal(state, before) and a["out"].isnan().all()
    state, a = arguments(torch, "state_update", *VARIANTS["one token"])
    assert torch.isfinite(call("state_update", state, a)).all()


# The device is lost by a kernel whose addresses are nowhere.  Both operations have run before, and
# torch's own calls end once the error is known.
LOST = """
import torch, ssmk
from test_cuda import OPERATIONS, VARIANTS, arguments, call, conv_update, cpu_works
good = {name: arguments(torch, name, *VARIANTS["one token"]) for name in OPERATIONS}
for name, (state, a) in good.items():
    call(name, state, a)
torch.cuda.synchronize()
assert conv_update()() == ("OK", "")  # it fails later, on the device
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass
else:
    raise AssertionError("the kernel did not fail")
for _ in range(2):
    status, message = conv_update()()
    assert status == "DEVICE_ERROR" and "cudaErrorIllegalAddress" in message, (status, message)
    assert conv_update().workspace() == ("OK", "", 0)
    for name, (state, a) in good.items():
        try:
            getattr(ssmk, name)(**{"conv_state" if "conv" in name else "state": state}, **a)
        except RuntimeError as error:
            assert str(error).startswith(f"{name}: "), error
            assert "cudaErrorIllegalAddress" in str(error), error
        else:
            raise AssertionError(f"{name} did not notice")
    ssmk.device_count("cuda")
    cpu_works()
"""


def test_after_a_lost_device_calls_say_so_and_the_cpu_goes_on(torch):
    run = subprocess.run(
        [sys.executable, "-c", LOST], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_current_device_stays_the_current_one(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one CUDA device only")
    state, a = arguments(torch, "causal_conv1d_update", *VARIANTS["one token"])
    want_state = state.clone()
    want = call("causal_conv1d_update", want_state, fresh(a))
    there = {k: v.to("cuda:1") if torch.is_tensor(v) else v for k, v in fresh(a).items()}
    torch.cuda.set_device(0)
    far = state.to("cuda:1")
    out = call("causal_conv1d_update", far, there)
    assert torch.cuda.current_device() == 0 and out.device.index == 1
    same(out, want)
    same(far, want_state, "conv_state")
