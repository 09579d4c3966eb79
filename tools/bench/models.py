# SPDX-License-Identifier: MIT
"""Whole models of transformers, with random weights: tokens a second with ssmk.transformers and
without, prefill and greedy decode from the cache.

The two take turns on the same model and the same threads, and the median of each counts; the goals
are those of a Mamba-2 at its default size.  Their logits are compared, or the figure would say
nothing.
"""

import statistics
import time

from . import method, peers

GOALS = {"mamba2": {"prefill": 5.0, "decode": 2.0}}
AGREEMENT = 1e-3  # of the largest logit: 24 layers round differently
ROUNDS = 3  # turns, at the least
VOCABULARY = dict(vocab_size=50280, pad_token_id=0, bos_token_id=0, eos_token_id=0)

# Some 130 million parameters in 24 layers; hybrids at the same width with fewer layers.
ATTENTION = dict(num_attention_heads=12, num_key_value_heads=12)
SSD = dict(mamba_n_heads=24, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=128)
WIDE = dict(hidden_size=768, intermediate_size=2048)
MODELS = {
    "mamba2": ("Mamba2", dict(
        hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64, state_size=128,
        n_groups=1)),
    "mamba": ("Mamba", dict(hidden_size=768, num_hidden_layers=24, state_size=16)),
    "falcon_mamba": ("FalconMamba", dict(hidden_size=768, num_hidden_layers=24, state_size=16)),
    "jamba": ("Jamba", dict(
        num_hidden_layers=8, num_experts=2, num_experts_per_tok=1, **WIDE, **ATTENTION)),
    "zamba": ("Zamba", dict(
        num_hidden_layers=12, attn_layer_period=6, attn_layer_offset=2, **WIDE, **ATTENTION)),
    "zamba2": ("Zamba2", dict(
        num_hidden_layers=12, layers_block_type=["mamba"] * 5 + ["hybrid"] + ["mamba"] * 5
        + ["hybrid"], n_mamba_heads=24, mamba_d_state=64, **WIDE, **ATTENTION)),
    "bamba": ("Bamba", dict(num_hidden_layers=12, attn_layer_indices=[5], **WIDE, **ATTENTION,
                            **SSD)),
    "falcon_h1": ("FalconH1", dict(
        num_hidden_layers=12, mamba_d_ssm=1536, **WIDE, **ATTENTION, **SSD)),
    "granitemoehybrid": ("GraniteMoeHybrid", dict(
        num_hidden_layers=12, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["mamba"] * 5 + ["attention"] + ["mamba"] * 6, **WIDE, **ATTENTION, **SSD)),
    "nemotron_h": ("NemotronH", dict(
        layers_block_type=["mamba", "moe"] * 5 + ["attention", "moe"], mamba_num_heads=24,
        n_groups=1, head_dim=64, n_routed_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=2048, moe_shared_expert_intermediate_size=2048, **WIDE,
        **ATTENTION)),
}  # fmt: skip
DEFAULT, BATCHES = ("mamba2", "mamba"), (1, 8)


class Model:
    """One model, and what it is asked."""

    def __init__(self, name, batch, prompt, tokens, dtype):
        self.torch = peers.torch_module()
        try:
            import ssmk.transformers as hook
            import transformers
        except ImportError as error:
            raise method.Skip(str(error)) from None
        transformers.logging.set_verbosity_error()
        prefix, sizes = MODELS[name]
        config = getattr(transformers, prefix + "Config")(**VOCABULARY | sizes)
        model = getattr(transformers, prefix + "ForCausalLM")(config).eval()
        if name not in hook.hooked():
            raise method.Wrong(f"ssmk.transformers does not take part in {name}")
        self.hook, self.model = hook, model.to(getattr(self.torch, dtype))
        self.prompt = self.torch.randint(1, config.vocab_size, (batch, prompt))
        self.tokens = tokens

    def step(self, ids, before=None):
        cache = {} if before is None else {
            key: before[key] for key in ("cache_params", "past_key_values")
            if before.get(key) is not None}  # fmt: skip
        return self.model(ids, use_cache=True, logits_to_keep=1, **cache)

    def turn(self):
        """Seconds of prefill and of decode, and the prompt's logits."""
        start = time.perf_counter()
        output = self.step(self.prompt)
        prefill, logits = time.perf_counter() - start, output.logits
        start = time.perf_counter()
        for _ in range(self.tokens):
            output = self.step(output.logits[:, -1:].argmax(-1), output)
        return prefill, time.perf_counter() - start, logits

    def measure(self, budget):
        """({phase: [seconds with ssmk, without]}, largest difference of the logits, relative)"""
        times, logits = ([], []), [None, None]

        def take(with_ssmk):
            if with_ssmk:
                *seconds, logits[0] = self.turn()
            else:
                with self.hook.disabled():
                    *seconds, logits[1] = self.turn()
            return seconds

        with self.torch.no_grad():
            take(True), take(False)  # memory from the system, compiled primitives
            start = time.perf_counter()
            while len(times[0]) < ROUNDS or time.perf_counter() - start < budget:
                times[0].append(take(True))
                times[1].append(take(False))
        ours, theirs = (t.double() for t in logits)
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        medians = [[statistics.median(column) for column in zip(*side)] for side in times]
        return dict(zip(("prefill", "decode"), zip(*medians))), difference


def measure(name, batch=1, prompt=512, tokens=32, dtype="float32", budget=20.0):
    """The figures of one model."""
    model = Model(name, batch, prompt, tokens, dtype)
    millions = sum(p.numel() for p in model.model.parameters()) / 1e6
    seconds, difference = model.measure(budget)
    if dtype == "float32" and difference > AGREEMENT:
        raise method.Wrong(f"logits differ by {difference:.2g} of the largest")
    what = f"{millions:.0f} M parameters, {dtype}, logits differ by {difference:.1e} of the largest"
    default = (batch, prompt, dtype) == (1, 512, "float32")
    for phase, (ours, theirs) in seconds.items():
        length = f"{prompt} tokens" if phase == "prefill" else f"{tokens} behind {prompt}"
        title = f"{name}, {phase}, batch {batch}, {length}"
        amount = batch * (prompt if phase == "prefill" else tokens)
        goal = GOALS.get(name, {}).get(phase) if default else None
        yield _figure(title, amount / ours, "tokens/s", what)
        yield _figure(
            f"{title}: as fast as without ssmk", theirs / ours, "x",
            f"without: {amount / theirs:.4g} tokens/s", goal=goal)  # fmt: skip


def _figure(name, value, unit, detail, **more):
    better = {"better": "higher"}
    return {
        "family": "models", "name": name, "value": value, "unit": unit, "detail": detail, **better,
        **more}  # fmt: skip
