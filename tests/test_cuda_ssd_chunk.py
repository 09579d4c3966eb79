# SPDX-License-Identifier: MIT
"""ssd_chunk on CUDA apart from its results, for which the other tests have --backend cuda: which
path takes a call, and graphs, batches, pads and pools."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import ssmk
from ssmk._cffi import ffi

from capi import Call, Tensor
from cases import BF16, F16, F32, I32, TOLERANCE
from cases_ssd import FINAL, MIMO, PARTS, SISO, Ssd, make
from test_cuda import built, on_cuda, same, spread, torch  # noqa: F401

# Which path takes a call


def path_of(call, capability):
    """The path of a call on a GPU of a compute capability, after those that do not take it."""
    library = ctypes.CDLL(next((Path(ssmk.__file__).parent / "lib").glob("libssmk.so*")))
    function = library.ssmk_debug_ssd_chunk_path
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int32], ctypes.c_char_p
    text = function(int(ffi.cast("uintptr_t", call.args)), capability)
    return None if text is None else text.decode()


def fields(dtype=F32, batch=2, seqlen=256, nheads=8, headdim=64, ngroups=1, dstate=128, rank=None,
           has=("D", "z", "dt_bias"), states=F32):
    """A call on tensors that say they are on a GPU."""
    heads, ranks = (batch, seqlen, nheads), () if rank is None else (rank,)
    shapes = {
        "x": (*heads, headdim), "dt": heads, "A": nheads, "out": (*heads, headdim),
        "B": (batch, seqlen, *ranks, ngroups, dstate), "D": nheads, "z": (*heads, headdim),
        "dt_bias": nheads, "trap": heads, "angles": (*heads, dstate // 4),
        "norm_weight": (nheads, headdim), "mimo_out": (nheads, rank or 1, headdim),
        "final_states": (batch, nheads, headdim, dstate),
    }
    shapes["C"] = shapes["B"]
    f32 = ("dt", "A", "D", "dt_bias", "trap", "angles", "norm_weight", "mimo_out")
    needed = ("x", "dt", "A", "B", "C", "out", "final_states")
    return {
        name: on_cuda(shapes[name], F32 if name in f32 else states if "states" in name else dtype)
        for name in (*needed, *has)
    }


# The arguments of a call, the compute capability, the path that takes it and the reasons of others.
# A path to come adds its name here to what it takes, and its reason to what it does not.
WIDE = "mma: x is not of 16 bits"
TF32 = "tf32: x is not float32; general"
NARROW = "wgmma: x is not of 16 bits"
OTHER = "wgmma: needs compute capability 9.0"
STATES = "wgmma: dstate is neither 64 nor 128"
PATHS = {
    "float32": (dict(), 90, f"{NARROW}; {WIDE}; tf32"),
    "float32 on sm_80": (dict(), 80, f"{OTHER}; {WIDE}; tf32"),
    "float32 on sm_75": (
        dict(), 75,
        f"{OTHER}; mma: the GPU is older than sm_80; tf32: the GPU is older than sm_80; general",
    ),
    "float32 on sm_86": (dict(), 86, f"{OTHER}; {WIDE}; tf32"),
    "float32, odd sizes": (dict(headdim=20, dstate=36), 90, f"{NARROW}; {WIDE}; tf32"),
    "float32, odd headdim": (
        dict(headdim=18), 90,
        f"{NARROW}; {WIDE}; tf32: headdim is below 16 or not a multiple of 4; general",
    ),
    "float32, odd dstate": (
        dict(dstate=12), 90,
        f"{NARROW}; {WIDE}; tf32: dstate is below 16 or not a multiple of 4; general",
    ),
    "float32, dstate 256": (
        dict(dstate=256), 90, f"{NARROW}; {WIDE}; tf32: dstate is above 128; general"
    ),
    "float32 SISO": (
        dict(has=("trap", "angles", "z")), 90, f"{NARROW}; {WIDE}; tf32: Mamba-3; general"
    ),
    "bfloat16": (dict(dtype=BF16), 90, "wgmma"),
    "float16": (dict(dtype=F16), 90, "wgmma"),
    "groups": (dict(dtype=BF16, ngroups=8), 90, "wgmma"),
    "dstate 64": (dict(dtype=BF16, dstate=64), 90, "wgmma"),
    "headdim 256": (dict(dtype=BF16, headdim=256), 90, "wgmma"),
    "bfloat16 on sm_80": (dict(dtype=BF16), 80, f"{OTHER}; mma"),
    "bfloat16 on sm_75": (
        dict(dtype=BF16), 75, f"{OTHER}; mma: the GPU is older than sm_80; "
        "tf32: the GPU is older than sm_80; general",
    ),
    "bfloat16 on sm_86": (dict(dtype=BF16), 86, f"{OTHER}; mma"),
    "MIMO on sm_86": (
        dict(dtype=BF16, rank=4, has=("trap", "angles", "mimo_out")), 86,
        f"{OTHER}; mma: too little shared memory; {TF32}",
    ),
    "SISO on sm_86": (
        dict(dtype=BF16, dstate=64, has=("trap", "angles", "z")), 86, f"{OTHER}; mma"
    ),
    "wide heads": (
        dict(dtype=BF16, headdim=80), 90, "wgmma: headdim is not a multiple of 64; mma"
    ),
    "odd headdim": (
        dict(dtype=BF16, headdim=7), 90,
        f"wgmma: headdim is not a multiple of 64; mma: headdim is not a multiple of 16; {TF32}",
    ),
    "odd dstate": (
        dict(dtype=BF16, dstate=33), 90, f"{STATES}; mma: dstate is not a multiple of 16; {TF32}"
    ),
    "dstate 256": (
        dict(dtype=BF16, dstate=256), 90, f"{STATES}; mma: dstate is above 128; {TF32}"
    ),
    "SISO": (dict(dtype=BF16, has=("trap", "angles", "z")), 90, "wgmma"),
    "SISO, half of the turns": (dict(dtype=F16, dstate=64, has=("angles",)), 90, "wgmma"),
    "SISO of wide heads": (
        dict(dtype=BF16, headdim=128, has=("trap", "angles")), 90,
        "wgmma: Mamba-3 with a headdim other than 64; mma",
    ),
    "SISO, few heads": (
        dict(dtype=BF16, batch=1, seqlen=4096, has=("trap", "angles")), 90,
        "wgmma: few heads of Mamba-3; mma",
    ),
    "MIMO": (dict(dtype=BF16, rank=4, has=("trap", "angles", "mimo_out")), 90, "wgmma: MIMO; mma"),
    "rank 3": (
        dict(dtype=BF16, rank=3, has=("mimo_out",)), 90,
        f"wgmma: MIMO; mma: rank is not 1, 2, 4 or 8; {TF32}",
    ),
    "few angles": (
        dict(dtype=BF16, dstate=16, has=("angles",)), 90,
        f"wgmma: nangles is not a multiple of 8; mma: nangles is not a multiple of 8; {TF32}",
    ),
    "norm": (dict(dtype=BF16, has=("norm_weight",)), 90, "wgmma: norm; mma"),
    "norm of wide heads": (
        dict(dtype=BF16, headdim=128, has=("norm_weight",)), 90,
        f"wgmma: norm; mma: norm over a headdim above 64; {TF32}",
    ),
}


@built
@pytest.mark.parametrize("case", PATHS.values(), ids=PATHS)
def test_which_path_takes_a_call(case):
    sizes, capability, want = case
    assert path_of(Call("ssd_chunk", **fields(**sizes)), capability) == want


@built
def test_the_path_of_a_wrong_call_is_none():
    assert path_of(Call("ssd_chunk", **{**fields(), "A": on_cuda((9,))}), 90) is None


@built
def test_rows_that_are_not_packed_take_the_general_path():
    call = fields(dtype=BF16)
    room = Tensor(np.empty((2, 256, 8, 68), BF16)[..., :64])
    room.c.data, room.c.device = call["x"].c.data, call["x"].c.device
    path = path_of(Call("ssd_chunk", **{**call, "x": room}), 90)
    assert path == (
        "wgmma: strides or addresses are not multiples of 16 bytes; "
        f"mma: rows that are not packed in 16 bytes; {TF32}"
    )


@built
def test_float32_rows_that_are_not_packed_take_the_general_path():
    call = fields()
    room = Tensor(np.empty((2, 256, 8, 66), F32)[..., :64])
    room.c.data, room.c.device = call["x"].c.data, call["x"].c.device
    path = path_of(Call("ssd_chunk", **{**call, "x": room}), 90)
    assert path == f"{NARROW}; {WIDE}; tf32: rows that are not packed in 16 bytes; general"


@built
def test_workspace_queries_need_no_device():
    assert Call("ssd_chunk", **fields(seqlen=100)).workspace() == ("OK", "", 0)
    # States that wait for their turn: a head with its norm is one block's.
    status, _, size = Call("ssd_chunk", **fields(headdim=512, has=("norm_weight",))).workspace()
    assert status == "OK" and size >= 2 * 8 * 512 * 128 * 4


# With a device

ENTRIES = 9
VARIANTS = {
    "float32": Ssd(3, 70, 4, 64, 128),
    "float32, uneven": Ssd(2, 150, 6, 100, 36, 3, captures=9),
    "float32, segments": Ssd(1, 700, 2, 64, 128, captures=5),
    "float32, packed segments": Ssd(1, 900, 2, 64, 128, nseq=5, pool=ENTRIES),
    "bfloat16": Ssd(3, 70, 4, 64, 128, dtype=BF16),
    "groups, odd sizes": Ssd(3, 41, 6, 37, 19, 3, dtype=F16),
    "few states": Ssd(2, 200, 5, 96, 16, dtype=BF16),
    "many states": Ssd(2, 20, 2, 8, 520),
    "packed, pool": Ssd(1, 90, 4, 64, 64, nseq=5, pool=ENTRIES, flags="bool", index_dtype=I32),
    "labelled": Ssd(2, 90, 3, 48, 96, seq_idx=True, dtype=BF16),
    "captures": Ssd(2, 90, 3, 48, 96, captures=9),
    "float16, one head a block": Ssd(2, 150, 3, 64, 128, 3, dtype=F16, captures=5),
    "two heads a block": Ssd(1, 130, 137, 128, 64, dtype=BF16),
    "blocks of parts of sequences": Ssd(4, 700, 70, 64, 64, dtype=F16),
    "segments": Ssd(1, 16500, 3, 64, 128, dtype=BF16),
    "packed, tiles, pool": Ssd(1, 400, 4, 64, 64, nseq=5, pool=ENTRIES, flags="bool",
                               index_dtype=I32, dtype=BF16, captures=7),
    "SISO": Ssd(2, 70, 4, 64, 128, has=SISO, dtype=BF16),
    "SISO, one pass, halves": Ssd(2, 400, 9, 64, 64, 3, has=SISO, dtype=F16, rotary="half"),
    "SISO, one pass, packed, pool": Ssd(1, 700, 9, 64, 128, has=SISO, nseq=5, pool=ENTRIES,
                                        dtype=BF16, head_angles=False),
    "SISO, pool": Ssd(1, 90, 4, 16, 64, has=SISO, nseq=5, pool=ENTRIES, captures=4),
    "SISO, halves": Ssd(2, 150, 4, 48, 64, 2, has=SISO, dtype=F16, rotary="half", captures=9),
    "SISO, segments": Ssd(1, 700, 2, 64, 128, has=SISO, dtype=BF16, head_angles=False, captures=5),
    "SISO, wide heads": Ssd(1, 150, 2, 144, 64, has=SISO, nseq=4, dtype=BF16),
    "packed segments": Ssd(1, 900, 2, 64, 128, nseq=5, pool=ENTRIES, dtype=BF16),
    "MIMO": Ssd(2, 40, 3, 64, 128, rank=4, has=MIMO, dtype=BF16),
    "MIMO, rows": Ssd(2, 150, 2, 64, 64, rank=2, has=(*SISO, "mimo_x"), dtype=F16),
    "MIMO, norm": Ssd(1, 90, 2, 32, 64, rank=8, has=("D", "z", *PARTS), dtype=BF16, captures=4),
    "MIMO, norm, tiles": Ssd(2, 37, 2, 300, 64, rank=3, has=("D", "z", *PARTS), seq_idx=True),
}
variants = pytest.mark.parametrize("p", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(params=["general", "mma", "tf32", ""], ids=["general", "mma", "tf32", "any path"])
def path(request, monkeypatch):
    monkeypatch.setenv("SSMK_SSD_PATH", request.param)
    return request.param


def tensor(torch, array):
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.uint16).copy()).cuda().view(torch.bfloat16)
    return torch.from_numpy(array.copy()).cuda()


def arguments(torch, rng, p):
    return {name: tensor(torch, value) for name, value in make(rng, p).items()}


def rooms(torch, a, p):
    """Outputs full of NaN, final states and captures among them."""
    room = {"out": torch.full(p.out_shape, float("nan"), device="cuda").to(a["x"].dtype)}
    for part, shape in p.state_shapes().items():
        wanted = {f"final_{part}states": p.entries}
        if p.captures:
            wanted[f"captured_{part}states"] = p.captures
        for name, count in wanted.items():
            room[name] = torch.full((count, *shape), float("nan"), device="cuda")
    return room


def run(torch, a, p, **more):
    room = rooms(torch, a, p)
    try:
        ssmk.ssd_chunk(**{**a, **room, **more})
    except NotImplementedError as e:
        if "does not take this call" in str(e):
            pytest.skip(str(e))
        raise
    return {**room, **{k: v for k, v in more.items() if k in room}}


def same_results(got, want):
    assert got.keys() == want.keys()
    for name in want:
        same(got[name], want[name], name)


@variants
def test_runs_do_not_change_a_bit(torch, rng, path, p):
    a = arguments(torch, rng, p)
    first = run(torch, a, p)
    assert torch.isfinite(first["out"]).all()
    same_results(run(torch, a, p), first)


@variants
def test_replayed_graphs_give_the_bits_of_calls(torch, rng, path, p):
    """Also with other indices in the same memory: only the device reads them."""
    a = arguments(torch, rng, p)
    room = rooms(torch, a, p)
    nan = {name: value.clone() for name, value in room.items()}
    run(torch, a, p)  # skips what the path does not take
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ssmk.ssd_chunk(**a, **room)
    same_results(room, nan)
    for _ in range(2):
        for name, value in nan.items():
            room[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        same_results(room, run(torch, a, p))
        if p.nseq:
            bounds = torch.linspace(0, p.seqlen, p.nseq + 1).long() // 2
            bounds[-1] = p.seqlen
            a["cu_seqlens"].copy_(bounds)
        if p.pool:
            a["state_indices"].copy_(torch.tensor([4, -1, 0, 8, 2]))
        if p.captures:
            a["capture_positions"].copy_(a["capture_positions"].flip(0).clone() // 2)
        if p.seq_idx:
            a["seq_idx"].copy_(a["seq_idx"].flip(1).clone())


@variants
def test_a_row_has_the_bits_that_it_has_alone(torch, rng, path, p):
    if p.nseq or p.captures:
        p = Ssd(**{**vars(p), "nseq": None, "pool": None, "captures": 0, "batch": 3, "flags": None})
    a = arguments(torch, rng, p)
    whole = run(torch, a, p, batch_invariant=True)
    one = Ssd(**{**vars(p), "batch": 1})
    rows = ("x", "dt", "adt", "B", "C", "z", "trap", "angles", "seq_idx")
    for row in range(p.batch):
        part = {
            name: value[row : row + 1] if name in rows or name.startswith("initial") else value
            for name, value in a.items()
        }
        alone = run(torch, part, one, batch_invariant=True)
        same_results(alone, {name: value[row : row + 1] for name, value in whole.items()})


@pytest.mark.parametrize("has, rank", [((), None), (("trap", "angles"), 1), (MIMO, 4)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [1, 17, 63, 64, 100])
def test_a_later_token_of_16_bits_never_reaches_earlier_outputs(
    torch, rng, token, poison, has, rank
):
    p = Ssd(1, 150, 2, 32, 64, 1, rank, has=(*has, "z", "D"), dtype=BF16)
    a = arguments(torch, rng, p)
    clean = run(torch, a, p)["out"]
    for name in ("x", "dt", "B", "C", "z", "trap", "angles"):
        if name in a:
            dirty = a[name].clone()
            dirty[:, token:] = poison
            got = run(torch, {**a, name: dirty}, p)["out"]
            # With a trapezoid a token weighs in the one before it, but for later ones alone.
            same(got[:, :token], clean[:, :token], name)
            if poison != poison:
                assert got[:, token:].isnan().any(), f"{name}: NaN was lost"


@pytest.mark.parametrize("cut", [1, 16, 29, 64])
def test_a_sequence_cut_in_two_has_the_bits_of_the_whole(torch, rng, monkeypatch, cut):
    """Of Mamba-2 on the general path, whose spans leave no trace."""
    monkeypatch.setenv("SSMK_SSD_PATH", "general")
    p = Ssd(2, 70, 3, 64, 128)
    a = arguments(torch, rng, p)
    whole = run(torch, a, p)
    tokens = ("x", "dt", "B", "C", "z")
    ends = []
    for start, stop in ((0, cut), (cut, 70)):
        part = {k: v[:, start:stop] if k in tokens else v for k, v in a.items()}
        if ends:
            part["initial_states"] = ends[-1]["final_states"]
        ends.append(run(torch, part, Ssd(**{**vars(p), "seqlen": stop - start})))
    same(torch.cat([end["out"] for end in ends], 1), whole["out"])
    same(ends[-1]["final_states"], whole["final_states"], "final_states")


@pytest.mark.parametrize("name", ["packed, pool", "SISO, pool"])
def test_pads_and_slots_out_of_range_leave_every_byte(torch, rng, path, name):
    p = VARIANTS[name]
    a = arguments(torch, rng, p)
    bad = torch.tensor([-1, ENTRIES, 2**31 - 1, -(2**31), ENTRIES + 5], device="cuda")
    some = a["state_indices"].clone()
    some[1::2] = bad[1::2].to(some.dtype)
    a["cu_seqlens"] = torch.tensor([0, 20, 41, 41, 77, 90], device="cuda")
    final = [name for name in FINAL if name in rooms(torch, a, p)]
    for slots in (bad.to(some.dtype), some):
        pools = {name: torch.randn_like(rooms(torch, a, p)[name]) for name in final}
        before = {name: pool.clone() for name, pool in pools.items()}
        got = run(torch, {**a, "state_indices": slots}, p, **pools)
        real = ((slots >= 0) & (slots < ENTRIES)).tolist()
        ends = a["cu_seqlens"].tolist()
        for i, used in enumerate(real):
            out = got["out"][:, ends[i] : ends[i + 1]]
            assert torch.isfinite(out).all() if used else (out == 0).all()
        rest = torch.ones(ENTRIES, dtype=torch.bool, device="cuda")
        rest[slots[torch.tensor(real, device="cuda")].long()] = False
        for name in final:
            same(pools[name][rest], before[name][rest], name)


def test_sequence_bounds_out_of_range_stay_inside(torch, rng, path):
    p = Ssd(1, 40, 2, 16, 32, nseq=4)
    a = arguments(torch, rng, p)
    a["cu_seqlens"] = torch.tensor([-(2**40), 7, 2**40, -5, 2**33], device="cuda")
    guarded = torch.full((3, 40, 2, 16), 7.0, device="cuda")
    run(torch, a, p, out=guarded[1:2])
    torch.cuda.synchronize()
    assert (guarded[[0, 2]] == 7).all()


@variants
def test_strided_tensors_give_the_bits_of_packed_ones(torch, rng, monkeypatch, p):
    monkeypatch.setenv("SSMK_SSD_PATH", "general")
    a = arguments(torch, rng, p)
    want = run(torch, a, p)
    apart = {name: spread(torch, value) for name, value in a.items()}
    room = {name: spread(torch, value) for name, value in rooms(torch, a, p).items()}
    ssmk.ssd_chunk(**apart, **room)
    same_results(room, want)


@variants
@pytest.mark.parametrize("tensor_cores", ["mma", "tf32", ""], ids=["mma", "tf32", "best"])
def test_paths_agree(torch, rng, monkeypatch, p, tensor_cores):
    a = arguments(torch, rng, p)
    monkeypatch.setenv("SSMK_SSD_PATH", tensor_cores)
    got = run(torch, a, p)
    monkeypatch.setenv("SSMK_SSD_PATH", "general")
    for name, want in run(torch, a, p).items():
        error = (got[name].double() - want.double()).nan_to_num()
        if "angle" in name:
            error = torch.remainder(error + torch.pi, 2 * torch.pi) - torch.pi
        dtype = {torch.float32: F32, torch.float16: F16}.get(a["x"].dtype, BF16)
        assert error.abs().max() <= TOLERANCE[dtype] * want.nan_to_num().abs().max(), name


def test_a_path_that_is_not_there_is_refused_by_name(torch, rng, monkeypatch):
    p = VARIANTS["float32"]
    a = arguments(torch, rng, p)
    monkeypatch.setenv("SSMK_SSD_PATH", "nowhere")
    with pytest.raises(NotImplementedError, match="SSMK_SSD_PATH: must be a path .* got nowhere"):
        run(torch, a, p)


def test_what_does_not_fit_is_refused_before_anything_is_written(torch, rng):
    a = arguments(torch, rng, Ssd(1, 3, 1, 4, 40_000))
    out = torch.full((1, 3, 1, 4), float("nan"), device="cuda")
    with pytest.raises(NotImplementedError, match="ssd_chunk: B: rank, dstate and headdim of one"):
        ssmk.ssd_chunk(**a, out=out)
    assert out.isnan().all()


@pytest.mark.parametrize("p", [
    Ssd(40, 33, 6, 256, 128, has=SISO),
    Ssd(40, 33, 6, 256, 128, has=SISO, dtype=dict.fromkeys(("x", "B", "C", "z", "out"), BF16)),
    Ssd(1, 2000, 3, 128, 64, has=SISO, dtype=dict.fromkeys(("x", "B", "C", "z", "out"), BF16)),
])  # fmt: skip
def test_in_place_states_of_many_blocks_a_head(torch, rng, path, p):
    """Angles and keys that all rows of a head read are replaced while others start."""
    a = arguments(torch, rng, p)
    want = run(torch, a, p)
    pools = {name: a[name.replace("final", "initial")].clone() for name in FINAL}
    start = {name.replace("final", "initial"): pool for name, pool in pools.items()}
    got = run(torch, {**a, **start}, p, **pools)
    same_results(got, want)


def test_offsets_past_two_to_the_31_elements(torch, rng, path):
    """A slot far into a pool."""
    p = Ssd(2, 20, 2, 64, 128, dtype=BF16)
    a = arguments(torch, rng, p)
    want = run(torch, a, p)
    entries = 2**31 // (2 * 64 * 128) + 64
    if torch.cuda.mem_get_info()[0] < 3 * 2 * entries * 2 * 64 * 128:
        pytest.skip("the GPU has not enough free memory")
    pool = torch.zeros((entries, 2, 64, 128), dtype=torch.bfloat16, device="cuda")
    slots = torch.tensor([entries - 1, 3], device="cuda")
    pool[slots] = a["initial_states"].to(pool.dtype)
    out = torch.full_like(want["out"], float("nan"))
    ssmk.ssd_chunk(**{**a, "initial_states": pool}, state_indices=slots, final_states=pool, out=out)
    same(out, want["out"])
    same(pool[slots], want["final_states"].to(pool.dtype), "final_states")
    pool[slots] = 0
    assert not pool.view(torch.int16).any(), "other slots were written"
