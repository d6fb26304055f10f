"""The bounded cache: cached decode = full forward, chunked = whole, in memory that does not grow."""

import itertools
import random
from functools import partial

import pytest
import torch
from tiny_models import VARIANTS, tiny_config
from transformers import (
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_longnet import LongNetForCausalLM, dilated_attention
from modeling_longnet.dilated_attention_reference import dilated_attention_reference
from modeling_longnet.dilated_cache import DilatedCache
from modeling_longnet.dilated_cache_layout import SlotLayout
from modeling_longnet.dilation_schedule import DilationSchedule, Heads
from modeling_longnet.patching import patch_model, unpatch_model
from modeling_longnet.transformers_compat import CACHE, named_cache


WIDTH = 4
SCHEDULES = {
    "paper": DilationSchedule((8, 16, 32), (1, 2, 4)),
    "once-sinks": DilationSchedule((8, 16, 32), (1, 2, 4), overlap="once", num_sink_tokens=3),
    "contiguous": DilationSchedule((6, 12), (1, 3), head_offsets="contiguous", num_sink_tokens=1),
    "ragged-once": DilationSchedule((5, 7, 11), (1, 2, 3), overlap="once"),
    "unread": DilationSchedule((6, 11), (2, 5), overlap="count"),
    "sliding": DilationSchedule((8, 16), (1, 2), local="sliding", num_sink_tokens=2, overlap="once"),
    "sliding-odd": DilationSchedule((7, 10, 21), (1, 1, 4), local="sliding"),
}


def one_layer(schedule: DilationSchedule, num_heads: int, num_kv_heads: int, max_length: int | None = None):
    """What a model of one layer asks of its cache."""
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=num_heads, num_attention_heads=num_heads, num_key_value_heads=num_kv_heads
    )
    config.dilated_attention = {"layers": [0], **schedule.as_arguments()}
    return partial(DilatedCache(config, max_length).attend, 0, config=config)


def worst_error(schedule, num_heads, num_kv_heads, length, chunks, pads, max_length=None) -> float:
    """Against the definition in float64, of one layer that reads random tokens chunk by chunk."""
    batch = len(pads)
    query = torch.randn(batch, num_heads, length, WIDTH)
    key, value = torch.randn(2, batch, num_kv_heads, length, WIDTH)
    ids = torch.zeros(batch, length, dtype=torch.long)
    for row, pad in enumerate(pads):
        ids[row, :pad] = -1
    expected = dilated_attention_reference(
        query.double(), key.double(), value.double(), document_ids=ids, **schedule.as_arguments()
    )
    attend = one_layer(schedule, num_heads, num_kv_heads, max_length)
    outs, start, scale = [], 0, WIDTH**-0.5
    with torch.no_grad():
        for size in chunks:
            part = slice(start, min(start + size, length))
            start = part.stop
            if part.start < length:
                given = ids[:, part] if any(pads) else None
                q, k, v = (x[:, :, part] for x in (query, key, value))
                outs.append(attend(q, k, v, given, scale=scale))
    return (torch.cat(outs, dim=2) - expected).abs().max().item()


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_cached_decode_is_full_forward(name, heads):
    schedule = SCHEDULES[name]
    length = 3 * max(schedule.segment_lengths) + 2
    assert worst_error(schedule, *heads, length, [1] * length, [0, 3]) < 1e-5


@pytest.mark.parametrize("name", SCHEDULES)
def test_chunked_is_whole_for_random_chunks(name):
    schedule = SCHEDULES[name]
    length = 3 * max(schedule.segment_lengths) + 2
    for seed in range(6):
        chosen = random.Random(seed)
        chunks = [chosen.choice([1, 1, 2, 3, 7, 13, 40]) for _ in range(length)]
        pads = chosen.choice([[0], [0, 0], [0, 3, 17], [5, 0]])
        assert worst_error(schedule, 6, 2, length, chunks, pads, chosen.choice([None, 1, 20])) < 1e-5


