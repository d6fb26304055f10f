"""The systems beside LongNet: each module equals its definition in float64, each system is causal, equally large, and
goes on from its state as if it had read the text at once."""

import math
import re
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from examples.evidence import neighbours
from examples.evidence.neighbours.attention_patterns import Fixed, GlobalTokens, RandomBlocks, SlidingWindow, Strided
from examples.evidence.neighbours.backbone import (
    Backbone,
    CausalConvolution,
    ModelShape,
    rotate,
    split_heads,
    state_bytes,
)
from examples.evidence.neighbours.gated_attention import FlashUnit
from examples.evidence.neighbours.linear_attention import CosFormerAttention
from examples.evidence.neighbours.lru import LinearRecurrentUnit
from examples.evidence.neighbours.lsh_attention import SELF_PENALTY, LSHAttention
from examples.evidence.neighbours.memorizing import MemorizingAttention
from examples.evidence.neighbours.pattern_attention import PatternAttention, pattern_attention
from examples.evidence.neighbours.recurrence import linear_recurrence
from examples.evidence.neighbours.rg_lru import HawkMixer
from examples.evidence.neighbours.s4d import S4D
from examples.evidence.neighbours.strided_attention import StridedAttention
from examples.evidence.neighbours.systems import REFERENCE, SYSTEMS, build_system
from examples.evidence.neighbours.transformers_models import _scan_states, chunked_selective_scan, chunked_wkv


LENGTHS = 1, 2, 7, 40, 53
SHAPE = ModelShape(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, window=8, max_length=256)


def random(*shape, **kwargs):
    return torch.randn(*shape, dtype=torch.float64, **kwargs)


def assert_equal_with_gradients(fast, naive, leaves):
    """Same outputs and same gradients of a random projection of them, to 1e-10 of the largest entry."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    results = []
    for function in (fast, naive):
        output = function()
        weights = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)
        results.append([output, *gradients])
    for got, wanted in zip(*results):
        if wanted is None:
            assert got is None or not got.any()
            continue
        got = torch.zeros_like(wanted) if got is None else got
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * max(1.0, wanted.abs().max().item()))


def assert_module_equals(module, naive, length, hidden_size=16, batch=2):
    """A mixer against `naive(inputs [B, N, E]) -> [B, N, E]`, in all inputs and parameters."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)
    inputs = random(batch, length, hidden_size)
    assert_equal_with_gradients(lambda: module(inputs)[0], lambda: naive(inputs), [inputs, *module.parameters()])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("with_initial", [False, True], ids=["from zero", "continued"])
def test_scan_equals_the_loop(length, dtype, with_initial):
    decay, inputs = torch.randn(2, 3, length, 5, dtype=dtype).unbind()
    decay = decay / (1 + decay.abs())
    initial = torch.randn(3, 5, dtype=dtype) if with_initial else None

    def loop():
        state, states = torch.zeros(3, 5, dtype=dtype) if initial is None else initial, []
        for t in range(length):
            state = decay[:, t] * state + inputs[:, t]
            states.append(state)
        return as_real(torch.stack(states, 1))

    def as_real(states):
        return torch.view_as_real(states) if states.is_complex() else states

    leaves = [decay, inputs] + ([initial] if with_initial else [])
    assert_equal_with_gradients(lambda: as_real(linear_recurrence(decay, inputs, initial)), loop, leaves)


def dense_attention(query, key, value, visible):
    """By the definition: `visible(head, i, j)` for every pair."""
    heads, length = query.shape[1:3]
    mask = torch.tensor([[[visible(h, i, j) for j in range(length)] for i in range(length)] for h in range(heads)])
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value


