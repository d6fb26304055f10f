"""The systems of the comparison, by name, with equal numbers of parameters.

To add one: write a mixer (see `backbone.py`), give it a row here, and `tests/test_neighbours.py` checks it like the
others.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from examples.runs import geometric_patterns, schedule_of

from .attention_patterns import Fixed, GlobalTokens, RandomBlocks, SlidingWindow
from .backbone import Backbone, ModelShape, System
from .gated_attention import FlashUnit
from .linear_attention import CosFormerAttention
from .lru import GatedMixer, LinearRecurrentUnit
from .lsh_attention import LSHAttention
from .memorizing import MemorizingAttention
from .pattern_attention import PatternAttention
from .rg_lru import HawkMixer
from .s4d import S4D
from .strided_attention import StridedAttention
from .transformers_models import griffin, llama, mamba, mamba2, rwkv


@dataclass(frozen=True)
class Row:
    """A system of the comparison.

    Attributes:
        build: makes it from a shape and a width, which is free: its parameters grow with it.
        origin: whose code runs.
        keys: what a query reads, in the shape's window w.
        note: what is not as published.
    """

    build: Callable[[ModelShape, int], System]
    origin: str
    keys: str
    note: str = ""


def dilated_patch(shape: ModelShape, growth: int = 4) -> dict:
    """Segments 4w, 16w, 64w ... with rates 1, 4, 16 ..., until they span the longest text."""
    return schedule_of(geometric_patterns(shape.max_length, 4 * shape.window, growth)) | {"num_sink_tokens": 0}


def window_patch(window: int, sinks: int = 0) -> dict:
    """A sliding window of exactly `window` keys."""
    return {"segment_lengths": [2 * window], "dilation_rates": [1], "num_sink_tokens": sinks, "local": "sliding"}


def memory_patch(shape: ModelShape, layers: Iterable[int], **memory) -> dict:
    """A sliding window of 4w in every layer, and behind it, in some layers, a memory that ranks by mean keys."""
    return window_patch(4 * shape.window) | {"memory": {"rank": "mean", "layers": sorted(set(layers))} | memory}


def key_memory(shape: ModelShape, layers: Iterable[int]) -> dict:
    """32 single keys, none of them farther than 8w, wherever they were read."""
    return memory_patch(shape, layers, block_size=1, top_k=32, max_distance=8 * shape.window)


def _layers(mixer: Callable[[ModelShape, int], torch.nn.Module], mixers_per_layer: int = 1, mlp: bool = True):
    def build(shape: ModelShape, width: int) -> System:
        count = mixers_per_layer * shape.num_hidden_layers
        return Backbone(shape, lambda i: mixer(shape, i), width if mlp else 0, count)

    return build


def _pattern(shape, pattern):
    return PatternAttention(shape.hidden_size, shape.num_attention_heads, pattern)


def _longformer(shape, layer):
    """Windows grow with depth; in the last layer half of the heads are dilated by two."""
    last = layer == shape.num_hidden_layers - 1
    window = shape.window * (4 if last else 2)
    half = shape.num_attention_heads // 2
    return _pattern(shape, SlidingWindow(window, [1] * (shape.num_attention_heads - half) + [2] * half if last else 1))


def _bigbird(shape, layer):
    block = max(shape.window // 2, 4)
    near = SlidingWindow(3 * block)
    return _pattern(shape, near + GlobalTokens(block) + RandomBlocks(block, 3, shape.num_attention_heads, seed=layer))


def _reformer(shape, layer):
    """Local and hashed layers in turns, as in the authors' enwik8 model."""
    if layer % 2 == 0:
        return _pattern(shape, SlidingWindow(4 * shape.window))
    return LSHAttention(shape.hidden_size, shape.num_attention_heads, chunk=shape.window)


def _memorizing(shape, layer):
    if layer == shape.num_hidden_layers - 1:
        window = 4 * shape.window
        return MemorizingAttention(shape.hidden_size, shape.num_attention_heads, window, segment=2 * shape.window)
    return _pattern(shape, SlidingWindow(4 * shape.window))