def random_case(chosen: random.Random):
    count = chosen.choice([1, 2, 3])
    segments = sorted(chosen.choices(range(3, 25), k=count))
    rates = sorted(chosen.choices([1, 1, 2, 3, 4, 5], k=count))
    rates = [min(r, w) for w, r in zip(segments, rates)]
    local = chosen.choice(["segment", "sliding"])
    rates[0] = 1 if local == "sliding" else rates[0]
    schedule = DilationSchedule(
        tuple(segments), tuple(rates), True, chosen.choice(["modulo", "contiguous"]), chosen.choice(["count", "once"]),
        chosen.choice([0, 0, 1, 5]), "mask", local,
    )  # fmt: skip
    groups = chosen.choice([1, 2, 3, 4])
    length = 3 * segments[-1] + 5
    chunks = chosen.choice([[1] * length, chosen.choices([1, 1, 2, 5, 13, 30], k=length)])
    pads = chosen.choice([[0], [0, 3, 7], [5, 0]])
    return schedule, groups * chosen.choice([1, 2, 3, 4]), groups, length, chunks, pads


def test_random_schedules_heads_and_chunks():
    for seed in range(40):
        case = random_case(random.Random(seed))
        assert worst_error(*case) < 1e-5, case


def slots_of_pieces(layout: SlotLayout, position: int) -> list[list[int]]:
    """The slots that each query head reads."""
    slots = [[] for _ in range(layout.heads.num_heads)]
    for piece in layout.token_pieces(position):
        for unit, member, row in itertools.product(range(piece.units), range(piece.members), range(piece.count)):
            head = piece.head + unit * piece.head_step + member * piece.member_step
            assert piece.kv + unit * piece.kv_step == head // layout.heads.per_group
            slots[head].append(piece.start + unit * piece.start_step + row * piece.step)
    return slots


def test_a_token_reads_the_slots_that_a_mask_would_show_it():
    """Sink tokens of the first segment, which stand in two places, may be read in either."""
    for seed in range(30):
        schedule, heads, groups, length, *_ = random_case(random.Random(seed))
        layout = SlotLayout(schedule, Heads(heads, groups))
        sinks = first = schedule.num_sink_tokens  # pattern 0 stands behind them
        for position in range(0, length, 3):
            live = layout.live(torch.tensor([position]), layout.tables(torch.device("cpu")))[0]
            for shown, read in zip(live, slots_of_pieces(layout, position)):
                doubled = position < schedule.segment_lengths[0] and schedule.dilation_rates[0] == 1
                read = [slot - first if doubled and first <= slot < first + sinks else slot for slot in read]
                assert sorted(read) == shown.nonzero()[:, 0].tolist(), (seed, position)


def test_a_token_over_plain_keys_is_the_definition():
    for seed in range(30):
        schedule, heads, groups, length, *_ = random_case(random.Random(seed))
        query, (key, value) = torch.randn(2, heads, 1, WIDTH), torch.randn(2, 2, groups, length, WIDTH)
        ids = torch.zeros(2, length, dtype=torch.long)
        ids[0, : seed % 7] = -1
        arguments = {"query_offset": length - 1 - seed % 3, **schedule.as_arguments()}
        for document_ids in (ids, None):
            wanted = dilated_attention_reference(
                query.double(), key.double(), value.double(), document_ids=document_ids, **arguments
            )
            found = dilated_attention(query, key, value, document_ids=document_ids, **arguments)
            torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=0)


def patched(model, **options):
    options = {"segment_lengths": [8, 16, 24], "dilation_rates": [1, 2, 3]} | options
    model.generation_config.eos_token_id = None
    return patch_model(model.eval(), **options)


SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "max_position_embeddings": 512, "pad_token_id": 0}  # fmt: skip
MODELS = {
    "llama": lambda: patched(LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))),
    "llama-some-layers": lambda: patched(LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4)), layers=[1]),
    "qwen3-sliding": lambda: patched(
        Qwen3ForCausalLM(Qwen3Config(**SIZES, num_attention_heads=6, num_key_value_heads=2, head_dim=8)),
        local="sliding",
    ),
    "gpt2": lambda: patched(
        GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1)),
        overlap="count", num_sink_tokens=0,
    ),
    "gemma3-hybrid": lambda: patched(
        Gemma3ForCausalLM(
            Gemma3TextConfig(
                **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=6,
                layer_types=["sliding_attention", "full_attention", "full_attention"],
            )
        )
    ),
    **{
        f"longnet-{name}": lambda fields=fields: LongNetForCausalLM(tiny_config(**fields)).eval()
        for name, fields in VARIANTS.items()
    },
}  # fmt: skip


