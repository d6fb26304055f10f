"""The seam to Transformers: every difference between its releases, and every name of it that its documentation does
not promise. The other files use what this one offers, in the newest release's words (`cache`). Longer than other files:
the one place to look at when a release appears.

A release may make us refuse, never make us wrong: names that are looked up here and are gone raise an ImportError.

    5.17 to 5.23   the cache argument and output field are `past_key_values`
    5.24           they are `cache`; the old name is taken with a FutureWarning (`deprecate_kwarg`)
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, causal_mask_function
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import PushToHubMixin, TransformersKwargs, cached_file
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs
from transformers.utils.type_validators import interval


# The releases that the whole test-suite was run on, first and last. setup.cfg has the same bounds.
OLDEST_TESTED, NEWEST_TESTED = (5, 17), (5, 24)


def release() -> tuple[int, int]:
    major, minor, *_ = transformers.__version__.split(".")
    return int(major), int(minor)


if not OLDEST_TESTED <= release() <= NEWEST_TESTED:
    warnings.warn(
        f"longnet-transformers was tested with Transformers {OLDEST_TESTED[0]}.{OLDEST_TESTED[1]} to "
        f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1]}, this is {transformers.__version__}: what it does not know it refuses.",
        stacklevel=2,
    )

# What a class of a model declares for Transformers. Contributors of models are told these names, so they may stand in
# the files of models; every other private name of Transformers stands in this file alone.
MODEL_DECLARATIONS = (
    "_can_compile_fullgraph", "_can_record_outputs", "_fsdp_plan", "_init_weights", "_no_split_modules", "_pp_plan",
    "_skip_keys_device_placement", "_supports_attention_backend", "_supports_flash_attn", "_supports_flex_attn",
    "_supports_sdpa", "_tied_weights_keys", "_tp_plan",
)  # fmt: skip


CACHE_NAMES = ("cache", "past_key_values")
_arguments = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_found = [name for name in CACHE_NAMES if name in _arguments]
if len(_found) != 1:
    raise ImportError(
        f"Transformers {transformers.__version__} hands the cache to models under a name that longnet-transformers "
        f"does not know (wanted one of {', '.join(CACHE_NAMES)}): install a release that it was tested with."
    )
# How this release calls the cache, as an argument and in outputs.
CACHE = _found[0]


def named_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """The cache as a keyword argument, or output field, by this release's name."""
    return {CACHE: cache}


def accept_cache(function: Callable) -> Callable:
    """For functions with an argument `cache`: takes it by the other name as well, as models of this release do, and
    refuses two caches under the two names, of which one would be lost."""
    renamed = function
    if CACHE == "cache":  # 5.24: with a FutureWarning
        renamed = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(function)

    @functools.wraps(function)
    def with_either_name(*args, **kwargs):
        if kwargs.get("cache") is not None and kwargs.get("past_key_values") is not None:
            raise ValueError("`cache` and `past_key_values` are two names of one argument, got both.")
        if CACHE != "cache" and "past_key_values" in kwargs:
            cache = kwargs.pop("past_key_values")
            kwargs["cache"] = cache if cache is not None else kwargs.get("cache")
        return renamed(*args, **kwargs)

    return with_either_name


# What a forward's `**kwargs` may hold beside what TransformersKwargs names: switches, what losses read, and what
# `generate` reads for stop strings and hands on.
_KNOWN_KEYWORDS = {
    *TransformersKwargs.__annotations__, "use_cache", "return_dict", "labels", "shift_labels", "num_items_in_batch",
    "ignore_index", "weight", "logits_to_keep", "tokenizer", "assistant_tokenizer",
}  # fmt: skip
_STATE_WORDS = ("cache", "mask", "past", "position", "state", "memory", "segment", "bias")


def _carries_meaning(name: str, value: object) -> bool:
    if value is None or isinstance(value, (bool, str)):
        return False
    if name == "token_type_ids":  # zeros, which some tokenizers give, say nothing
        return not isinstance(value, torch.Tensor) or is_tracing(value) or bool(value.any())
    if isinstance(value, (int, float)):
        return any(word in name for word in _STATE_WORDS)
    # What acts on a model from outside may hand its layers an object of its own, and says so.
    return not getattr(value, "is_read_by_hooks", False)


def first_unread(keywords: Mapping[str, object]) -> str | None:
    """The first keyword argument that carries state, masks or positions under a name that nothing reads, or None."""
    unknown = (name for name in keywords if name not in _KNOWN_KEYWORDS)
    return next((name for name in unknown if _carries_meaning(name, keywords[name])), None)


