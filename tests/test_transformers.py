# SPDX-License-Identifier: MIT
"""`import ssmk.transformers`: the ten models, small and with random weights, give what the classes
give without ssmk: logits, tokens, states, gradients; and ssmk is what computes them."""

import contextlib
import copy
import subprocess
import sys
import textwrap
import types
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.15")

import ssmk
import ssmk.transformers as hook

# What the wrapper in transformers says once about missing packages is not about these tests.
transformers.logging.set_verbosity_error()

OPERATIONS = (
    "selective_scan", "ssd_chunk", "state_update", "causal_conv1d", "causal_conv1d_update")

TOKENS = dict(vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=None)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
EXPERTS = dict(num_experts_per_tok=2)

# Two to four layers each, those with state spaces and the model's other kinds.  Odd sizes where
# they are allowed, groups, limits on dt, layers without a bias.
CONFIGS = {
    "mamba": ("Mamba", dict(hidden_size=40, state_size=5, num_hidden_layers=2, conv_kernel=3)),
    "falcon_mamba": ("FalconMamba", dict(hidden_size=40, state_size=16, num_hidden_layers=2)),
    "jamba": ("Jamba", dict(
        hidden_size=48, intermediate_size=56, num_hidden_layers=3, **ATTENTION, **EXPERTS,
        num_experts=2, expert_layer_period=2, expert_layer_offset=1, attn_layer_period=3,
        attn_layer_offset=1, mamba_d_state=8, mamba_proj_bias=True)),
    "zamba": ("Zamba", dict(
        hidden_size=48, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, n_mamba_heads=2, mamba_d_state=8,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"])),
    "mamba2": ("Mamba2", dict(
        num_heads=6, head_dim=16, hidden_size=48, state_size=24, num_hidden_layers=2, n_groups=3,
        chunk_size=8, time_step_limit=(0.02, 0.3))),
    "zamba2": ("Zamba2", dict(
        hidden_size=64, num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=16, n_mamba_heads=4, mamba_ngroups=2, chunk_size=8, intermediate_size=56,
        num_attention_heads=4, max_position_embeddings=512)),
    "bamba": ("Bamba", dict(
        hidden_size=48, intermediate_size=56, num_hidden_layers=3, **ATTENTION,
        attn_layer_indices=[1], mamba_n_heads=6, mamba_d_head=16, mamba_n_groups=2,
        mamba_d_state=24, mamba_chunk_size=8)),
    "falcon_h1": ("FalconH1", dict(
        hidden_size=48, intermediate_size=56, num_hidden_layers=2, **ATTENTION, mamba_d_ssm=96,
        mamba_n_heads=6, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=24, mamba_chunk_size=8,
        mamba_rms_norm=True)),
    "granitemoehybrid": ("GraniteMoeHybrid", dict(
        hidden_size=48, intermediate_size=56, num_hidden_layers=3, **ATTENTION, **EXPERTS,
        num_local_experts=4, shared_intermediate_size=32,
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=6, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=24,
        mamba_chunk_size=8)),
    "nemotron_h": ("NemotronH", dict(
        hidden_size=48, layers_block_type=["mamba", "attention", "moe", "mamba"], **ATTENTION,
        **EXPERTS, head_dim=12, intermediate_size=56, ssm_state_size=24, mamba_num_heads=6,
        mamba_head_dim=16, n_groups=3, chunk_size=8, n_routed_experts=4, moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32)),
}
MAMBA1 = ("mamba", "falcon_mamba", "jamba", "zamba")
models = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def enabled():
    """Every test starts and ends with the functions bound, and with one class of warnings left."""
    hook.enable()
    hook._warned.clear()
    yield
    hook.enable()


def build(name, dtype=torch.float32, **changes):
    prefix, sizes = CONFIGS[name]
    config = getattr(transformers, prefix + "Config")(**TOKENS | sizes | changes)
    torch.manual_seed(len(name))
    model = getattr(transformers, prefix + "ForCausalLM")(config)
    with torch.no_grad():  # so that every part counts: initial weights are tiny, or all alike
        for key, p in model.named_parameters():
            if key.endswith(("A_log", "dt_bias", "dt_proj.bias", ".D")):
                p += 0.3 * torch.randn_like(p)
            elif "norm" not in key and "conv" not in key:
                p *= 2
    return model.to(dtype).eval()


def prompt(batch=3, seqlen=21):
    return torch.randint(2, 97, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))


def left_padded(ids, pads=(0, 5, 13)):
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return ids * mask, mask


def close(got, want, tolerance=2e-5):
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    assert torch.isfinite(want).all()
    error = (got - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"error {error:.3g} of the largest value"


class Calls:
    """What each operation was called with, counted."""

    def __init__(self, monkeypatch):
        self.arguments = {name: [] for name in OPERATIONS}
        for name in OPERATIONS:
            monkeypatch.setattr(ssmk, name, self._counting(name, getattr(ssmk, name)))

    def _counting(self, name, operation):
        def call(*args, **kwargs):
            self.arguments[name].append((args, kwargs))
            return operation(*args, **kwargs)
        return call

    def count(self):
        counts = {name: len(calls) for name, calls in self.arguments.items() if calls}
        for calls in self.arguments.values():
            calls.clear()
        return counts


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def both(function):
    """What a function returns with ssmk, and without."""
    got = function()
    with hook.disabled():
        want = function()
    return got, want


def state_layers(model):
    """How many scans, and how many convolutions, one pass makes."""
    mixers = [m for m in model.modules() if hasattr(m, "conv1d")]
    return sum(getattr(m, "n_mamba_heads", 1) for m in mixers), len(mixers)


# ---------------------------------------------------------------- the same results


@models
@torch.no_grad()
def test_logits(name, calls):
    model, ids = build(name), prompt()
    got, want = both(lambda: model(ids, use_cache=False).logits)
    close(got, want)
    scans, convs = state_layers(model)
    scan = "selective_scan" if name in MAMBA1 else "ssd_chunk"
    assert calls.count() == {scan: scans, "causal_conv1d": convs}


@models
@torch.no_grad()
def test_logits_with_left_padding(name):
    model = build(name)
    ids, mask = left_padded(prompt())
    got, want = both(lambda: model(ids, attention_mask=mask, use_cache=False).logits)
    close(got[mask.bool()], want[mask.bool()])


@models
@pytest.mark.parametrize("seqlen", [1, 3, 20])
@torch.no_grad()
def test_prefill_and_decode_step_by_step(name, seqlen, calls):
    """Logits of every step and all states after it, prompts shorter than the convolution too."""
    model, ids, later = build(name), prompt(2, seqlen), prompt(2, 3)

    def run():
        outputs = [model(ids, use_cache=True)]
        for t in range(later.shape[1]):
            outputs.append(model(
                later[:, t:t + 1], use_cache=True,
                past_key_values=outputs[-1].past_key_values if hasattr(
                    outputs[-1], "past_key_values") else None,
                **({"cache_params": outputs[-1].cache_params} if hasattr(
                    outputs[-1], "cache_params") else {})))
        cache = getattr(outputs[-1], "cache_params", None) or outputs[-1].past_key_values
        states = [
            state for layer in cache.layers for kind in ("conv_states", "recurrent_states")
            for state in getattr(layer, kind, {}).values()]
        return [o.logits for o in outputs], states

    (got, got_states), (want, want_states) = both(run)
    for g, w in zip(got, want):
        close(g, w)
    assert got_states
    for g, w in zip(got_states, want_states, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        close(g, w)
    scans, convs = state_layers(model)
    counts = calls.count()
    assert counts["state_update"] == 3 * scans
    assert counts["causal_conv1d_update"] == 3 * convs


@models
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_tokens(name, padded, calls):
    model = build(name)
    ids, mask = left_padded(prompt()) if padded else (prompt(), None)
    got, want = both(lambda: model.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False))
    assert got.shape == (3, ids.shape[1] + 24)
    assert torch.equal(got, want)
    assert len(torch.unique(got[:, ids.shape[1]:])) >= 3, "tokens that tell nothing"
    assert {"state_update", "causal_conv1d_update", "causal_conv1d"} < set(calls.count())


@models
@torch.no_grad()
def test_bfloat16(name):
    """No further from the float32 model than torch's own path is, prefill and decode.  In the
    median: where experts are chosen, rounding may change the choice for a token."""
    model = build(name)
    ids = prompt()
    exact = copy.deepcopy(model)
    model = model.to(torch.bfloat16)
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})

    def run(model):
        def of():
            first = model(ids[:, :-1], use_cache=True)
            cache = {key: first[key] for key in ("cache_params", "past_key_values")
                     if first.get(key) is not None}
            return torch.cat(
                [first.logits, model(ids[:, -1:], use_cache=True, **cache).logits], 1).float()
        return of

    with hook.disabled():
        want = run(exact)()
    got, torchs = both(run(model))
    scale = want.abs().max()
    error, theirs = ((x - want).abs().median() / scale for x in (got, torchs))
    assert error <= 1.25 * theirs + 1e-3, f"error {error:.3g}, torch's own {theirs:.3g}"