@pytest.fixture(params=MODELS)
def model(request):
    model = MODELS[request.param]()
    model.generation_config.pad_token_id = 0
    return model


def tokens(batch: int = 2, length: int = 80) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length))


@torch.no_grad()
def read(model, text, sizes, cache=None):
    cache = DilatedCache(model.config) if cache is None else cache
    return torch.cat([model(part, **named_cache(cache)).logits for part in text.split(sizes, 1)], 1)


@torch.no_grad()
def test_model_reads_in_chunks_as_it_reads_the_whole(model):
    text = tokens()
    whole = model(text, use_cache=False).logits
    for sizes in (1, [5, 1, 20, 1, 1, 30, 22]):
        torch.testing.assert_close(read(model, text, sizes), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2},
                                     {"prefill_chunk_size": 7}], ids=str)  # fmt: skip
def test_generate_gives_the_tokens_of_the_plain_cache(model, options):
    text = tokens(length=30)
    mask = torch.ones_like(text)
    mask[0, :11] = 0
    common = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    bounded = model.generate(text, **common, **options)
    plain = model.generate(text, cache_implementation="dynamic", **common, **options)
    assert type(bounded[CACHE]) is DilatedCache and type(plain[CACHE]) is DynamicCache
    assert torch.equal(bounded.sequences, plain.sequences)


def test_left_padding_invariance(model):
    text = tokens(1, 25)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), text], 1)
    mask = (padded > 0).long()
    alone = model.generate(text, max_new_tokens=20, do_sample=False)[:, 25:]
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, 34:], alone)


@torch.no_grad()
def test_right_padding_invariance():
    model, text = longnet(), tokens(1, 25)
    model.generation_config.pad_token_id = 0
    padded = torch.cat([text, torch.zeros(1, 9, dtype=torch.long)], 1)
    mask = (padded > 0).long()
    alone = model.generate(text, max_new_tokens=2, do_sample=False)
    cache = DilatedCache(model.config)
    new = model(padded, attention_mask=mask, **named_cache(cache)).logits[:, 24].argmax(-1)
    assert new == alone[0, 25]
    more = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
    after = model(new[None], attention_mask=more, **named_cache(cache)).logits[:, -1].argmax(-1)
    assert after == alone[0, 26]


def test_assisted_decoding_is_greedy_decoding(model):
    model.generation_config.pad_token_id = None  # an untrained model may write it, and `generate` takes it for padding
    text = tokens(1, 10).repeat(1, 3)
    greedy = model.generate(text, max_new_tokens=30, do_sample=False)
    looked_up = model.generate(text, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4)
    assisted = model.generate(text, max_new_tokens=30, do_sample=False, assistant_model=model)
    assert torch.equal(looked_up, greedy) and torch.equal(assisted, greedy)


@pytest.mark.parametrize("name", ["llama", "gpt2", "longnet-rope-grouped"])
def test_a_padding_token_that_is_drafted_is_text(name):
    model, text = MODELS[name](), tokens(1, 10)
    greedy = model.generate(text, max_new_tokens=30, do_sample=False)
    # A token of the answer stands for padding now: `generate` infers an assistant's mask from it.
    model.generation_config.pad_token_id = next(int(token) for token in greedy[0, 14:] if token not in text)
    assisted = model.generate(text, max_new_tokens=30, do_sample=False, assistant_model=model)
    assert torch.equal(assisted, greedy)


def test_a_returned_cache_goes_on(model):
    text = tokens(1, 20)
    once = model.generate(text, max_new_tokens=60, do_sample=False)
    first = model.generate(text, max_new_tokens=7, do_sample=False, return_dict_in_generate=True)
    second = model.generate(first.sequences, **named_cache(first[CACHE]), max_new_tokens=53, do_sample=False)
    assert torch.equal(second, once)


def test_a_cache_that_went_on_is_that_of_one_run():
    model, text, options = longnet(), tokens(2, 7), {"do_sample": False, "return_dict_in_generate": True}
    once = model.generate(text, max_new_tokens=4, **options)[CACHE]
    first = model.generate(text, max_new_tokens=3, **options)
    model.generate(first.sequences, **named_cache(first[CACHE]), max_new_tokens=1, **options)
    for layer, expected in zip(first[CACHE].layers, once.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, atol=1e-6, rtol=0)
        torch.testing.assert_close(layer.values, expected.values, atol=1e-6, rtol=0)


