"""Give a model that exists dilated attention: patch, undo, save, load.

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
    patch_model(model, segment_lengths=[256, 512, 1024, 2048], dilation_rates=[1, 2, 4, 8])
    print(model.dilated_attention_report)

The attention is exchanged through Transformers' own `AttentionInterface` and `AttentionMaskInterface`: no class of a
model is changed, and no mask of pairs is built. What a patch is stands as plain JSON in
`model.config.dilated_attention`. Where PEFT is installed its class of models is changed, and no other one, as long as a
model lives that was patched: it then saves these settings beside an adapter (see patch_adapter_files.py).

Letters: B batch, H query heads, G key/value heads, N tokens, D head dimension, w segment length, r dilation rate.
"""

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import logging

from .attention_kernels import check_backend
from .dilated_cache_generation import prepare_dilated_cache
from .dilation_schedule import DilationSchedule, as_plain
from .memory_files import BASIS_NAME, read_bases, set_bases, write_bases
from .memory_patch import attach_memories, find_layer_memories, resolve_memory
from .model_card import TAGS, upload_with_card
from .patch_adapter_files import SETTINGS_NAME, AdapterRecord, resize_for_adapter, write_settings
from .patch_attention import SCALED_MARK
from .patch_mask import IMPLEMENTATIONS, ORIGINALS
from .patch_probe import choose_layers, find_layers, probe_attention, text_part, why_unbounded
from .patch_report import PatchReport, make_report
from .patch_rope_scaling import guard_learned_positions, scale_rotary_embeddings
from .transformers_compat import (
    GENERATION_ATTRIBUTES,
    SUPPORTS_FLASH_ATTENTION,
    UPLOAD,
    attention_of,
    find_file,
    forbid_flash_attention,
    has_own_adapter,
    head_of_composite,
    passes_through_interface,
    set_instance_generation,
    text_config_of,
    unwrap,
)


logger = logging.get_logger(__name__)

SETTINGS = (
    "segment_lengths", "dilation_rates", "head_offsets", "overlap", "num_sink_tokens", "local", "layers", "backend",
    "rope_scaling",
)  # fmt: skip
# Arguments that say where files are.
HUB_ARGUMENTS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
INSTANCE_ATTRIBUTES = (
    "_undo_dilated_attention", "_adapter_record", "_patched_within", "save_pretrained", "set_attn_implementation",
    "dilated_attention_report", SUPPORTS_FLASH_ATTENTION, UPLOAD, *GENERATION_ATTRIBUTES,
)  # fmt: skip
DEQUANTIZE_ADVICE = (
    "Transformers cannot write this quantized model. Save a plain copy of it first (for GGUF: "
    "`python -m conversion.dequantize_gguf`), load that and patch it; an adapter (PEFT) can be saved from the "
    "quantized model as it is."
)


def is_patched(model: nn.Module) -> bool:
    """Whether the model, or the text part of a composite one, runs dilated attention by a patch."""
    return attention_of(text_config_of(unwrap(model).config)).startswith("dilated")


def _refuse_model(model: PreTrainedModel, part: PreTrainedModel) -> None:
    """Raise a ValueError for a model, or the text part of one, that cannot be patched as a whole."""
    name, config = type(model).__name__, part.config
    if is_patched(model):
        raise ValueError(f"{name} is patched already: call `unpatch_model(model)` before patching it anew.")
    if hasattr(config, "segment_lengths"):
        raise ValueError(f"{name} has dilated attention of its own; its configuration sets the schedule.")
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; only decoders can be patched.")
    if not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"{name} ({config.model_type}) does not tell its layers: patch its language model by itself.")
    if not passes_through_interface(part):
        raise ValueError(
            f"{name} ({config.model_type}) does not run its attention through Transformers' AttentionInterface, so it "
            "cannot be patched; it was left as it is."
        )
    if attention_of(config) not in IMPLEMENTATIONS:
        raise ValueError(
            f"{name} runs the attention {attention_of(config)!r}; a patch goes over one of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}. Call `model.set_attn_implementation('sdpa')` first."
        )


def _mark_scaled(modules: list[nn.Module]) -> list[Callable[[], None]]:
    """Tell attention modules that their rotary embeddings are scaled. Returns the steps that undo this."""
    for module in modules:
        setattr(module, SCALED_MARK, True)
    return [functools.partial(delattr, module, SCALED_MARK) for module in modules]


