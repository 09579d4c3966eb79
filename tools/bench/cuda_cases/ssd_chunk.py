# SPDX-License-Identifier: MIT
"""ssd_chunk: prefill of Mamba-2 and Mamba-3 layers as they are trained, with final states.

The memory limit is a copy of as many bytes as the inputs, outputs and final states have.  The
tensor limit is the products of the chunked algorithm at the rate of a large bf16 product: tokens in
chunks of 64 (64 / rank with Mamba-3), of the products inside a chunk only the half below the
diagonal; C B^T once for all heads of a group, or for every head where heads have biases of their
own.  float32 inputs count six times: three TF32 products for one, at half of bf16's rate.
"""

from typing import NamedTuple

import ssmk

from ..cuda import Case, Contender
from ..cuda_peers import Missing, mamba_ssm_module, mamba_ssm_mimo
from ..cuda_reference import errors, ssd_chunk

CHUNK = 64
TOLERANCE, PEER_TOLERANCE = 2e-2, 1e-1
ORDER = "out", "states", "angle_states", "k_states", "v_states"  # of what ssmk.ssd_chunk returns
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Layer(NamedTuple):
    heads: int
    groups: int = 1
    headdim: int = 64
    dstate: int = 128
    dtype: str = "bfloat16"
    z: bool = False
    packed: bool = False  # the sequences lie one behind the other, of unequal lengths
    rank: int = 0  # 0: Mamba-2

    @property
    def name(self):
        words = [f"{self.heads} heads"]
        words += [f"{self.groups} groups"] * (self.groups > 1)
        words += [f"headdim {self.headdim}"] * (self.headdim != 64)
        words += [f"dstate {self.dstate}"] * (self.dstate != 128)
        if self.rank:
            words = ["Mamba-3 SISO" if self.rank == 1 else f"Mamba-3 rank {self.rank}", *words]
        else:
            words = ["Mamba-2", *words, SHORT[self.dtype]]
        words += ["z"] * (self.z and not self.rank) + ["packed"] * self.packed
        return ", ".join(words)


# A peer's kernels are tuned by what is first measured of a kind: a call that fills the GPU.
POINTS = (
    (Layer(80), ((8, 2048), (1, 512), (1, 2048), (1, 8192), (1, 65536), (8, 4096), (32, 512))),
    (Layer(128, groups=8), ((8, 2048),)),
    (Layer(80, z=True), ((8, 2048),)),
    (Layer(80, packed=True), ((16, 1024),)),
    (Layer(80, dtype="float16"), ((8, 2048),)),
    (Layer(80, dtype="float32"), ((8, 2048),)),
    (Layer(80, dstate=64), ((8, 2048),)),
    (Layer(40, headdim=128), ((8, 2048),)),
    (Layer(32, z=True, rank=1), ((8, 2048), (1, 2048), (1, 8192), (8, 8192))),
    (Layer(32, z=True, rank=4), ((8, 2048), (1, 2048), (1, 8192), (8, 8192))),
)


def name_of(layer, batch, seqlen):
    return f"ssd_chunk {layer.name}, batch {batch}, seqlen {seqlen}"


def cases(context, only):
    for layer, sizes in POINTS:
        for batch, seqlen in sizes:
            name = name_of(layer, batch, seqlen)
            if only.search(name):
                yield case(context, name, layer, batch, seqlen)


def flops(layer, tokens):
    """Of the chunked algorithm, for a layer and a number of tokens."""
    n, p, rank = layer.dstate, layer.headdim, max(layer.rank, 1)
    pairs = layer.heads if layer.rank else layer.groups  # how often C B^T is computed
    inside = CHUNK * (pairs * n + layer.heads * p)
    return tokens * rank * (layer.heads * 4 * n * p + inside)


# Inputs: what ssmk.ssd_chunk takes, by its names


def mamba2_inputs(context, layer, rows, seqlen):
    torch = context.torch
    f32, dtype = torch.float32, getattr(torch, layer.dtype)
    values = rows, seqlen, layer.heads, layer.headdim
    groups = rows, seqlen, layer.groups, layer.dstate
    uniform = torch.rand(layer.heads, generator=context.generator, device=context.device)
    return dict(
        x=context.normal(*values, dtype=dtype),
        dt=context.normal(*values[:3], dtype=f32).div(2).to(dtype),
        A=-1 - 15 * uniform,
        B=context.normal(*groups, dtype=dtype),
        C=context.normal(*groups, dtype=dtype),
        D=context.normal(layer.heads, dtype=f32),
        z=context.normal(*values, dtype=dtype) if layer.z else None,
        dt_bias=context.normal(layer.heads, dtype=f32) / 2 - 4,
        dt_softplus=True,
    )


