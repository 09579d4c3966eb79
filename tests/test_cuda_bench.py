# SPDX-License-Identifier: MIT
"""What the CUDA benchmark compares prefill with, and the cases themselves, without a GPU: the
chunked float64 reference against the tests' one, and each kind of case on the CPU."""

import os
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import reference
from ssmk.bench import cuda, cuda_reference, cuda_warm
from ssmk.bench.cuda_cases import ssd_chunk as cases

F64 = torch.float64
STATES = {"states": "h", "angle_states": "angle", "k_states": "k", "v_states": "v"}


@pytest.fixture
def normal(request):
    generator = torch.Generator().manual_seed(sum(request.node.name.encode()))
    return lambda *shape: torch.randn(shape, generator=generator, dtype=F64)


def mamba2(normal, batch=2, seqlen=37, nheads=4, ngroups=2, headdim=3, dstate=6):
    return dict(
        x=normal(batch, seqlen, nheads, headdim), dt=torch.exp(normal(batch, seqlen, nheads) - 1),
        A=-torch.exp(normal(nheads)), B=normal(batch, seqlen, ngroups, dstate),
        C=normal(batch, seqlen, ngroups, dstate))


def mamba3(normal, rank, batch=2, seqlen=37, nheads=4, headdim=3, dstate=8):
    a = mamba2(normal, batch, seqlen, nheads, 2, headdim, dstate)
    a.update(A=None, adt=-torch.exp(normal(batch, seqlen, nheads)))
    if rank > 1:
        a.update({name: normal(batch, seqlen, rank, 2, dstate) for name in "BC"})
        for name in ("mimo_x", "mimo_z", "mimo_out"):
            a[name] = normal(nheads, rank, headdim)
    return dict(
        a, D=normal(nheads), z=normal(batch, seqlen, nheads, headdim),
        trap=normal(batch, seqlen, nheads), B_bias=normal(nheads, rank, dstate),
        C_bias=normal(nheads, rank, dstate))


def both(a, chunk, **more):
    """Compares the two references; returns the names of the final states."""
    out, final = cuda_reference.ssd_chunk(torch, **a, chunk=chunk, **more)
    arrays = {name: v.numpy() if isinstance(v, torch.Tensor) else v
              for name, v in {**a, **more}.items()}
    want, states, _ = reference.ssd_chunk(**arrays)
    np.testing.assert_allclose(out, want, rtol=1e-9, atol=1e-9)
    for name, value in final.items():
        np.testing.assert_allclose(value, getattr(states, STATES[name]), rtol=1e-9, atol=1e-9)
    return set(final)


@pytest.mark.parametrize("chunk", (1, 8, 64))
def test_mamba2(normal, chunk):
    a = mamba2(normal)
    assert both(a, chunk) == {"states"}
    a.update(D=normal(4, 3), z=normal(2, 37, 4, 3), dt_bias=normal(4), dt_softplus=True)
    both(a, chunk)


def test_packed_sequences(normal):
    a = mamba2(normal, batch=1, seqlen=40)
    both(a, 16, cu_seqlens=torch.tensor([0, 1, 18, 40]))


@pytest.mark.parametrize("rank, rotary", ((1, "interleaved"), (3, "half")))
@pytest.mark.parametrize("shared", (False, True))
def test_mamba3(normal, rank, rotary, shared):
    a = mamba3(normal, rank)
    assert both(a, 16) == {"states", "k_states", "v_states"}
    a["angles"] = normal(2, 37, 3) if shared else normal(2, 37, 4, 3)
    assert both(a, 16, rotary=rotary) == set(STATES)


def test_mamba3_without_its_outputs_mixed(normal):
    a = mamba3(normal, 2)
    a.update(mimo_out=None, mimo_z=None, mimo_x=None)
    both(a, 16)


def test_errors():
    want = torch.tensor([0.0, 3.0, -4.0], dtype=F64)
    found = cuda_reference.errors(torch.tensor([0.0, 3.0, -3.5]), want)
    assert found == {"max": 0.125, "rms": pytest.approx(0.1)}
    assert np.isnan(cuda_reference.errors(torch.tensor([0.0, torch.nan, -4.0]), want)["max"])
    assert cuda.largest({"out": {"max": 0.25, "rms": 0.0}, "states": {"max": 0.5, "rms": 0}}) == 0.5
    assert np.isnan(cuda.largest({"out": {"max": 1.0}, "states": {"max": float("nan")}}))
    assert cuda.largest(0.5) == 0.5


class Context:
    """The benchmark's, on the CPU and without peers."""

    def __init__(self):
        self.torch, self.device, self.peers = torch, torch.device("cpu"), None
        self.generator = torch.Generator().manual_seed(1)
        self.known_rates = {"bf16_product_TFLOP/s": 800.0}

    def sets_for(self, nbytes):
        return 2

    def normal(self, *shape, dtype):
        return torch.randn(shape, generator=self.generator).to(dtype)

    def rates(self):
        return self.known_rates