RANDOM = RandomBlocks(block=4, count=2, num_heads=4, seed=3)
PATTERNS = {
    "window": (SlidingWindow(5), lambda h, i, j: 0 <= i - j < 5),
    "dilated heads": (
        SlidingWindow(5, [1, 1, 2, 3]),
        lambda h, i, j: 0 <= i - j < 5 * [1, 1, 2, 3][h] and (i - j) % [1, 1, 2, 3][h] == 0,
    ),
    "strided": (Strided(6), lambda h, i, j: 0 <= i - j and (i - j < 6 or (i - j) % 6 == 0)),
    "fixed": (Fixed(6, 2), lambda h, i, j: j <= i and (i // 6 == j // 6 or j % 6 >= 4)),
    "BigBird": (
        SlidingWindow(6) + GlobalTokens(4) + RANDOM,
        lambda h, i, j: j <= i and (i - j < 6 or j < 4 or j // 4 in RANDOM.blocks(i // 4)[h].tolist()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_equal_masked_attention(name, length):
    pattern, visible = PATTERNS[name]
    query, key, value = random(3, 2, 4, length, 8).unbind()
    assert_equal_with_gradients(
        lambda: pattern_attention(query, key, value, pattern),
        lambda: dense_attention(query, key, value, visible),
        [query, key, value],
    )


def test_random_blocks_are_earlier_distinct_and_differ_between_heads():
    drawn = RandomBlocks(block=4, count=3, num_heads=4).blocks(20)
    assert all(len(set(row)) == 3 and 0 <= min(row) and max(row) < 20 for row in drawn.tolist())
    assert len({tuple(row) for row in drawn.tolist()}) > 1


def naive_pattern_mixer(module, visible):
    def naive(inputs):
        query, key, value = (split_heads(t, 4) for t in module.qkv_proj(inputs).chunk(3, -1))
        at = torch.arange(inputs.shape[1])
        attended = dense_attention(rotate(query, at), rotate(key, at), value, visible)
        return module.o_proj(attended.transpose(1, 2).flatten(2))

    return naive


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["strided", "fixed"])
def test_sparse_transformer_equals_its_definition(name, length):
    pattern, visible = PATTERNS[name]
    module = StridedAttention(16, 4, 6) if name == "strided" else PatternAttention(16, 4, pattern)
    assert_module_equals(module, naive_pattern_mixer(module, visible), length)


@pytest.mark.parametrize("length", LENGTHS)
def test_reformer_reads_the_last_of_its_bucket(length):
    module, chunk = LSHAttention(16, 4, chunk=4, num_rounds=2, num_buckets=4), 4

    def naive(inputs):
        query, value = split_heads(module.query_proj(inputs), 4), split_heads(module.value_proj(inputs), 4)
        key = query / query.norm(dim=-1, keepdim=True)
        outputs = torch.zeros_like(value)
        buckets = module.buckets(query)
        for b in range(2):
            for h in range(4):
                for i in range(length):
                    scores, values = [], []
                    for r in range(2):  # a key that both rounds show counts twice
                        same = [j for j in range(i + 1) if buckets[b, h, j, r] == buckets[b, h, i, r]]
                        for j in same[-chunk:]:
                            penalty = SELF_PENALTY if j == i else 0.0
                            scores.append(query[b, h, i] @ key[b, h, j] / 2 + penalty)
                            values.append(value[b, h, j])
                    outputs[b, h, i] = torch.stack(scores).softmax(0) @ torch.stack(values)
        return module.o_proj(outputs.transpose(1, 2).flatten(2))

    assert_module_equals(module, naive, length)


@pytest.mark.parametrize("length", [*LENGTHS, 300])
def test_cosformer_equals_its_quadratic_form(length):
    module = CosFormerAttention(16, 4, max_length=512)

    def naive(inputs):
        query, key, value = (split_heads(t, 4) for t in module.qkv_proj(inputs).chunk(3, -1))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        weights = query.relu() @ key.relu().mT * torch.cos(math.pi / 2 * distance.double() / 512)
        weights = weights * (distance >= 0)
        attended = weights @ value / weights.sum(-1, keepdim=True).clamp_min(1e-6)
        return module.o_proj(attended.transpose(1, 2).flatten(2))

    assert_module_equals(module, naive, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_flash_equals_its_equations(length):
    module, group = FlashUnit(16, group=8, expanded_size=24, query_size=12), 8
    with torch.no_grad():
        module.distance_bias.normal_()
        module.queries_and_keys.scale.normal_()

    def naive(inputs):
        gate, value, shared = (
            torch.nn.functional.silu(proj(inputs)) for proj in (module.gate_proj, module.value_proj, module.shared_proj)
        )
        scale, offset = module.queries_and_keys.scale, module.queries_and_keys.offset
        query, key, far_query, far_key = (shared * scale[i] + offset[i] for i in range(4))
        rows = []
        for i in range(length):
            total = 0
            for j in range(i + 1):
                if i // group == j // group:
                    score = (query[:, i] * key[:, j]).sum(-1) / group + module.distance_bias[i - j]
                    total = total + score.relu().square()[:, None] * value[:, j]
                else:
                    total = total + (far_query[:, i] * far_key[:, j]).sum(-1)[:, None] / group * value[:, j]
            rows.append(total)
        return module.out_proj(gate * torch.stack(rows, 1))

    assert_module_equals(module, naive, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_hawk_equals_its_recurrence(length):
    module = HawkMixer(16, 2, width=20)

    def gate_of(linear, x):
        return torch.cat([x[:, :10] @ linear.weight[0], x[:, 10:] @ linear.weight[1]], -1) + linear.bias

    def naive(inputs):
        drawn, unit = module.in_proj(inputs), module.recurrence
        state, rows = 0, []
        for t in range(length):
            taps = [drawn[:, t - k] * module.convolution.weight[:, 0, 3 - k] for k in range(4) if t >= k]
            x = sum(taps) + module.convolution.bias
            r, i = gate_of(unit.recurrence_gate, x).sigmoid(), gate_of(unit.input_gate, x).sigmoid()
            a = torch.exp(-8 * r * torch.log1p(unit.decay_parameter.exp()))
            state = a * state + (1 - a**2).sqrt() * (i * x)
            rows.append(state)
        gate = torch.nn.functional.gelu(module.gate_proj(inputs), approximate="tanh")
        return module.out_proj(torch.stack(rows, 1) * gate)

    assert_module_equals(module, naive, length)


def test_hawk_starts_with_the_decays_of_the_paper():
    decay = torch.exp(-8 * torch.nn.functional.softplus(HawkMixer(64, 4).recurrence.decay_parameter))
    assert 0.9 <= decay.min() < 0.92 and 0.98 < decay.max() <= 0.9991


@pytest.mark.parametrize("length", LENGTHS)
def test_lru_equals_its_recurrence(length):
    module = LinearRecurrentUnit(16, 12)

    def naive(inputs):
        size = torch.exp(-module.log_decay.exp())
        decay = torch.polar(size, module.log_phase.exp())
        into = torch.view_as_complex(module.input_matrix) * module.log_scale.exp()[:, None]
        out = torch.view_as_complex(module.output_matrix)
        state, rows = torch.zeros(2, 12, dtype=torch.complex128), []
        for t in range(length):
            state = decay * state + torch.einsum("se,be->bs", into, inputs[:, t].to(into.dtype))
            rows.append(torch.einsum("es,bs->be", out, state).real + module.skip * inputs[:, t])
        return torch.stack(rows, 1)

    assert_module_equals(module, naive, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_s4d_convolution_equals_its_recurrence(length):
    module = S4D(16, state_size=6)

    def naive(inputs):
        rate = torch.complex(-module.log_decay.exp(), module.frequency)
        decay = torch.exp(rate * module.log_step.exp()[:, None])
        out = torch.view_as_complex(module.output_matrix) * (decay - 1) / rate
        state, rows = torch.zeros(2, 16, 6, dtype=torch.complex128), []
        for t in range(length):
            state = decay * state + inputs[:, t, :, None]
            rows.append(2 * (out * state).sum(-1).real + module.skip * inputs[:, t])
        return torch.stack(rows, 1)

    assert_module_equals(module, naive, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_memorizing_transformer_equals_its_definition(length):
    module, segment, top_k, window = MemorizingAttention(16, 4, window=6, segment=8, top_k=3), 8, 3, 6
    with torch.no_grad():
        module.gate.normal_()

    def naive(inputs):
        query, key, value = (split_heads(t, 4) for t in module.qkv_proj(inputs).chunk(3, -1))
        query = query / query.norm(dim=-1, keepdim=True) * module.log_temperature.exp()[:, None, None]
        key = key / key.norm(dim=-1, keepdim=True)
        at = torch.arange(length)
        near = dense_attention(2 * rotate(query, at), rotate(key, at), value, lambda h, i, j: 0 <= i - j < window)
        rows = []
        for i in range(length):
            memory, row = i // segment * segment, near[:, :, i]
            if memory:
                scores = torch.einsum("bhd,bhmd->bhm", query[:, :, i], key[:, :, :memory].detach())
                least = scores.sort(-1, descending=True).values[..., min(top_k, memory) - 1, None]
                far = scores.masked_fill(scores < least, float("-inf")).softmax(-1)
                far = torch.einsum("bhm,bhmd->bhd", far, value[:, :, :memory].detach())
                gate = module.gate.sigmoid()[:, None]
                row = gate * far + (1 - gate) * row
            rows.append(row)
        return module.o_proj(torch.stack(rows, 1).flatten(2))

    assert_module_equals(module, naive, length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_state", [False, True], ids=["from zero", "continued"])
def test_rwkv_scan_equals_its_recurrence(length, with_state):
    decay, first = random(5), random(5)
    key, value = random(2, 2, length, 5).unbind()
    state = [random(2, 5).exp(), random(2, 5).exp(), random(2, 5)] if with_state else None

    def naive():
        numerator = denominator = 0
        if with_state:
            numerator, denominator = (state[i] * state[2].exp() for i in (0, 1))
        rows = []
        for t in range(length):
            bonus, weight = (first + key[:, t]).exp(), key[:, t].exp()
            rows.append((numerator + bonus * value[:, t]) / (denominator + bonus))
            numerator = (-decay.exp()).exp() * numerator + weight * value[:, t]
            denominator = (-decay.exp()).exp() * denominator + weight
        return torch.stack(rows, 1)

    leaves = [decay, first, key, value]
    assert_equal_with_gradients(lambda: chunked_wkv(decay, first, key, value, state)[0], naive, leaves)


def test_rwkv_scan_takes_large_keys():
    key = torch.tensor([-200.0, 0.0, 80.0, 300.0]).view(1, 4, 1)
    output, _ = chunked_wkv(torch.zeros(1), torch.zeros(1), key, torch.arange(4.0).view(1, 4, 1))
    assert output.isfinite().all() and output[0, -1, 0] == 3


@pytest.mark.parametrize("length", LENGTHS)
def test_mamba_scan_equals_its_recurrence(length):
    hidden, step, gate = random(3, 2, 5, length).unbind()
    into, out = random(2, 2, 3, length).unbind()
    rate, skip, bias = -random(5, 3).exp(), random(5), random(5)
    leaves = [hidden, step, gate, into, out, skip, bias]
    leaves.append(rate)

    def fast():
        return chunked_selective_scan(hidden, step, rate, into, out, skip, gate, bias, delta_softplus=True)

    def naive():
        delta = torch.log1p((step + bias[:, None]).exp())
        state, rows = 0, []
        for t in range(length):
            decay = (rate * delta[:, :, t, None]).exp()
            state = decay * state + delta[:, :, t, None] * into[:, None, :, t] * hidden[:, :, t, None]
            rows.append((state * out[:, None, :, t]).sum(-1) + skip * hidden[:, :, t])
        return torch.stack(rows, -1) * torch.nn.functional.silu(gate)

    assert_equal_with_gradients(fast, naive, leaves)


def test_mamba_scan_in_pieces_equals_the_whole(monkeypatch):
    hidden, step = torch.randn(2, 1, 3, 5000).unbind()
    into, out = torch.randn(2, 1, 4, 5000).unbind()
    arguments = hidden, step, -torch.rand(3, 4), into, out
    whole, last = chunked_selective_scan(*arguments, delta_softplus=True, return_last_state=True)
    with torch.no_grad():
        pieces, end = chunked_selective_scan(*arguments, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-5)


def test_griffin_scan_equals_its_loop():
    inputs, gate = random(2, 2, 21, 5).unbind()
    gate, state = gate.sigmoid(), random(2, 5)
    reset = torch.zeros(2, 21, 1, dtype=torch.bool)
    reset[:, 9] = True
    states, last = _scan_states(None, inputs, gate, reset, state, torch.float64)
    for t in range(21):
        state = (0 if t == 9 else gate[:, t]) * state + inputs[:, t]
        torch.testing.assert_close(states[:, t], state, rtol=0, atol=1e-12)
    assert last.equal(states[:, -1])


def test_convolution_is_causal_and_continues():
    convolution, inputs = CausalConvolution(6, 4).double(), random(2, 11, 6)
    whole, _ = convolution(inputs)
    wanted = sum(
        torch.nn.functional.pad(inputs, (0, 0, k, 0))[:, :11] * convolution.weight[:, 0, 3 - k] for k in range(4)
    )
    torch.testing.assert_close(whole, wanted + convolution.bias, rtol=0, atol=1e-12)
    first, state = convolution(inputs[:, :5])
    second, _ = convolution(inputs[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)


def lively(name):
    """A system whose outputs depend on all that it read: larger weights, in float64."""
    system = build_system(name, SHAPE).double().eval()
    with torch.no_grad():
        for parameter in system.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    return system


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_are_causal_and_continue_from_their_state(name):
    if name == "Griffin" and version("transformers").startswith("5.20."):
        pytest.skip("RecurrentGemma of Transformers 5.20 does not go on from its cache")
    system = lively(name)
    tokens = torch.randint(SHAPE.vocab_size, (1, 90))
    changed = tokens.clone()
    changed[:, 60] = (changed[:, 60] + 1) % SHAPE.vocab_size
    with torch.no_grad():
        whole, _ = system(tokens)
        other, _ = system(changed)
        outputs, state = system(tokens[:, :71], keep_state=True)
        outputs = [outputs]
        for t in range(71, 90):
            output, state = system(tokens[:, t : t + 1], state, keep_state=True)
            outputs.append(output)
    size = whole.abs().max()
    assert size > 0.1
    assert (whole - other)[:, :60].abs().max() < 1e-9 * size
    assert (whole - other)[:, 60:].abs().amax(-1).min(1).values > 0  # every later token feels it, if only a little
    tolerance = 1e-9 if SYSTEMS[name].origin == "own module" else 2e-5  # Transformers keeps states in float32
    assert (torch.cat(outputs, 1) - whole).abs().max() < tolerance * size
    assert state_bytes(state) > 0


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_are_equally_large_and_learn(name):
    system = build_system(name, SHAPE).train()
    wanted = build_system(REFERENCE, SHAPE).num_inner_parameters()
    assert abs(system.num_inner_parameters() / wanted - 1) < 0.05
    tokens = torch.randint(SHAPE.vocab_size, (2, 33))
    optimizer = torch.optim.AdamW(system.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        scores, _ = system(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        missing = [name for name, p in system.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_states_of_bounded_systems_do_not_grow():
    def after(name, length):
        system = build_system(name, SHAPE).eval()
        with torch.no_grad():
            _, state = system(torch.zeros(1, length, dtype=torch.long), keep_state=True)
        return state_bytes(state)

    for name in (
        "LongNet",
        "sliding window",
        "Longformer",
        "cosFormer",
        "RWKV-4",
        "LRU",
        "S4D",
        "Mamba",
        "Mamba-2",
        "Hawk",
    ):
        assert after(name, 1024) <= 1.6 * after(name, 512), name
    assert after(REFERENCE, 512) == 2 * after(REFERENCE, 256) == 2 * 2 * 512 * SHAPE.hidden_size * 4  # layers, k and v
    assert after("LongMem", 512) > 2 * 512 * SHAPE.hidden_size * 4  # all keys and values of one layer, and their index


def test_an_attached_memory_reads_but_does_not_train():
    system = lively("LongMem")
    tokens = torch.randint(SHAPE.vocab_size, (1, 200))
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % SHAPE.vocab_size
    for mode in (False, True, False):
        system.train(mode)
        with torch.no_grad():
            felt = (system(tokens)[0] - system(changed)[0])[:, -1].abs().max() > 1e-9
        assert felt != mode  # behind two windows of 32 tokens


def test_unknown_systems_are_refused():
    with pytest.raises(ValueError, match="got 'GPT-5'"):
        build_system("GPT-5", SHAPE)


def test_states_are_not_kept_while_training():
    with pytest.raises(ValueError, match="keep_state"):
        build_system("Hawk", SHAPE)(torch.zeros(1, 4, dtype=torch.long), keep_state=True)


def test_the_readme_s_example_is_a_mixer():
    text = (Path(neighbours.__path__[0]) / "README.md").read_text()
    code = textwrap.dedent("   " + re.search(r"```python\n   (.*?)```", text, re.DOTALL).group(1))
    names = {"nn": torch.nn, "torch": torch}
    exec(code, names)
    system = Backbone(SHAPE, lambda layer: names["RunningMean"](), 8).eval()
    tokens = torch.randint(SHAPE.vocab_size, (1, 20))
    with torch.no_grad():
        whole, _ = system(tokens)
        first, state = system(tokens[:, :12], keep_state=True)
        rest, _ = system(tokens[:, 12:], state, keep_state=True)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_s4d_continues_in_pieces_of_any_length():
    module, inputs = S4D(4, state_size=3).double(), random(1, 1300, 4)
    whole, _ = module(inputs)
    outputs, state = [], None
    for part in inputs.split([1100, 1, 199], 1):
        output, state = module(part, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-10)