def refuse_unread(owner: str, keywords: Mapping[str, object]) -> None:
    """Raises a ValueError that names the `first_unread` of what nothing behind `owner` reads."""
    name = first_unread(keywords)
    if name is not None:
        raise ValueError(
            f"`{name}` is not read by {owner}, got {type(keywords[name]).__name__}: the result would be computed "
            "without it. A cache is passed as `cache`, padding as `attention_mask`, places as `position_ids`."
        )


_PREPARE_CACHE = "_prepare_cache_for_generation"
_PREPARE_CACHE_ARGUMENTS = ["generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"]
_arguments = inspect.signature(getattr(GenerationMixin, _PREPARE_CACHE, lambda: None)).parameters
if list(_arguments)[1:] != _PREPARE_CACHE_ARGUMENTS:
    raise ImportError(
        f"`generate` of Transformers {transformers.__version__} prepares its cache in a way that longnet-transformers "
        "does not know: install a release that it was tested with."
    )


def _was_read(cache: Cache, tokens: int) -> bool:
    """Whether forwards have filled it, with at least so many tokens; asks no tensor, so a GPU is not waited for."""
    if type(cache) is DynamicCache and 0 < cache.get_seq_length() < tokens:
        return False  # a forward that got none made one of its own
    return any(getattr(layer, "is_initialized", True) for layer in getattr(cache, "layers", ()) or (cache,))


def check_cache_reaches_model(
    owner: str, input_ids: torch.Tensor, given: Mapping[str, object], inputs: dict[str, object]
) -> None:
    """Refuses a decoding step whose cache was dropped on the way, or that the steps before did not read.

    Phi-3 drops its cache where its rotary frequencies switch, to read the text anew: an unused one is handed to it all
    the same, and a growing one it may replace.

    Args:
        input_ids, given: the arguments of `prepare_inputs_for_generation`. inputs: what it made of them.
    """
    if not given.get("use_cache"):
        return
    mask, embeds = given.get("attention_mask"), inputs.get("inputs_embeds")
    whole = mask.shape[-1] if mask is not None and mask.dim() == 2 else input_ids.shape[1]
    new = embeds.shape[1] if embeds is not None else inputs["input_ids"].shape[1]
    cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
    if not new and cache is not None and cache.get_seq_length():
        raise ValueError(
            f"`input_ids` must begin with the {int(cache.get_seq_length())} tokens that `cache` holds and go on behind "
            f"them, got {input_ids.shape[1]} tokens."
        )
    if cache is not None and inputs.get(CACHE) is None and new >= whole:
        if not _was_read(cache, 0):
            inputs[CACHE] = cache
        elif type(cache) is DynamicCache:
            return
    if cache is not None and inputs.get(CACHE) is not cache:
        advice = "use_cache=False" if type(cache) is DynamicCache else "cache_implementation='dynamic'"
        raise ValueError(
            f"`generate` prepared a {type(cache).__name__}, but {owner} sets it aside for this step: it would go on "
            f"with another one, or without the text read so far. Pass `{advice}`."
        )
    if new < whole and (cache is None or not _was_read(cache, whole - new)):
        got = "none" if cache is None else f"a {type(cache).__name__} without them"
        raise ValueError(
            f"`generate` goes on with {new} of {whole} tokens from a cache, got {got} under `{CACHE}`: the forward "
            f"before did not read the one that was prepared, so that {owner} would not see the text. Pass "
            "`use_cache=False`, or install a tested release of Transformers."
        )


def refuse_lost_prompts(model, use_cache: bool) -> None:
    """Refuses `generate` under an adapter of prompts whose PEFT does not know how this release calls the cache.

    PEFT asks for the cache by the name `past_key_values`: under another one it puts its virtual tokens before each new
    token again, or its prefix is dropped, without a word.

    Args:
        model: what `generate` runs on. use_cache: whether it is to use one.
    """
    peft_model = getattr(model.prepare_inputs_for_generation, "__self__", None)
    adapter = getattr(peft_model, "active_peft_config", None)
    if CACHE == "past_key_values" or not getattr(adapter, "is_prompt_learning", False):
        return
    if f'"{CACHE}"' in inspect.getsource(type(peft_model).prepare_inputs_for_generation):
        return
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    if use_cache or kind not in ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"):
        raise ValueError(
            f"`generate` would lose the prompts of this adapter ({kind}): the installed PEFT asks for the cache as "
            f"`past_key_values`, which Transformers {transformers.__version__} calls `{CACHE}`. Use Transformers 5.23, "
            "a newer PEFT, or LoRA; a prompt-tuned model generates rightly with `use_cache=False`."
        )