def test_only_a_cache_that_cannot_grow_is_compiled_unasked():
    """As with Transformers' own default: `generate` makes a dynamic cache, and leaves those as they are."""
    model = longnet()
    made = model.generate(tokens(1, 7), max_new_tokens=3, return_dict_in_generate=True)[CACHE]
    assert isinstance(made, DilatedCache) and isinstance(made, DynamicCache) and not made.is_compileable
    assert DilatedCache(model.config).is_compileable


def longnet(**fields):
    return LongNetForCausalLM(tiny_config(**fields)).eval()


def test_crop_forgets_exactly():
    model, text = longnet(overlap="once", num_sink_tokens=2), tokens(2, 70)
    whole = read(model, text, 70)
    cache = DilatedCache(model.config)
    read(model, text[:, :33], [20, 13], cache)
    cache.activate_past_recording()
    for start in (33, 40, 47):
        read(model, torch.cat([text[:, start : start + 7], tokens(2, 6)], 1), [9, 1, 3], cache)
        cache.crop(-6)
        assert cache.get_seq_length() == start + 7
    torch.testing.assert_close(read(model, text[:, 54:], [1, 15], cache), whole[:, 54:], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="`tokens_to_remove`.*recorded"):
        cache.crop(-17)
    with pytest.raises(ValueError, match="must be negative"):
        cache.crop(3)


def test_rows_are_reordered_repeated_and_selected():
    model, text = longnet(), tokens(3, 50)
    whole = read(model, text, 50)
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ):
        cache = DilatedCache(model.config)
        read(model, text[:, :35], [35], cache)
        change(cache)
        torch.testing.assert_close(read(model, text[rows, 35:], 1, cache), whole[rows, 35:], atol=1e-5, rtol=0)


def test_layers_share_what_a_step_computes(monkeypatch):
    model, text, calls = longnet(num_hidden_layers=3), tokens(1, 40), []
    plan = SlotLayout.token_pieces
    monkeypatch.setattr(SlotLayout, "token_pieces", lambda *given: calls.append(1) or plan(*given))
    cache = DilatedCache(model.config, max_length=4)
    read(model, text, [20] + [1] * 20, cache)
    assert len(calls) == 20