def _set_instance_attributes(model: PreTrainedModel) -> None:
    """What a patched model, or the text part of one, does otherwise than its class: INSTANCE_ATTRIBUTES."""
    forbid_flash_attention(model)
    # Partials, not methods: a method is pickled as its name, which would be looked up in the class.
    model.save_pretrained = functools.partial(_save_pretrained, model)
    model.set_attn_implementation = functools.partial(_set_attn_implementation, model)
    setattr(model, UPLOAD, functools.partial(_upload, model))
    if isinstance(model, GenerationMixin):
        set_instance_generation(model, prepare_dilated_cache)


# Longer than other functions: by its arguments and what they mean.
def patch_model(
    model: nn.Module,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: str = "modulo",
    overlap: str = "once",
    num_sink_tokens: int = 4,
    local: str = "sliding",
    layers: Sequence[int] | Callable[[int], bool] | None = None,
    backend: str | None = None,
    rope_scaling: dict | None = None,
    memory: dict | None = None,
) -> nn.Module:
    """Replace the causal self-attention of a model by dilated attention, in place.

    With the defaults (`overlap="once"`, r_0 = 1) the model is unchanged on inputs of up to w_0 tokens. What was done
    is described by `model.dilated_attention_report`; the settings stand in `model.config.dilated_attention`.

    Of a composite model (LLaVA, Qwen2-VL), the part that writes text is patched, and the settings stand in that part's
    configuration (`model.config.text_config`); the encoders of pictures and sounds stay as they are. What such a model
    is told beside the tokens has to leave its mask causal: one whose pictures see themselves whole (PaliGemma) is
    refused in the forward.

    Args:
        model: a decoder of Transformers, alone or as a part of a composite model, or a PEFT model around one.
        segment_lengths: w_i in tokens, not decreasing. `dilation_rates`: r_i, as many.
        head_offsets, overlap, num_sink_tokens, local: as in `DilationSchedule`. The defaults are those from which a
            pretrained model suffers least at equal cost, as measured in docs/zero_shot_patch_study.md.
        layers: the layers to patch, as indices or as a function of the index; the others keep their attention.
            By default every layer that can be; sliding-window, linear and similar layers are left alone and named.
        backend: of the operator (`None`, `"eager"`, `"sdpa"`, `"flash_attention_2"`).
        rope_scaling: Transformers' `rope_parameters` for reading beyond the native context, for instance
            `{"rope_type": "yarn", "factor": 4.0}`; what is not given is taken from the model. It takes the place of a
            scaling that the model has, and then names the `original_max_position_embeddings` its factor counts from.
        memory: lets each query choose blocks of earlier tokens to see beside what the schedule shows, so that the model
            finds what it has read: a dictionary of settings, `{}` for the defaults, see [`MemorySpec`]. Beyond half of
            the native context distances are clamped, unless `max_distance` tells otherwise (None: never).

    Returns:
        The same model.

    Raises:
        ValueError: for a wrong setting; for a model whose attention cannot be exchanged, which is then left as it was.
    """
    schedule = DilationSchedule(
        segment_lengths, dilation_rates, True, head_offsets, overlap, num_sink_tokens, "mask", local, memory
    )
    check_backend(backend)
    rope_scaling = as_plain("rope_scaling", rope_scaling)
    base = unwrap(model)
    part = text_part(base)
    _refuse_model(base, part)
    original = attention_of(part.config)
    settings_before = getattr(part.config, "dilated_attention", None)  # of a model that was saved patched
    undo = part._undo_dilated_attention = []
    try:
        part.set_attn_implementation(IMPLEMENTATIONS[original])
        probe = probe_attention(base)
        reasons = find_layers(base, part, probe.calls)
        chosen = choose_layers(base, reasons, layers)
        undo += guard_learned_positions(part, schedule, probe.embeddings)
        undo += scale_rotary_embeddings(part, schedule, rope_scaling)
        undo += _mark_scaled([call.module for call in probe.calls] if rope_scaling else [])
        found = {} if memory is None else find_layer_memories(part, probe.calls, chosen)
        schedule = replace(schedule, memory=resolve_memory(memory, part.config, chosen, found, rope_scaling))
        schedule.refuse_idle_memory()
        undo += attach_memories(probe.calls, schedule.memory, found)
        settings = {"layers": chosen, "backend": backend, "rope_scaling": rope_scaling}
        told = {name: value for name, value in schedule.as_arguments().items() if name in (*SETTINGS, "memory")}
        part.config.dilated_attention = told | settings
        unbounded = why_unbounded(base)
        done = make_report(base, part.config, schedule, probe.calls, chosen, reasons, rope_scaling, unbounded)
        for piece in dict.fromkeys((base, part)):
            _set_instance_attributes(piece)
            piece.dilated_attention_report = done
        if part is not base:
            part._patched_within = type(base).__name__
        base.add_model_tags(list(TAGS))
        part._adapter_record = AdapterRecord()
    except BaseException:
        _take_back(base, original)
        if settings_before is not None:
            part.config.dilated_attention = settings_before
        raise
    logger.info(str(done))
    return model


