"""What makes the forwards of a model read a slice of each text where it would read the whole one.

Hooks exchange, before the backbone, what would be read from a slice by what the whole texts say; the operator then gets
a `ShardedForward`, whose `attend` looks across the ranks. The model's own code knows nothing of this.

Letters: B batch, H query heads, G key/value heads, n tokens of a rank's slice, D head dimension.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .attention_kernels import get_kernel
from .dilation_schedule import DilationSchedule, Heads
from .document_ids import without_gradient_of_padding
from .sequence_exchange import Exchange, plan_exchange, sharded_attention
from .sequence_shards import SHARD, Place, Shard, locate_longnet, locate_patched
from .transformers_compat import (
    CACHE_NAMES,
    attention_of,
    causal_lm_class_names,
    length_dependent_rope,
    text_config_of,
)


PER_TOKEN_LOSSES = ("ForCausalLM", "ForMaskedLM", "ForTokenClassification")


class ShardedForward:
    """One forward of a slice: it travels to the attention functions as an argument, so that a recomputation (gradient
    checkpointing) finds the place of its own batch, in whatever order forwards and backwards follow each other."""

    is_read_by_hooks = True  # so that models pass it on

    def __init__(self, place: Place, shard: Shard, group: dist.ProcessGroup | None):
        self.place, self.shard, self.group = place, shard, group
        self.exchanges: list[tuple[Exchange, int]] = []  # of each call of the operator, and bytes of a row

    @torch.compiler.disable
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        schedule: DilationSchedule,
        heads: Heads,
        *,
        scale: float,
        dropout: float,
        backend: str,
        return_lse: bool,
    ) -> torch.Tensor:
        """What `dilated_attention` returns, for this rank's queries [B, H, n, D] over the keys of all ranks."""
        slices = self.place.slices
        if dropout > 0 or backend == "eager" or return_lse:
            raise ValueError(
                "sequence parallelism runs the fused kernels, without attention dropout and log-sum-exp, got "
                f"dropout={dropout}, backend={backend!r}, return_lse={return_lse}."
            )
        if not query.shape[2] == key.shape[2] == slices.slice_length:
            raise ValueError(
                f"a rank's slice has {slices.slice_length} tokens, got {query.shape[2]} queries and {key.shape[2]} "
                "keys: caches do not work in a sharded forward, generate under `disabled()`."
            )
        exchange = plan_exchange(slices, self.shard.rank, schedule, heads, query.device)
        self.exchanges.append((exchange, 2 * key.shape[-1] * key.itemsize))
        return sharded_attention(query, key, value, exchange, self.group, scale, get_kernel(backend, query))


def _loss_type(model: nn.Module) -> str | None:
    """The library's name of a model's loss; classes whose name does not tell (GPT2LMHeadModel) fall back to causal."""
    loss_type = getattr(model, "loss_type", None)
    is_causal = type(model).__name__ in causal_lm_class_names().values()
    return "ForCausalLM" if loss_type is None and is_causal else loss_type


def _is_longnet(config: Any) -> bool:
    return hasattr(config, "segment_lengths")


def model_problem(model: nn.Module, outer: nn.Module) -> str | None:
    """Why a model's numbers would be wrong on slices of a text, or None."""
    config, name = model.config, type(model).__name__
    rope = length_dependent_rope(config)  # its longest position differs from rank to rank
    settings = getattr(config, "dilated_attention", None)
    if text_config_of(config) is not config:
        return "it is a composite model, whose pictures or sounds do not lie in one slice: only text models are sharded"
    if not _is_longnet(config) and settings is None:
        return "its attention is not dilated: call `patch_model` first"
    if not _is_longnet(config) and len(settings["layers"]) < config.num_hidden_layers:
        left = sorted(set(range(config.num_hidden_layers)) - set(settings["layers"]))
        return f"its layers {left} are not patched, and would see their own slice only"
    if (attention_of(config) if settings is None else settings["backend"]) == "eager":
        return "eager attention does not run across ranks: use the kernels of attn_implementation='sdpa'"
    for setting in ("attention_dropout", "attn_pdrop", "drop_path_rate"):
        if getattr(config, setting, 0):
            return f"`{setting}` must be 0, got {getattr(config, setting)}: its random numbers cannot span ranks"
    if name != type(model.base_model).__name__ and _loss_type(model) not in PER_TOKEN_LOSSES:
        return "its loss is not one of each token by itself"
    if rope is not None:
        return f"rope_type {rope[0]!r} depends on the length of the text, which a slice does not show"
    if getattr(config, "output_router_logits", False):
        return "the load-balancing loss of its experts (`output_router_logits`) looks at whole texts"
    if any(getattr(c, "is_prompt_learning", False) for c in getattr(outer, "peft_config", {}).values()):
        return "prompt learning puts virtual tokens before each slice"
    return None