def test_reset_makes_a_new_cache():
    model, text = longnet(), tokens()
    cache = DilatedCache(model.config)
    first = read(model, text, [7, 73], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(read(model, text, [7, 73], cache), first)


def test_memory_does_not_grow_and_follows_the_formula():
    model = longnet(num_key_value_heads=2, num_sink_tokens=3, position_embedding_type="rope")
    cache = DilatedCache(model.config)
    assert cache.memory_footprint() == 0
    seen = set()
    for _ in range(4):
        read(model, tokens(2, 200), 100, cache)
        seen.add(cache.memory_footprint())
    # Two query heads share a key/value head: offsets 0 and 1 (or 2 and 3), so two classes where r > 1.
    slots = 3 + 8 + 2 * (16 // 2) + 2 * (32 // 4)
    assert seen == {2 * 2 * 2 * 2 * (slots // 8 * 8 + 8) * 8 * 4}


def test_a_short_generation_takes_only_what_it_needs():
    model = longnet(segment_lengths=[64, 256], dilation_rates=[1, 2])
    whole = DilatedCache(model.config)
    read(model, tokens(1, 4), 4, whole)
    short = model.generate(tokens(1, 4), max_new_tokens=3, return_dict_in_generate=True)[CACHE]
    assert 0 < short.memory_footprint() < whole.memory_footprint()


def test_positions_of_a_billion_are_exact():
    model, text = longnet(position_embedding_type="none"), tokens(1, 60)
    expected = read(model, text, 60)
    cache = DilatedCache(model.config)
    read(model, text[:, :32], 32, cache)
    shift = 32 * 10**8
    cache.positions.add_(shift)  # a multiple of every segment: the same phase, and no sink tokens
    cache.seen.add_(shift)
    torch.testing.assert_close(read(model, text[:, 32:], [1, 7, 1, 19], cache), expected[:, 32:], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 12])
def test_compiles_to_one_graph(size):
    model, text = longnet(overlap="once", num_sink_tokens=2, num_key_value_heads=2), tokens(2, 73)
    whole = model(text, use_cache=False).logits
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    cache = DilatedCache(model.config)
    outs = [model(text[:, :1], **named_cache(cache)).logits]
    outs += [compiled(input_ids=part, **named_cache(cache)).logits for part in text[:, 1:].split(size, 1)]
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=0)
    assert len(graphs) == 1 and cache.get_seq_length() == 73


@torch.no_grad()
def test_patched_decoding_compiles_to_one_graph():
    model, text = MODELS["llama"](), tokens(2, 60)
    whole = model(text, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache = DilatedCache(model.config)
    outs = [model(text[:, :9], **named_cache(cache)).logits]
    outs += [compiled(input_ids=part, **named_cache(cache)).logits for part in text[:, 9:].split(1, 1)]
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=0)


def test_gradient_of_a_chunk_is_that_of_the_whole_with_a_constant_past():
    schedule = SCHEDULES["once-sinks"]
    query, key, value = torch.randn(3, 1, 4, 60, WIDTH, dtype=torch.float64)
    for size in (1, 17):
        leaves = [x[:, :, 43 : 43 + size].clone().requires_grad_() for x in (query, key, value)]
        attend = one_layer(schedule, 4, 4)
        with torch.no_grad():
            attend(query[:, :, :43], key[:, :, :43], value[:, :, :43], scale=0.5)
        out = attend(*leaves, scale=0.5)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        joined = [torch.cat([x[:, :, :43], leaf], 2) for x, leaf in zip((query, key, value), leaves)]
        whole = dilated_attention_reference(*joined, scale=0.5, **schedule.as_arguments())[:, :, 43:]
        expected = torch.autograd.grad(whole.square().sum(), leaves)
        for got, wanted in zip(gradients, expected):
            torch.testing.assert_close(got, wanted)


def test_attention_weights_of_all_keys_come_from_the_plain_cache():
    model = longnet()
    model.set_attn_implementation("eager")
    out = model.generate(tokens(1, 20), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert type(out[CACHE]) is DynamicCache and out.attentions[-1][0].shape == (1, 4, 1, 21)


def test_attention_weights_that_a_bounded_cache_cannot_give_are_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr("modeling_longnet.dilated_cache.logger.warning_once", said.append)
    model = longnet()
    model.set_attn_implementation("eager")
    out = model(tokens(1, 9), **named_cache(DilatedCache(model.config)), output_attentions=True)
    assert out.attentions == () and "output_attentions" in said[0] and "DynamicCache" in said[0]


def test_unpatched_models_get_their_own_cache_back():
    model = MODELS["llama"]()
    unpatch_model(model)
    out = model.generate(tokens(1, 5), max_new_tokens=2, return_dict_in_generate=True)
    assert type(out[CACHE]) is DynamicCache


@torch.no_grad()
def test_refusals():
    model, text = longnet(), tokens()
    with pytest.raises(ValueError, match="is_causal=False"):
        DilatedCache(tiny_config(is_causal=False))
    with pytest.raises(ValueError, match="`config`.*LlamaConfig"):
        DilatedCache(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="`max_length`"):
        DilatedCache(model.config, max_length=0)
    cache = DilatedCache(model.config)
    read(model, text, 80, cache)
    with pytest.raises(ValueError, match="holds 2 rows, got a batch of 1"):
        model(text[:1], **named_cache(cache))
    cache.reset()
    read(model, text, 80, cache)
    with pytest.raises(ValueError, match="`position_ids` must go on"):
        model(text[:, :3], position_ids=torch.arange(3)[None], **named_cache(cache))
    with pytest.raises(ValueError, match="`position_ids`"):
        model(text[:, :3], position_ids=torch.tensor([[0, 0, 1]]), **named_cache(DilatedCache(model.config)))


both_models = pytest.mark.parametrize("make", [lambda: longnet(), lambda: MODELS["llama"]()], ids=["longnet", "llama"])


@torch.no_grad()
@both_models
def test_a_mask_tells_of_earlier_tokens_what_was_told_when_they_came(make):
    """A bounded cache cannot hide afterwards what it took for a token, the padding behind a finished answer say."""
    model, text, mask = make(), tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :6] = 0
    cache = DilatedCache(model.config)
    model(text[:, :20], attention_mask=mask[:, :20], **named_cache(cache))
    for hidden in (slice(14, 19), slice(0, 7), slice(0, 5)):
        other = torch.ones_like(mask)
        other[0, hidden] = 0
        with pytest.raises(ValueError, match="`attention_mask` has"):
            model(text[:, 20:], attention_mask=other, **named_cache(cache))
    for width in (19, 39, 41):
        with pytest.raises(ValueError, match="`attention_mask` must have shape"):
            model(text[:, 20:], attention_mask=torch.ones(2, width), **named_cache(cache))
    found = model(text[:, 20:], attention_mask=mask, **named_cache(cache)).logits
    torch.testing.assert_close(found[:1], model(text[:1, 6:]).logits[:, 14:], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1:], model(text[1:]).logits[:, 20:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_aborted_forward_of_a_hybrid_is_noticed():
    """The layers before the one that failed, which a patch has left alone, have kept the tokens by then."""
    model, text = MODELS["gemma3-hybrid"](), tokens(1, 30)
    cache = DilatedCache(model.config)
    first = model(text, **named_cache(cache)).logits
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(text[:, :3], **named_cache(cache))
    hook.remove()
    with pytest.raises(ValueError, match="did not end"):
        model(text[:, :3], **named_cache(cache))
    cache.reset()
    torch.testing.assert_close(read(model, text, [20, 10], cache), first, atol=1e-5, rtol=0)


@both_models
def test_gradient_checkpointing_does_not_forget_a_filled_cache(make):
    """Transformers' checkpointed layers run without their cache: what was read before would be missing."""
    model, text = make(), tokens(2, 30)
    caches = DilatedCache(model.config), DynamicCache(config=model.config)
    for cache in caches:
        read(model, text[:, :20], 20, cache)
    model.train().gradient_checkpointing_enable()
    for cache in caches:
        with pytest.raises(ValueError, match="gradient checkpointing|for 10 keys"):
            model(text[:, 20:], **named_cache(cache))
    with pytest.raises(ValueError, match="`generate` cannot use a cache"):
        model.generate(text, max_new_tokens=2)
    assert model.generate(text, max_new_tokens=2, use_cache=False).shape == (2, 32)


@torch.no_grad()
@both_models
def test_a_cache_goes_on_in_its_dtype(make):
    model, text = make(), tokens(2, 30)
    cache = DilatedCache(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        read(model, text[:, :20], 20, cache)
    for size in (1, 5):
        with pytest.raises(ValueError, match="holds torch.bfloat16, got torch.float32"):
            model(text[:, :size], **named_cache(cache))
    with torch.autocast("cpu", torch.bfloat16):
        read(model, text[:, 20:], [1, 9], cache)


@torch.no_grad()
def test_layers_that_keep_states_beside_keys_get_a_cache_for_both():
    config = FalconH1Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4,
        mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8,
    )  # fmt: skip
    model, text = patched(FalconH1ForCausalLM(config)), tokens(1, 20)
    with pytest.raises(ValueError, match="`config`.*recurrent states"):
        DilatedCache(model.config)
    found = model.generate(text, max_new_tokens=10, do_sample=False)
    assert torch.equal(model(found, use_cache=False).logits[:, 19:-1].argmax(-1), found[:, 20:])


@both_models
def test_drafting_with_the_first_layers_is_greedy_decoding(make):
    model, text = make(), tokens(1, 10)
    model.generation_config.pad_token_id = None
    greedy = model.generate(text, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(text, max_new_tokens=20, do_sample=False, assistant_early_exit=1), greedy)


@torch.no_grad()
def test_a_model_that_ignores_the_cache_is_refused():
    model, text = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4)).eval(), tokens()
    cache = DilatedCache(tiny_config(num_hidden_layers=3))
    model(text, **named_cache(cache))
    with pytest.raises(ValueError, match="does not read a DilatedCache"):
        model(text[:, :1], **named_cache(cache))


@torch.no_grad()
def test_an_aborted_forward_is_noticed():
    model, text = longnet(), tokens()
    cache = DilatedCache(model.config)
    read(model, text, 80, cache)
    last = model.model.layers[-1].self_attn
    hook = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(text[:, :5], **named_cache(cache))
    hook.remove()
    with pytest.raises(ValueError, match="did not end"):
        model(text[:, :5], **named_cache(cache))
    cache.reset()
    read(model, text, 80, cache)