def _take_back(model: PreTrainedModel, original: str) -> None:
    """Undoes a patch, or as much of one as was done, over the attention `original`."""
    part = text_part(model)
    for step in getattr(part, "_undo_dilated_attention", ()):
        step()
    for piece in (model, part):
        for name in INSTANCE_ATTRIBUTES:
            piece.__dict__.pop(name, None)
        tags = piece.__dict__.pop("model_tags", None) or ()
        if others := [tag for tag in tags if tag not in TAGS]:
            piece.model_tags = others
    if hasattr(part.config, "dilated_attention"):
        del part.config.dilated_attention
    part.set_attn_implementation(original)


def unpatch_model(model: nn.Module) -> nn.Module:
    """Take a patch back: the model computes what it computed before, bit for bit. Returns the same model.

    Raises:
        ValueError: for a model that is not patched.
    """
    base = unwrap(model)
    if not is_patched(base):
        raise ValueError(f"{type(base).__name__} is not patched.")
    whole = getattr(base, "_patched_within", None)
    if whole is not None:
        raise ValueError(f"{type(base).__name__} was patched as a part of {whole}: call `unpatch_model` on that.")
    original = ORIGINALS.get(attention_of(text_config_of(base.config)))
    if original is None:
        raise ValueError(
            f"{type(base).__name__} was patched by code that came with it from the Hub: load it without "
            "`trust_remote_code` to have the original."
        )
    part = text_part(base)
    part._adapter_record.keep_with(part)  # what it saves over an adapter of the patched model takes the settings away
    _take_back(base, original)
    return model


def report(model: nn.Module) -> PatchReport:
    """What the patch of a model did."""
    return text_part(unwrap(model)).dilated_attention_report


def _save_pretrained(self: PreTrainedModel, save_directory, *args, **kwargs):
    """`save_pretrained` of a patched model: records the patch beside an adapter too, and says what cannot be saved."""
    adapter = has_own_adapter(self)
    quantizer = getattr(self, "hf_quantizer", None)
    if quantizer is not None and not adapter and not quantizer.is_serializable():
        raise ValueError(DEQUANTIZE_ADVICE)
    if adapter and kwargs.get("push_to_hub"):
        raise ValueError("`save_pretrained(push_to_hub=True)` would lose the patch of an adapter: use `push_to_hub`.")
    result = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    if adapter:
        write_settings(save_directory, text_config_of(self.config).dilated_attention)
    elif kwargs.get("is_main_process", True):
        _name_as_dilated(Path(save_directory) / "config.json")
    if kwargs.get("is_main_process", True):
        write_bases(save_directory, self)
    return result


def _name_as_dilated(path: Path) -> None:
    """Names an architecture that programs which bring their own code for it (vLLM, `transformers serve`) do not know.

    They go by this name alone, and would run dense attention without a word; the Auto classes go by the model type.
    """
    config = json.loads(path.read_text())
    names = config.get("architectures") or []
    config["architectures"] = [name if name.startswith("Dilated") else f"Dilated{name}" for name in names]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _upload(self: PreTrainedModel, working_dir, repo_id: str, *args, **kwargs):
    """What a push of a patched model does last."""
    config = Path(working_dir) / "config.json"
    if config.is_file():
        _name_as_dilated(config)
    return upload_with_card(self, working_dir, repo_id, *args, **kwargs)