@torch.no_grad()
def test_state_dict_and_classes_are_unchanged():
    model = build("mamba2")
    from transformers.models.mamba2 import modeling_mamba2

    assert type(model) is modeling_mamba2.Mamba2ForCausalLM
    assert type(model.backbone.layers[0].mixer) is modeling_mamba2.Mamba2Mixer
    with hook.disabled():
        other = transformers.Mamba2ForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    ids = prompt()
    assert torch.equal(model(ids).logits, other(ids).logits)


# ---------------------------------------------------------------- nothing is copied


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_tensors_are_the_models_own(name, calls, monkeypatch):
    """Parameters and cached states arrive by address, and so does all that the mixer computed."""
    model, ids = build(name), prompt()
    mixer = model.backbone.layers[0].mixer
    module = sys.modules[type(mixer).__module__]
    handed = []
    for function in ("causal_conv1d_fn", "causal_conv1d_update",
                     *(f for f in hook._MODELS[name] if "conv" not in f)):
        inner = getattr(module, function)

        def spy(*args, inner=inner, **kwargs):
            handed.append([
                t.data_ptr() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)])
            return inner(*args, **kwargs)
        monkeypatch.setattr(module, function, spy)

    output = model(ids, use_cache=True)
    cache = output.cache_params
    calls.count()
    handed.clear()
    model(ids[:, :1], use_cache=True, cache_params=cache)
    (conv, _), (update, _) = (calls.arguments[op][0] for op in (
        "causal_conv1d_update", "state_update"))
    assert conv[1].data_ptr() == cache.layers[0].conv_states[0].data_ptr()
    assert conv[2].data_ptr() == mixer.conv1d.weight.data_ptr()
    assert update[0].data_ptr() == cache.layers[0].recurrent_states[0].data_ptr()
    assert update[6].data_ptr() == mixer.D.data_ptr()
    # All tensors of the calls, in order of layers, are those that the mixers passed.
    got = {t.data_ptr() for op in ("causal_conv1d_update", "state_update")
           for args, _ in calls.arguments[op] for t in args if isinstance(t, torch.Tensor)}
    assert got == {pointer for pointers in handed for pointer in pointers}
    monkeypatch.undo()


