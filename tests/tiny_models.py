"""Tiny LongNets for the tests of the models."""

from modeling_longnet import LongNetConfig


SCHEDULE = {"segment_lengths": [8, 16, 32], "dilation_rates": [1, 2, 4]}


def tiny_config(**changes) -> LongNetConfig:
    """Two layers of width 32 with 4 heads and segments of 8, 16 and 32 tokens."""
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        **SCHEDULE,
    }
    return LongNetConfig(**(fields | changes))


# The fields that change what a token sees or how its place is told, one of a kind.
VARIANTS = {
    "paper": {},
    "rope-grouped": {"position_embedding_type": "rope", "num_key_value_heads": 2},
    "learned-once": {"position_embedding_type": "learned", "position_embedding_offset": 2, "overlap": "once"},
    "xpos-sinks": {"num_sink_tokens": 2, "head_offsets": "contiguous"},
    "ragged-none": {
        "position_embedding_type": "none",
        "segment_lengths": [7, 18],
        "dilation_rates": [1, 5],
        "sub_layernorm": False,
    },
}