def mamba3_inputs(context, layer, rows, seqlen):
    """dt and adt as the layer computes them; angles of a quarter of dstate, for all heads alike."""
    torch = context.torch
    f32, dtype = torch.float32, getattr(torch, layer.dtype)
    values, tokens = (rows, seqlen, layer.heads, layer.headdim), (rows, seqlen, layer.heads)
    ranks = (layer.rank,) if layer.rank > 1 else ()
    projection = rows, seqlen, *ranks, layer.groups, layer.dstate
    dt = torch.nn.functional.softplus(context.normal(*tokens, dtype=f32) / 2 - 4)
    given = dict(
        x=context.normal(*values, dtype=dtype),
        dt=dt, A=None, adt=-dt * torch.exp(context.normal(*tokens, dtype=f32)),
        B=context.normal(*projection, dtype=dtype),
        C=context.normal(*projection, dtype=dtype),
        D=context.normal(layer.heads, dtype=f32),
        z=context.normal(*values, dtype=dtype),
        trap=context.normal(*tokens, dtype=dtype),
        # As the peers want them: the Triton kernel rounds to bfloat16 itself, at a cost.
        angles=context.normal(rows, seqlen, layer.dstate // 4, dtype=dtype)
        .to(f32 if layer.rank > 1 else dtype),
        rotary="interleaved" if layer.rank == 1 else "half",
    )

    def weight(mean, size):
        return mean + context.normal(layer.heads, layer.rank, size, dtype=f32) / 10

    given.update(B_bias=weight(1, layer.dstate), C_bias=weight(1, layer.dstate))
    if layer.rank > 1:
        for name, mean in (("mimo_x", 1 / layer.rank), ("mimo_z", 1), ("mimo_out", 1 / layer.rank)):
            given[name] = weight(mean, layer.headdim)
    return given


def final_room(torch, layer, given, sequences):
    """Final states as a peer returns them too: float32, k and v as the layer keeps them."""
    empty = given["x"].new_empty
    shape = sequences, layer.heads
    room = {"final_states": empty(*shape, layer.headdim, layer.dstate, dtype=torch.float32)}
    if layer.rank:
        room["final_angle_states"] = empty(*shape, layer.dstate // 4, dtype=torch.float32)
        room["final_k_states"] = empty(sequences, layer.rank, layer.heads, layer.dstate)
        room["final_v_states"] = empty(*shape, layer.headdim)
    return room


def lengths(torch, context, sequences, total):
    """cu_seqlens of sequences of random lengths, none of them empty."""
    cuts = torch.randperm(total - 1, generator=context.generator, device=context.device)
    cuts = cuts[: sequences - 1].sort().values + 1
    return torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), total)]).to(torch.int32)


def nbytes(torch, values):
    return sum(v.numel() * v.itemsize for v in values if isinstance(v, torch.Tensor))