LAYERS = (
    cases.Layer(4), cases.Layer(4, groups=2, z=True), cases.Layer(4, dtype="float32"),
    cases.Layer(4, dtype="float16", dstate=64, headdim=128), cases.Layer(4, packed=True),
    cases.Layer(4, z=True, rank=1), cases.Layer(4, z=True, rank=4),
)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_a_case_checks_the_call_that_it_times(layer):
    context = Context()
    case = cases.case(context, layer.name, layer, 3, 50)
    assert case.peers and all("not packed" in why for _, why in case.peers)
    errors = case.ssmk.check()
    assert set(errors) == (set(STATES) if layer.rank else {"states"}) | {"out"}
    assert cuda.largest(errors) < (1e-4 if layer.dtype == "float32" else case.ssmk.tolerance)
    assert all(0 < found["rms"] <= found["max"] * 10 or what == "v_states"
               for what, found in errors.items())
    row = cuda.row_of(context, case, {"ssmk": 2.0, "copy": 1.0, "mamba-ssm": "no"},
                      {"ssmk": errors}, {})
    assert row["tensor_us"] == pytest.approx(case.flops / 8e8)
    assert row["limit_us"] == max(row["tensor_us"], 1.0) and row["errors"] == {"ssmk": errors}


def test_the_work_of_a_case():
    """8 x 4096 tokens of 80 heads, counted by hand: per token and head two products with the state
    of 64 x 128, half of 64 other tokens' x, and an eightieth of their C B^T."""
    mamba2 = cases.flops(cases.Layer(80), 8 * 4096)
    assert mamba2 == 8 * 4096 * 80 * (4 * 64 * 128 + 64 * 64 + 64 * 128 / 80)
    assert cases.flops(cases.Layer(32, rank=4), 10) == 4 * cases.flops(cases.Layer(32, rank=1), 10)
    case = cases.case(Context(), "", cases.Layer(4), 3, 50)
    values = 3 * 50 * 4 * 64
    assert case.bytes == (2 * values + 2 * 3 * 50 * 128 + 3 * 50 * 4) * 2 + (
        3 * 4 * 64 * 128 + 3 * 4) * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_all_processes_do_their_share_whatever_becomes_of_one(tmp_path, capfd):
    def work(i):
        if i == 1:
            raise ValueError("not this one")
        (tmp_path / str(i)).touch()

    cuda_warm.forked(4, work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2", "3"]
    assert capfd.readouterr().err.count("ValueError: not this one") == 1


def test_names_of_cases_are_all_different():
    names = [f"{layer.name} {size}" for layer, sizes in cases.POINTS for size in sizes]
    assert len(set(names)) == len(names)
    context = types.SimpleNamespace()
    assert not list(cases.cases(context, types.SimpleNamespace(search=lambda name: None)))


def test_what_is_refused_or_wrong_stays_in_the_row(monkeypatch):
    """Without a GPU: graphs are names, and every replay takes 2 us."""
    monkeypatch.setattr(cuda, "graph_of", lambda context, c, sets, least: (c.name, least))
    monkeypatch.setattr(cuda, "timed", lambda context, graphs: dict.fromkeys(graphs, 2.0))
    context = Context()
    context.ceilings = types.SimpleNamespace(
        contender=lambda kind, nbytes, sets: cuda.Contender(kind, None))

    def error(most):
        return lambda: {"out": {"max": most, "rms": most}}

    def refusing():
        raise NotImplementedError("not on this backend")

    peers = [cuda.Contender("good 1", None, error(0.01), 0.1),
             cuda.Contender("bad 2", None, error(float("nan")), 0.1), ("absent", "no reason")]
    monkeypatch.setattr(cuda, "timed_launches", lambda context, contenders, sets, count: {
        c.name: 5.0 for c in contenders})
    case = cuda.Case("ssd_chunk x, batch 1, seqlen 2", 10, 2,
                     cuda.Contender("ssmk", None, error(0.001), 0.01), peers, "copy", 3.2e9, 4,
                     launched=True)
    row = cuda.row_of(context, case, *cuda.measure(context, case))
    assert row["limit"] == "tensor" and row["limit_us"] == 4.0 and row["memory_us"] == 2.0
    assert row["ssmk_us"] == 2.0 and row["ssmk_over_limit"] == 0.5
    assert row["peers"]["good 1"] == 2.0 and row["peers"]["absent"] == "no reason"
    assert "error is nan" in row["peers"]["bad 2"]
    assert set(row["errors"]) == {"ssmk", "good 1", "bad 2"}
    assert row["launched_us"] == {"ssmk": 5.0, "good 1": 5.0}

    case.ssmk.check = refusing
    row = cuda.row_of(context, case, *cuda.measure(context, case))
    assert row["ssmk_us"] is None and row["ssmk_refused"] == "not on this backend"
    assert row["peers"]["good 1"] == 2.0
    cuda.show([row])
    case.peers = []
    with pytest.raises(NotImplementedError):
        cuda.measure(context, case)
    case.ssmk.check = error(1.0)
    with pytest.raises(cuda.Wrong):
        cuda.measure(context, case)