def _set_attn_implementation(self: PreTrainedModel, attn_implementation: str | dict, *args, **kwargs) -> None:
    """`set_attn_implementation` of a patched model, which would silently end the patch and leave its settings."""
    if attn_implementation not in list(ORIGINALS):  # it may be a dictionary
        raise ValueError(
            f"`attn_implementation` of a patched model is the patch's, got {attn_implementation!r}: call "
            "`unpatch_model(model)` first, and `patch_model` again if its other layers are to run that; the kernels of "
            "the patched layers are chosen by `patch_model(..., backend=...)`."
        )
    type(self).set_attn_implementation(self, attn_implementation, *args, **kwargs)


def unpatched_attention_of(config) -> str | None:
    """The attention of which a patched model's configuration tells that it was patched over, or None."""
    return ORIGINALS.get(attention_of(config))


def patch_as_configured(model: PreTrainedModel) -> PreTrainedModel:
    """Patch a model by the settings in its own configuration: what exported models do when they are made."""
    settings = getattr(text_config_of(model.config), "dilated_attention", None)
    if settings is None:
        raise ValueError("`config` has no `dilated_attention`: this code is for exported patched models only.")
    return patch_model(model, **settings)


def _check_settings(settings: object, source: str) -> dict:
    if not isinstance(settings, dict) or set(settings) - {"memory"} != set(SETTINGS):
        raise ValueError(f"the settings of {source} must be a dictionary of {', '.join(SETTINGS)}, got {settings!r}.")
    return settings


def _with_bases(model: PreTrainedModel, find: Callable, source: str | Path) -> PreTrainedModel:
    """The model with the dimensions that its memory was calibrated to rank in, if it was."""
    path = find(BASIS_NAME)
    if path is not None and (text_part(model).config.dilated_attention.get("memory") or {}).get("dimensions"):
        try:
            set_bases(model, read_bases(path))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    return model


def load_patched_model(
    path_or_repo: str | Path,
    *,
    base_model: str | Path | None = None,
    auto_class: type = AutoModelForCausalLM,
    is_trainable: bool = False,
    **kwargs,
) -> nn.Module:
    """Load what was saved from a patched model, patched: a whole model, or a PEFT adapter with its base model.

    Args:
        path_or_repo: a folder or Hub repository.
        base_model: for an adapter, the base model's folder or repository, where it is not the one the adapter names. It
            gets the vocabulary of the adapter, where tokens were added, as its weights or the tokenizer beside it tell.
        auto_class: the Auto class to load with. The default takes the whole of a composite model (LLaVA) too.
        is_trainable: for an adapter, whether to go on training it.
        **kwargs: for `from_pretrained` (dtype, device_map, revision, subfolder, token, ...); of an adapter, `revision`
            and `subfolder` are its own, not its base model's.

    Raises:
        ValueError: if nothing there tells of a patch.
    """
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    find = functools.partial(find_file, str(path_or_repo), **hub)
    adapter_config = find("adapter_config.json")
    if adapter_config is None:
        auto_class = head_of_composite(path_or_repo, auto_class, **kwargs)
        model = auto_class.from_pretrained(path_or_repo, **kwargs)
        settings = getattr(text_config_of(model.config), "dilated_attention", None)
        if settings is None:
            raise ValueError(f"{path_or_repo} was not saved from a patched model: load it and call `patch_model`.")
        return _with_bases(patch_model(model, **_check_settings(settings, str(path_or_repo))), find, path_or_repo)
    settings = find(SETTINGS_NAME)
    if settings is None:
        raise ValueError(f"the adapter {path_or_repo} has no {SETTINGS_NAME}: it was not saved from a patched model.")
    settings = _check_settings(json.loads(Path(settings).read_text()), str(path_or_repo))
    told = json.loads(Path(adapter_config).read_text())
    kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    if base_model is None and told.get("revision"):
        kwargs["revision"] = told["revision"]
    base_model = base_model or told.get("base_model_name_or_path")
    if not base_model:
        raise ValueError(f"the adapter {path_or_repo} does not name its base model: pass `base_model=`.")
    auto_class = head_of_composite(base_model, auto_class, **kwargs)
    model = auto_class.from_pretrained(base_model, **kwargs)
    resize_for_adapter(model, str(path_or_repo), find, trust_remote_code=kwargs.get("trust_remote_code"), **hub)
    _with_bases(patch_model(model, **settings), find, path_or_repo)
    peft_model = importlib.import_module("peft").PeftModel
    return peft_model.from_pretrained(model, str(path_or_repo), is_trainable=is_trainable, **hub)