class SequenceHooks:
    """The hooks of one model, for the ranks of a [`SequenceParallel`]; `remove` takes them away again.

    Those of a copied model are copied with it, for the same ranks.
    """

    def __init__(self, sp: Any, base: nn.Module):
        backbone = base.base_model
        self.sp, self.loss_type = sp, None if base is backbone else _loss_type(base)
        self.handles = [
            backbone.register_forward_pre_hook(self._enter, with_kwargs=True),
            backbone.register_forward_hook(self._leave, with_kwargs=True),
        ]
        if getattr(base.config, "position_embedding_type", None) == "xpos":
            self.handles.append(backbone.xpos.register_forward_pre_hook(self._place_xpos, with_kwargs=True))

    def remove(self) -> None:
        """The model runs as before `add_hooks`: on whole texts."""
        for handle in self.handles:
            handle.remove()

    def _enter(self, backbone: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the backbone: replaces what would be read from a slice by what the whole texts say."""
        shard = kwargs.get(SHARD)
        if self.sp.is_disabled:
            if shard is not None:
                raise ValueError("this batch is a slice of its texts: `disabled()` wants whole ones.")
            return None
        if not isinstance(shard, Shard):
            raise ValueError(
                "sequence parallelism is active, but this batch was not cut by `sp.collator(...)`. Use the collator, "
                "or run the forward on whole texts under `sp.disabled()`."
            )
        tokens = next(x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None)
        self._check_call(shard, tokens, kwargs)
        if _is_longnet(backbone.config):
            place = locate_longnet(shard)
        else:
            place = locate_patched(shard, bool(getattr(backbone.config, "rope_parameters", None)))
        self.sp.check_group(shard, tokens.device)
        self.sp.forward = ShardedForward(place, shard, self.sp.group)
        position_ids = place.position_ids.to(tokens.device)
        return args, kwargs | {
            SHARD: self.sp.forward,
            "position_ids": position_ids,
            "attention_mask": torch.ones_like(position_ids),  # what is padding is told by the place
            "use_cache": False,
        }

    def _check_call(self, shard: Shard, tokens: torch.Tensor, kwargs: dict) -> None:
        if any(kwargs.get(name) is not None for name in CACHE_NAMES):
            raise ValueError("`cache` does not work in a sharded forward: generate under `sp.disabled()`.")
        if tokens.shape[:2] != (shard.batch, shard.slice_length) or shard.size != self.sp.size:
            raise ValueError(
                f"the batch was cut for {(shard.batch, shard.slice_length)} tokens on {shard.size} ranks, got "
                f"{tuple(tokens.shape[:2])} on {self.sp.size}: it was changed after the collator."
            )
        is_causal = self.loss_type == "ForCausalLM"
        if shard.has_labels and self.loss_type is not None and shard.labels_are_shifted != is_causal:
            raise ValueError(f"`shift_labels` of `sp.collator` must be {is_causal} for this model.")

    def _place_xpos(self, xpos: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """xPos counts from the start of the document, which may lie on another rank."""
        if self.sp.is_disabled:
            return None
        place, config = self.sp.forward.place, xpos.config
        longest = max((stop - start for *_, start, stop in place.slices.documents), default=0)
        if longest > config.max_position_embeddings and not config.xpos_is_centred_per_segment:
            raise ValueError(
                f"Positions must be below `max_position_embeddings={config.max_position_embeddings}` with this xPos, "
                f"got a document of {longest} tokens."
            )
        return args, kwargs | {"position_ids": place.document_positions.to(args[0].device)}

    def _leave(self, backbone: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """After the backbone: did every layer's attention look across the ranks?"""
        if self.sp.is_disabled:
            return None
        forward, layers = kwargs[SHARD], backbone.config.num_hidden_layers
        calls = len(forward.exchanges)
        if calls != layers:
            raise ValueError(
                f"{layers} layers, but {calls} looked across the ranks: the others saw their own slice only. Does the "
                "model pass its keyword arguments on to its attention?"
            )
        shard = forward.shard
        if not _is_longnet(backbone.config) or shard.attention_mask is None:
            return None
        # As a LongNet does, from whose sight the hook before has taken the padding.
        states = without_gradient_of_padding(output[0], shard.cut(shard.attention_mask))
        if isinstance(output, tuple):
            return states, *output[1:]
        output.last_hidden_state = states
        return output