class CheckedGenerationMixin(GenerationMixin):
    """`generate` with a cache of the model's own, which verifies that the cache that it prepares is the one read."""

    def prepare_own_cache(self, generation_config, model_kwargs: dict, max_cache_length: int) -> bool:
        """Puts a cache into `model_kwargs[CACHE]`, or returns False for Transformers' own."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        refuse_lost_prompts(self, generation_config.use_cache is not False)
        for name in CACHE_NAMES:  # the other release's name, which `generate` of this one leaves among the rest
            if name != CACHE and name in model_kwargs:
                model_kwargs[CACHE] = model_kwargs.pop(name)
        if not self.prepare_own_cache(generation_config, model_kwargs, max_cache_length):
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` looks at its signature
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        check_cache_reaches_model(type(self).__name__, input_ids, kwargs, inputs)
        return inputs


def _prepare_instance_cache(
    model, prepare_own_cache, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
):
    refuse_lost_prompts(model, generation_config.use_cache is not False)
    if not prepare_own_cache(model, generation_config, model_kwargs, max_cache_length):
        getattr(type(model), _PREPARE_CACHE)(
            model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def _prepare_instance_inputs(model, input_ids, *args, **kwargs):
    inputs = type(model).prepare_inputs_for_generation(model, input_ids, *args, **kwargs)
    check_cache_reaches_model(type(model).__name__, input_ids, kwargs, inputs)
    return inputs


# Attributes that stand on an instance that behaves otherwise than its class.
GENERATION_ATTRIBUTES = (_PREPARE_CACHE, "prepare_inputs_for_generation")
UPLOAD = "_upload_modified_files"
SUPPORTS_FLASH_ATTENTION = "_supports_flash_attn"


def set_instance_generation(model: GenerationMixin, prepare_own_cache: Callable) -> None:
    """What `CheckedGenerationMixin` is for a class, on one instance of another class."""
    # Partials, not methods: a method is pickled as its name, which would be looked up in the class.
    setattr(model, _PREPARE_CACHE, functools.partial(_prepare_instance_cache, model, prepare_own_cache))
    prepare = functools.partial(_prepare_instance_inputs, model)
    model.prepare_inputs_for_generation = functools.update_wrapper(prepare, type(model).prepare_inputs_for_generation)


def length_dependent_rope(config) -> tuple[str, int] | None:
    """Type of a RoPE whose frequencies depend on the longest position of a forward, and the positions up to which they
    do not; None for any other. Keys that a cache holds keep the frequencies of the forward that brought them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    scaling = (getattr(config, "dilated_attention", None) or {}).get("rope_scaling") or {}
    parameters = {**(parameters or {}), **scaling}  # a layer type without rotary positions has None
    kind = scaling.get("rope_type", scaling.get("type")) or parameters.get("rope_type") or ""
    if kind != "longrope":
        return ("dynamic", config.max_position_embeddings) if "dynamic" in kind else None
    limit = None if scaling else getattr(config, "original_max_position_embeddings", None)
    limit = parameters.get("original_max_position_embeddings") or limit or config.max_position_embeddings
    return "longrope", limit


def changes_frequencies(rope: tuple[str, int] | None, first: int, total: int) -> bool:
    """Whether a text of `total` tokens, of which the first forward reads `first`, gets several frequencies."""
    if rope is None or total <= max(first, rope[1]):
        return False
    return rope[0] == "dynamic" or first <= rope[1]


def attention_of(config) -> str:
    """The attention implementation that a configuration's model runs."""
    return config._attn_implementation