def _longllama(shape: ModelShape, width: int) -> System:
    """Memory in layers as deep as those of LongLLaMA, which are 6, 12 and 18 of 26."""
    return llama(shape, width, key_memory(shape, (shape.num_hidden_layers * layer // 26 for layer in (6, 12, 18))))


def _longmem(shape: ModelShape, width: int) -> System:
    """Chunks of 4, by their mean keys, of what the trained model has read: it never saw a memory in training."""
    in_reading = memory_patch(shape, [shape.num_hidden_layers - 1], block_size=4, top_k=16)
    return llama(shape, width, window_patch(4 * shape.window), in_reading)


def _flash(shape: ModelShape, width: int) -> System:
    def unit(_):
        return FlashUnit(shape.hidden_size, 4 * shape.window, expanded_size=width, query_size=shape.hidden_size)

    return Backbone(shape, unit, 0, 2 * shape.num_hidden_layers)


OURS, THEIRS = "own module", "Transformers"
SYSTEMS: dict[str, Row] = {
    "Llama (dense)": Row(llama, THEIRS, "all"),
    "LongNet": Row(
        lambda shape, width: llama(shape, width, dilated_patch(shape)),
        "this project's patch over Llama",
        "the last 2w; of segments of 16w, 64w ... every 4th, 16th ... token, in the heads that select the query",
        "the first pattern is a sliding window, the default of the patch",
    ),
    "sliding window": Row(
        lambda shape, width: llama(shape, width, window_patch(4 * shape.window)), "this project's patch over Llama",
        "4w"
    ),
    "Sparse Transformer, strided": Row(
        _layers(lambda shape, i: StridedAttention(shape.hidden_size, shape.num_attention_heads, 2 * shape.window)),
        OURS,
        "the last 2w, every 2w-th before",
        "both kinds of keys in every head; rotary positions",
    ),
    "Sparse Transformer, fixed": Row(
        _layers(lambda shape, i: _pattern(shape, Fixed(2 * shape.window, max(1, shape.window // 8)))),
        OURS,
        "its block of 2w, the last w/8 of every earlier one",
        "both kinds of keys in every head; rotary positions",
    ),
    "Longformer": Row(
        _layers(_longformer), OURS, "2w; in the last layer 4w, in half of its heads at every second token",
        "rotary positions",
    ),
    "BigBird": Row(
        _layers(_bigbird), OURS, "3w/2, the first w/2, three earlier blocks of w/2 by chance",
        "causal, which the published model is not; rotary positions",
    ),
    "Reformer": Row(
        _layers(_reformer), OURS, "4w in every other layer; else the last w of its bucket in each of 2 rounds",
        "exactly causal; rotations drawn once; no reversible residuals; rotary positions in the local layers",
    ),
    "cosFormer": Row(
        _layers(lambda shape, i: CosFormerAttention(shape.hidden_size, shape.num_attention_heads, shape.max_length)),
        OURS, "a state", "M is the longest text of the comparison, not the text at hand",
    ),
    "FLASH (GAU)": Row(
        _flash, OURS, "its group of 4w; a state of the groups before",
        "divisors are constant; one bias per distance in a group; no absolute positions",
    ),
    "RWKV-4": Row(rwkv, THEIRS + ", chunked scan", "a state", "started as the authors' code does"),
    "LRU": Row(
        _layers(lambda s, i: GatedMixer(LinearRecurrentUnit(s.hidden_size, s.hidden_size), s.hidden_size)),
        OURS, "a state", "with an MLP per layer, as all the others",
    ),
    "S4D": Row(
        _layers(lambda shape, i: GatedMixer(S4D(shape.hidden_size), shape.hidden_size)),
        OURS, "a state", "diagonal; with an MLP per layer, as all the others",
    ),
    "Mamba": Row(mamba, THEIRS + ", chunked scan", "a state"),
    "Mamba-2": Row(mamba2, THEIRS, "a state", "heads of 8 channels, states of 64"),
    "Hawk": Row(_layers(lambda shape, i: HawkMixer(shape.hidden_size, shape.num_attention_heads)), OURS, "a state"),
    "Griffin": Row(
        griffin, THEIRS + ", chunked scan", "a state; 4w in every third layer (of two layers: the second)",
        "RecurrentGemma, with Gemma's embedding scale and soft cap",
    ),
    "Memorizing Transformer": Row(
        _layers(_memorizing), OURS, "4w; in the last layer also the 32 nearest of all segments of 2w before",
        "the memory forgets nothing; rotary positions in the window",
    ),
    "LongLLaMA (FoT)": Row(
        _longllama, "this project's memory over Llama",
        "4w; in layers 6, 12, 18 of 26 (of two: both) also, in one softmax, the 32 nearest of all keys before",
        "gradients reach all keys of a text; no keys of other documents in training (FoT's crossbatch); "
        "keys of memory farther than 8w are at that distance, where LongLLaMA's are all at one",
    ),
    "LongMem": Row(
        _longmem, "this project's memory over Llama",
        "4w; read, but not trained, with 16 chunks of 4 of all before in the last layer, by their mean keys",
        "no side network that learns to read: the memory is attached to the trained model as it is, in one softmax "
        "without a gate",
    ),
}  # fmt: skip
REFERENCE = "Llama (dense)"


def _count(build: Callable, shape: ModelShape, width: int) -> int:
    with torch.random.fork_rng(devices=[]):
        return build(shape, width).num_inner_parameters()


def matched_width(name: str, shape: ModelShape) -> int:
    """The width at which a system has as many parameters, embeddings aside, as Llama with an MLP of 8/3 E.

    Raises:
        ValueError: when no width comes within 5 %.
    """
    target = _count(llama, shape, shape.hidden_size * 8 // 3)
    build, low, high = SYSTEMS[name].build, 1, 16 * shape.hidden_size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _count(build, shape, middle) > target else (middle, high)
    found = min((low, high), key=lambda width: abs(_count(build, shape, width) - target))
    off = _count(build, shape, found) / target - 1
    if abs(off) > 0.05:
        raise ValueError(f"{name!r} cannot be made as large as {REFERENCE!r} at {shape}: it is {off:+.1%} off.")
    return found


def build_system(name: str, shape: ModelShape, seed: int = 0) -> System:
    """A system with matched parameters.

    Raises:
        ValueError: an unknown name, or a system that cannot be matched.
    """
    if name not in SYSTEMS:
        raise ValueError(f"`name` must be one of {', '.join(SYSTEMS)}, got {name!r}.")
    width = matched_width(name, shape)
    torch.manual_seed(seed)
    return SYSTEMS[name].build(shape, width)