def case(context, name, layer, batch, seqlen):
    torch = context.torch
    rows, tokens = (1, batch * seqlen) if layer.packed else (batch, seqlen)
    make = mamba3_inputs if layer.rank else mamba2_inputs

    def buffers_of(count):
        for _ in range(count):
            given = make(context, layer, rows, tokens)
            if layer.packed:
                given["cu_seqlens"] = lengths(torch, context, batch, tokens)
            room = final_room(torch, layer, given, batch)
            yield given, dict(room, out=torch.empty_like(given["x"]))

    buffers = list(buffers_of(1))
    moved = sum(nbytes(torch, part.values()) for part in buffers[0])
    sets = context.sets_for(moved)
    buffers += buffers_of(sets - 1)
    want = {}

    def expected():
        if not want:
            out, final = ssd_chunk(torch, **buffers[0][0])
            want.update(out=out, **final)
        return want

    def checked(call, names):
        """Errors of what call() returns, in this order."""
        def check():
            reference = expected()
            found = {}
            for what, value in zip(names, call()):
                value = value.reshape(reference[what].shape)
                if what == "angle_states":  # 0 is 2 pi
                    value, around = value.double() - reference[what], 2 * torch.pi
                    value = torch.remainder(value + torch.pi, around) - torch.pi + reference[what]
                found[what] = errors(value, reference[what])
            return found

        return check

    def run(i):
        given, room = buffers[i]
        ssmk.ssd_chunk(**given, **room)

    def once():
        for v in buffers[0][1].values():
            v.fill_(torch.nan)
        run(0)
        room = buffers[0][1]
        names = ("out", *(f"final_{what}" for what in ORDER[1:]))
        return [room[name] for name in names if name in room]

    theirs = ("out", "angle_states", "states", *ORDER[3:]) if layer.rank else ORDER
    peers = mamba3_peers if layer.rank else mamba2_peers
    found = [
        peer if isinstance(peer[1], str)
        else Contender(*peer, checked(lambda call=peer[1]: call(0), theirs), PEER_TOLERANCE)
        for peer in peers(context, layer, buffers)
    ]
    work = flops(layer, rows * tokens) * (6 if layer.dtype == "float32" else 1)
    # Long calls need no long graphs.
    nodes = max(4, min(20, (1 << 29) // moved))
    mine = Contender("ssmk", run, checked(once, ORDER), TOLERANCE)
    return Case(name, moved, sets, mine, found, "copy", work, nodes, launched=True)


# Peers: (name, run), or (name, why it is not here)


def without_gradients(torch, call, *more):
    def run(i):
        with torch.no_grad():
            return call(i, *more)

    return run


def mamba2_peers(context, layer, buffers):
    torch = context.torch
    chunks = 256, 128  # 256 is the default of its layers
    try:
        scan = mamba_ssm_module(context.peers, "ops.triton.ssd_combined").mamba_chunk_scan_combined
    except Missing as e:
        return [("mamba-ssm", str(e))]
    packing = []
    for given, _ in buffers if layer.packed else ():
        ends = given["cu_seqlens"]
        ids = torch.arange(len(ends) - 1, dtype=torch.int32, device=ends.device)
        ids = ids.repeat_interleave((ends[1:] - ends[:-1]).long())[None]
        packing.append(dict(seq_idx=ids, return_varlen_states=True))

    def call(i, chunk):
        given = buffers[i][0]
        wanted = packing[i] if packing else dict(return_final_states=True)
        return scan(chunk_size=chunk, **given, **wanted)

    return [(f"mamba-ssm chunk {chunk}", without_gradients(torch, call, chunk)) for chunk in chunks]


def mamba3_peers(context, layer, buffers):
    torch = context.torch
    try:
        if layer.rank == 1:
            module = mamba_ssm_module(context.peers, "ops.triton.mamba3.mamba3_siso_combined")
            function = module.mamba3_siso_combined
        else:
            sizes = layer.dstate, layer.headdim, layer.rank
            function = mamba_ssm_mimo(context.peers, *sizes)
    except Missing as e:
        return [("mamba-ssm", str(e))]
    prepared = []
    for given, _ in buffers:
        # Heads before tokens, as the kernels want it: in the layer that is a copy of its own.
        by_head = {name: given[name].transpose(1, 2).contiguous() for name in ("adt", "dt", "trap")}
        angles = given["angles"][:, :, None].expand(-1, -1, layer.heads, -1)
        siso = layer.rank == 1
        one = dict(
            Q=given["C"], K=given["B"], V=given["x"], ADT=by_head["adt"], DT=by_head["dt"],
            Trap=by_head["trap"], Angles=angles, D=given["D"], Z=given["z"],
            Q_bias=given["C_bias"].squeeze(1) if siso else given["C_bias"],
            K_bias=given["B_bias"].squeeze(1) if siso else given["B_bias"],
        )
        if siso:
            one.update(chunk_size=CHUNK, return_final_states=True)
        else:
            one.update(MIMO_V=given["mimo_x"], MIMO_Z=given["mimo_z"], MIMO_Out=given["mimo_out"],
                       chunk_size=CHUNK // layer.rank, rotary_dim_divisor=4, dtype=given["x"].dtype,
                       return_state=True)
        prepared.append(one)
    name = "mamba-ssm Triton" if layer.rank == 1 else "mamba-ssm TileLang"
    return [(name, without_gradients(torch, lambda i: function(**prepared[i])))]
