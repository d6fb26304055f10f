"""What a patch did, in figures."""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from .dilation_schedule import DilationSchedule
from .patch_probe import AttentionCall


@dataclass(frozen=True)
class PatchReport:
    """What a patch did.

    Attributes:
        family: the model type.
        num_layers: layers in all. `layers`: the patched ones. `left_alone`: the others, with the reason.
        schedule: of the patched layers.
        native_context: tokens that the model was trained to read, if it says so.
        reach: the longest segment; further back a query sees the sink tokens only.
        keys_per_query: mean number of keys that the schedule shows a query of a patched layer, in a text of `reach`
            tokens; a key that several patterns offer is counted for each, chosen blocks are not.
        dense_keys_per_query: of dense attention there.
        kv_bytes_per_token: what a plain cache stores for a token, in all layers; a patch does not change that.
        bounded_kv_bytes_per_token: what a bounded cache stores, in a text of `reach` tokens, per token: the layers left
            alone grow, the patched ones hold a fixed number of rows, or all with a memory.
        unread_offsets: per dilation rate, the offsets that no head has: positions which those patterns never read.
        rope_scaling: the scaled rope parameters given, if any.
        unbounded: why `generate` takes the model's own cache, which grows with the text, instead of the bounded one.
    """

    family: str
    num_layers: int
    layers: tuple[int, ...]
    left_alone: dict[int, str]
    schedule: DilationSchedule
    native_context: int | None
    reach: int
    keys_per_query: float
    dense_keys_per_query: float
    kv_bytes_per_token: int
    bounded_kv_bytes_per_token: float
    unread_offsets: dict[int, range]
    rope_scaling: dict | None
    unbounded: str | None = None

    def __str__(self) -> str:
        s = self.schedule
        patterns = ", ".join(f"{w}/{r}" for w, r in s.patterns)
        lines = [
            f"{self.family}: dilated attention in {len(self.layers)} of {self.num_layers} layers",
            *(f"  layer {index} left alone: {reason}" for index, reason in self.left_alone.items()),
            f"  schedule        {patterns} (segment length / dilation rate); overlap {s.overlap}, "
            f"{s.num_sink_tokens} sink tokens, head offsets {s.head_offsets}, local {s.local}",
            f"  reach           {self.reach} tokens (native context {self.native_context}, rope scaling "
            f"{self.rope_scaling['rope_type'] if self.rope_scaling else 'none'})",
            f"  keys per query  {self.dense_keys_per_query:.0f} -> {self.keys_per_query:.0f} (mean)",
            f"  KV bytes/token  {self.kv_bytes_per_token} -> {self.kv_bytes_per_token} with a plain cache, "
            f"{self.bounded_kv_bytes_per_token:.0f} with a bounded one over {self.reach}",
        ]
        if self.unbounded:
            lines.append(f"  cache           `generate` takes the model's own, which grows: {self.unbounded}")
        if s.memory is not None and s.memory.heads is not None and s.memory.max_distance is not None:
            lines.append(f"  sink tokens     are read at a distance of at most {s.memory.max_distance}")
        if s.memory is not None and s.memory.only_layers != ():
            where = "all" if s.memory.only_layers is None else len(s.memory.only_layers)
            lines.append(
                f"  memory          {s.memory.top_k} blocks of {s.memory.block_size} tokens a query, chosen among all "
                f"earlier ones, in {where} patched layers"
            )
        if self.unread_offsets:
            unread = ", ".join(f"{lacks.stop - lacks.start} of {rate}" for rate, lacks in self.unread_offsets.items())
            lines.append(f"  unread          {unread} offsets: there are more than heads to read them")
        return "\n".join(lines)


def keys_per_query(schedule: DilationSchedule) -> float:
    """Mean number of keys of a causal query over all positions and heads, each pattern's counted."""
    # A head selects one query in r, and half of the w / r keys come before it.
    dilated = sum((w / r + 1) / 2 / r for _, w, r in schedule.dilated_patterns)
    return float(schedule.num_sink_tokens) + schedule.window + dilated


def bounded_rows(schedule: DilationSchedule, num_heads: int, num_key_value_heads: int) -> int:
    """Rows that a bounded cache keeps for one key/value head: the union of its query heads' offsets in each pattern."""
    group = num_heads // num_key_value_heads
    rows = schedule.num_sink_tokens
    for w, r in schedule.patterns:
        rows += -(-w // r) * min(group, r)  # a sliding window keeps w_0 too, for the dense start of a text
    return rows


def make_report(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    schedule: DilationSchedule,
    calls: list[AttentionCall],
    layers: list[int],
    reasons: dict[int, str | None],
    rope_scaling: dict | None,
    unbounded: str | None,
) -> PatchReport:
    """The report of a patch, from the calls that its probe saw; `config` is that of the part with the layers."""
    reach = schedule.segment_lengths[-1]
    per_token, at_reach = 0, 0.0
    for call in calls:
        _, groups, _, width = call.key_shape
        row = 2 * width * call.itemsize  # a key and a value
        per_token += groups * row
        bounded = call.module.layer_idx in layers and schedule.of_layer(call.module.layer_idx).memory is None
        rows = bounded_rows(schedule, call.num_heads, groups) if bounded else reach
        at_reach += groups * row * min(rows, reach)
    return PatchReport(
        family=model.config.model_type,
        num_layers=len(reasons),
        layers=tuple(layers),
        left_alone={i: reason or "not chosen by `layers`" for i, reason in reasons.items() if i not in layers},
        schedule=schedule,
        native_context=getattr(config, "max_position_embeddings", None),
        reach=reach,
        keys_per_query=keys_per_query(schedule),
        dense_keys_per_query=(reach + 1) / 2,
        kv_bytes_per_token=per_token,
        bounded_kv_bytes_per_token=at_reach / reach,
        unread_offsets=schedule.unread_offsets(config.num_attention_heads),
        rope_scaling=rope_scaling,
        unbounded=unbounded,
    )