# ---------------------------------------------------------------- packed sequences


def mixer_of(name):
    return next(m for m in build(name).modules() if hasattr(m, "conv1d"))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in MAMBA1])
@pytest.mark.parametrize("how", ["seq_idx", "cu_seqlens"])
@torch.no_grad()
def test_packed_sequences_are_kept_apart(name, how):
    """The layer, given what its model passes on."""
    mixer = mixer_of(name)
    cuts = torch.tensor([0, 7, 9, 30])
    x = torch.randn(1, 30, mixer.hidden_size, generator=torch.Generator().manual_seed(0))
    ids = torch.repeat_interleave(torch.arange(3), cuts.diff())[None]
    packed = mixer(x, **({"seq_idx": ids.int()} if how == "seq_idx" else {"cu_seqlens": cuts}))
    with hook.disabled():
        for start, end in zip(cuts, cuts[1:]):
            close(packed[:, start:end], mixer(x[:, start:end]))


@pytest.mark.parametrize("name", MAMBA1)
@torch.no_grad()
def test_packed_sequences_go_to_transformers_where_the_scan_is_not_told(name, calls):
    """Which refuses them, or, before it did, runs over their borders: it is asked either way."""
    mixer = mixer_of(name)
    x, ids = torch.randn(1, 8, mixer.hidden_size), torch.zeros(1, 8, dtype=torch.int32)

    def run():
        try:
            return mixer(x, seq_idx=ids)
        except ValueError as error:
            assert "packed sequences" in str(error)
            return None
    got, want = both(run)
    assert (got is None) == (want is None)
    if got is not None:
        close(got, want)
    assert "causal_conv1d" not in calls.count()


# ---------------------------------------------------------------- what goes to torch


@models
def test_training(name, calls):
    """Gradients are those of the classes without ssmk, and one warning says what happens."""
    model, ids = build(name).train(), prompt()

    def step():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        got = step()
        step()
    ours = [w for w in seen if "ssmk.transformers" in str(w.message)]
    assert len(ours) == 1 and "gradients" in str(ours[0].message)
    assert calls.count() == {}
    with hook.disabled():
        torch.manual_seed(0)
        want = step()
    assert got.keys() == want.keys() and got
    for key, grad in want.items():
        assert torch.equal(got[key], grad), key