def unwrap(model: nn.Module, parallel: bool = False) -> PreTrainedModel:
    """The Transformers model inside a compiled or PEFT model, and with `parallel` inside what a launcher has wrapped.

    Raises:
        ValueError: where there is none.
    """
    for name in ("_orig_mod", "module") if parallel else ("_orig_mod",):
        if isinstance(getattr(model, name, None), nn.Module):
            return unwrap(getattr(model, name), parallel)
    if hasattr(model, "get_base_model"):
        return unwrap(model.get_base_model(), parallel)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` must be a Transformers model or a PEFT model around one, got {type(model).__name__}; what "
            "Accelerate or a launcher has wrapped is unwrapped first: `accelerator.unwrap_model(model)`."
        )
    return model


def exporter_is_loaded() -> bool:
    """Whether Transformers' exporters are in use, which register each class of caches for `torch.export`."""
    return "transformers.exporters.exporter_dynamo" in sys.modules


def text_config_of(config):
    """The part of a composite model's configuration that describes its decoder of text, or the configuration itself."""
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "get_text_config"):
        return config
    return config.get_text_config(decoder=True)


COMPOSITE_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def composite_families() -> dict[str, str]:
    """Model type to the name of the Auto class that makes it, of models that read pictures or sounds beside text."""
    found = {}
    for name in reversed(COMPOSITE_CLASSES):
        found |= dict.fromkeys(getattr(transformers, name)._model_mapping._model_mapping, name)
    return found


def head_of_composite(path_or_repo, auto_class: type, **kwargs) -> type:
    """In place of AutoModelForCausalLM, the Auto class that makes the whole of a composite model (LLaVA) saved there.

    What says so is the class that was saved; text parts, which the same configuration can make, are left alone.
    """
    if auto_class is not transformers.AutoModelForCausalLM or kwargs.get("gguf_file"):  # those hold a text part alone
        return auto_class
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
    config = kwargs.get("config") or transformers.AutoConfig.from_pretrained(
        path_or_repo, **{name: kwargs[name] for name in names if name in kwargs}
    )
    saved = {name.removeprefix("Dilated") for name in getattr(config, "architectures", None) or ()}
    for name in COMPOSITE_CLASSES if text_config_of(config) is not config else ():
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping and mapping[type(config)].__name__ in saved:
            return getattr(transformers, name)
    return auto_class


def closed_interface(functions: dict[str, Callable]) -> AttentionInterface:
    """Attention functions by name, without those that the library or others have registered."""
    return type("ClosedAttentionInterface", (AttentionInterface,), {"_global_mapping": functions})()


def passes_through_interface(model: PreTrainedModel) -> bool:
    """Whether `set_attn_implementation` exchanges the attention of this model."""
    return model._can_set_attn_implementation()


def forbid_flash_attention(model: PreTrainedModel) -> None:
    """Continuous batching would otherwise switch to dense flash attention with no more than a warning."""
    setattr(model, SUPPORTS_FLASH_ATTENTION, False)


def has_own_adapter(model: nn.Module) -> bool:
    """Whether an adapter was loaded by Transformers itself, without PEFT's wrapper."""
    return getattr(model, "_hf_peft_config_loaded", False)


def find_file(path_or_repo: str, name: str, **hub) -> str | None:
    """A file of a folder or Hub repository, or None where there is none."""
    return cached_file(path_or_repo, name, _raise_exceptions_for_missing_entries=False, **hub)


def upload(model: PreTrainedModel, *args, **kwargs):
    """What `push_to_hub` does last, with the files it has written."""
    return getattr(PushToHubMixin, UPLOAD)(model, *args, **kwargs)


def brings_its_code(model: PreTrainedModel) -> bool:
    """Whether `save_pretrained` of this model's class copies its code too."""
    return getattr(type(model), "_auto_class", None) is not None


def auto_class_of(model: PreTrainedModel, names: tuple[str, ...]) -> str | None:
    """The first of these Auto classes that makes models of this very class."""
    for name in names:
        mapping = getattr(transformers, name)._model_mapping
        if type(model.config) in mapping and mapping[type(model.config)] is type(model):
            return name
    return None


def causal_lm_class_names() -> dict[str, str]:
    """Model type to class name: the table by which Transformers, TRL and PEFT know causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def register_class_names(model_type: str, classes: dict[str, str]) -> None:
    """Puts a model's classes into the tables of names by which Trainer (whether label smoothing shifts labels),
    pipelines and model cards know what a class is for; `AutoModelForX.register` does not.

    Args:
        classes: name of the Auto class to file and name of ours, as in a configuration's `auto_map`.
    """
    for auto, name in classes.items():
        if auto.startswith("AutoModelFor"):
            table = getattr(transformers, auto)._model_mapping._model_mapping
            table.setdefault(model_type, name.rpartition(".")[2])


def code_files(path: str) -> list[str]:
    """The files that a file imports relatively, directly or through each other."""
    from transformers.dynamic_module_utils import get_relative_import_files

    return get_relative_import_files(path)


def has_own_loss(model: PreTrainedModel) -> bool:
    """Whether the loss is the one that Transformers gives to causal or masked language models."""
    return model.loss_function in (ForCausalLMLoss, ForMaskedLMLoss)


def shifts_labels(trainer) -> bool:
    """Whether the loss of a Trainer's model compares each token with the next one."""
    return trainer._loss_shifts_labels


class MadeOtherwise:
    """For subclasses of a Transformers model of which every instance is changed after it was made (`change`)."""

    @staticmethod
    def change(model: PreTrainedModel) -> PreTrainedModel:
        raise NotImplementedError

    @staticmethod
    def original_attention(config) -> str | None:
        """The attention under which a model of this configuration is made, where the configuration tells of another."""
        return None

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        cls.change(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def _from_config(cls, config, **kwargs):
        original = cls.original_attention(config)
        if original is not None:
            kwargs.setdefault("attn_implementation", original)
        return cls.change(super()._from_config(config, **kwargs))


# Names of Transformers that the other files get here.
__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "LinearAttentionCacheLayerMixin",
    "ROPE_INIT_FUNCTIONS",
    "and_masks",
    "capture_outputs",
    "causal_mask_function",
    "dynamic_rope_update",
    "interval",
    "is_tracing",
    "merge_with_config_defaults",
]