def test_frozen_model_without_no_grad_uses_ssmk(calls):
    """What counts is whether a gradient is wanted, not whether the mode is on."""
    model, ids = build("mamba2").requires_grad_(False), prompt()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, use_cache=False)
    assert calls.count()["ssd_chunk"] == 2


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_float64_goes_to_torch(name, calls):
    model, ids = build(name, torch.float64), prompt()
    with pytest.warns(UserWarning, match="float64"):
        got = model(ids, use_cache=False).logits
    assert calls.count() == {}
    with hook.disabled():
        assert torch.equal(got, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_other_activations_go_to_torch(calls):
    model, ids = build("mamba2", hidden_act="gelu"), prompt()
    with pytest.warns(UserWarning, match="activation 'gelu'"):
        got = model(ids, use_cache=False).logits
    assert calls.count() == {"ssd_chunk": 2}
    with hook.disabled():
        close(got, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_other_devices_keep_what_was_there(calls):
    """The function that was there gets everything as it came; seen on the meta device."""
    model, ids = build("mamba2").to("meta"), prompt().to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(ids, use_cache=False).logits.shape == (3, 21, 97)
    assert calls.count() == {}


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_compiled_graphs_hold_the_operations(name, calls):
    """One graph, no breaks: the mixer with ssmk's custom operators, states in place."""
    torch._dynamo.reset()
    model, ids = build(name), prompt()
    mixer = model.backbone.layers[0].mixer
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(3, 21, model.config.hidden_size)
    compiled = torch.compile(mixer, backend=backend, fullgraph=True)
    got = compiled(x)
    assert set(calls.count()) == {
        "causal_conv1d", "selective_scan" if name == "mamba" else "ssd_chunk"}
    with hook.disabled():
        close(got, mixer(x))
    targets = {str(node.target) for node in graphs[0].graph.nodes}
    assert any("ssmk.causal_conv1d" in target for target in targets)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_custom_operators_are_sound(name):
    """Schema, fake shapes and strides, mutation: as torch's own checker sees them."""
    torch.manual_seed(0)
    b, l, d, n, h, p, g = 2, 5, 12, 4, 3, 4, 1
    check = torch.library.opcheck
    utils = ("test_schema", "test_faketensor")
    if name == "mamba":
        x = torch.randn(b, l, d).transpose(1, 2)
        dt, A, B = torch.rand(b, d, l), -torch.rand(d, n), torch.randn(b, n, l)
        check(torch.ops.ssmk.selective_scan.default,
              (x, dt, A, B, B.clone(), None, None, None, True, True), test_utils=utils)
        check(torch.ops.ssmk.selective_scan.default,
              (x, dt, A, B, B.clone(), torch.ones(d), None, None, True, False), test_utils=utils)
        check(torch.ops.ssmk.state_update.default,
              (torch.randn(b, d, n), x[..., 0], dt[..., 0], A, B[..., 0], B[..., 1], None, None,
               None, True), test_utils=utils)
    else:
        x, dt, A = torch.randn(b, l, h, p), torch.rand(b, l, h), -torch.rand(h)
        B = torch.randn(b, l, g, n)
        for final in (True, False):
            check(torch.ops.ssmk.ssd_chunk.default,
                  (x, dt, A, B, B.clone(), None, None, None, None, None, None, True, 0.0,
                   float("inf"), final), test_utils=utils)
    x, w = torch.randn(b, d, l), torch.randn(d, 4)
    check(torch.ops.ssmk.causal_conv1d.default, (x, w, None, None, None, True), test_utils=utils)
    check(torch.ops.ssmk.causal_conv1d_update.default,
          (x[..., :1], torch.randn(b, d, 4), w, torch.randn(d), True), test_utils=utils)


# ---------------------------------------------------------------- binding


def run_python(code):
    """A fresh interpreter, because imports are what is tested."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first", ["ssmk.transformers", "transformers.models.mamba2.modeling_mamba2"])
def test_order_of_imports(first):
    out = run_python(f"""
        import {first}
        import ssmk.transformers
        import torch, transformers, ssmk
        before = ssmk.transformers.hooked()
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
            num_heads=4, head_dim=8, hidden_size=16, state_size=8, num_hidden_layers=1, n_groups=1,
            vocab_size=32))
        made = []
        operation = ssmk.ssd_chunk
        ssmk.ssd_chunk = lambda *a, **k: made.append(1) or operation(*a, **k)
        with torch.no_grad():
            model(torch.arange(5)[None])
        print(before, ssmk.transformers.hooked(), len(made))
        """)
    before = "()" if first == "ssmk.transformers" else "('mamba2',)"
    assert out.strip().endswith(f"{before} ('mamba2',) 1")


def test_importing_it_imports_no_model_and_poses_as_no_package():
    out = run_python("""
        import sys
        import ssmk.transformers
        from transformers.utils import import_utils
        packages = "mamba_ssm", "causal_conv1d"
        print([m for m in sys.modules if ".modeling_mamba" in m or m in packages],
              import_utils._is_package_available("mamba_ssm")[0])
        import importlib.util
        spec = importlib.util.find_spec("transformers.models.bamba.modeling_bamba")
        print(type(spec.loader).__name__, spec.origin.endswith("modeling_bamba.py"))
        """)
    assert out.splitlines()[-2:] == ["[] False", "SourceFileLoader True"]


def test_disabled_import_stays_unbound():
    out = run_python("""
        import ssmk.transformers as hook
        hook.disable()
        from transformers.models.mamba2 import modeling_mamba2 as m
        there = m.mamba2_chunk_scan
        hook.enable()
        bound = m.mamba2_chunk_scan
        hook.disable()
        print(bound is not there, m.mamba2_chunk_scan is there, hook.hooked())
        """)
    assert out.strip().endswith("True True ()")


@torch.no_grad()
def test_disable_and_enable(calls):
    model, ids = build("mamba2"), prompt()
    from transformers.models.mamba2 import modeling_mamba2 as module

    assert "mamba2" in hook.hooked()
    bound = module.mamba2_chunk_scan
    hook.enable()
    assert module.mamba2_chunk_scan is bound, "bound twice"
    hook.disable()
    model(ids)
    assert calls.count() == {} and hook.hooked() == ()
    assert not hasattr(module.mamba2_chunk_scan, "__wrapped__") or (
        module.mamba2_chunk_scan is bound.__wrapped__)
    with hook.disabled():
        pass
    assert hook.hooked() == (), "the context must leave it as it was"
    hook.enable()
    model(ids)
    assert calls.count()["ssd_chunk"] == 2
    with contextlib.suppress(KeyError), hook.disabled():
        raise KeyError
    assert "mamba2" in hook.hooked()


def test_what_others_bound_meanwhile_stays(monkeypatch):
    build("mamba2")
    from transformers.models.mamba2 import modeling_mamba2 as module

    def other():
        pass

    monkeypatch.setattr(module, "causal_conv1d_fn", other)
    hook.disable()
    assert module.causal_conv1d_fn is other


def changed(module, **functions):
    """A copy of a modeling module with some functions replaced, or, if None, missing."""
    copy_ = types.ModuleType(module.__name__)
    vars(copy_).update(vars(module))
    for name, function in functions.items():
        vars(copy_).pop(name)
        if function:
            vars(copy_)[name] = function
    return copy_


@pytest.mark.parametrize("change", ["missing", "parameters", "uncalled"])
def test_a_changed_model_is_left_alone_with_one_warning(change, monkeypatch):
    build("mamba2")
    hook.disable()
    module = sys.modules["transformers.models.mamba2.modeling_mamba2"]
    if change == "missing":
        module = changed(module, mamba2_chunk_scan=None)
    elif change == "parameters":
        module = changed(module, mamba2_chunk_scan=lambda hidden_states, dt, A, seqlens: None)
    else:
        module = changed(module, Mamba2Mixer=None)
    before = dict(vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hook.enable()
        hook.enable()
    messages = [str(w.message) for w in seen if "mamba2" in str(w.message)]
    assert len(messages) == 1
    assert transformers.__version__ in messages[0] and "without ssmk" in messages[0]
    assert vars(module) == before and "mamba2" not in hook.hooked()


def test_calls_behind_any_decorator_are_found(monkeypatch):
    """Transformers' own decorator of a mixer's forward left no trace of it before 5.16."""
    build("mamba2")
    hook.disable()
    there = sys.modules["transformers.models.mamba2.modeling_mamba2"]

    class Mixer:
        def forward(self):
            return (mamba2_chunk_scan, mamba2_selective_state_update,  # noqa: F821
                    causal_conv1d_fn, causal_conv1d_update)  # noqa: F821

    inner = Mixer.forward
    Mixer.forward = lambda *args: inner(*args)
    Mixer.__module__ = there.__name__
    module = changed(there, Mamba2Mixer=Mixer)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hook.enable()
    assert "mamba2" in hook.hooked()
    hook.disable()


def test_all_ten_are_known_to_this_transformers():
    """Every modeling module of this version of transformers is bound without a warning."""
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in hook._MODULES:
            importlib.import_module(name)
        hook.enable()
    assert set(hook.hooked()) == set(CONFIGS)
