"""The causal and the composite language models of the installed Transformers, made tiny: by the names of the fields."""

import dataclasses

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel


WIDTH, HEADS, LAYERS, VOCABULARY, POSITIONS = 32, 4, 2, 97, 256
LARGEST = 150_000_000  # parameters
FIELDS = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "n_words", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "word_embed_proj_dim", "dim_model",
         "attention_hidden_size", "emb_dim", "dim", "cross_attention_hidden_size", "lru_width", "hidden_dim"), WIDTH),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
         "num_decoder_layers", "num_encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
         "num_decoder_attention_heads", "num_encoder_attention_heads", "index_n_heads", "linear_num_value_heads",
         "linear_num_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(
        ("num_key_value_heads", "linear_num_key_heads", "n_kv_heads", "swa_num_key_value_heads"), HEADS // 2),
    **dict.fromkeys(
        ("head_dim", "attention_head_dim", "v_head_dim", "qk_nope_head_dim", "q_lora_rank", "kv_lora_rank",
         "linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "dim_head", "kv_channels",
         "hidden_size_per_layer_input", "global_head_dim", "swa_head_dim", "qk_rope_head_dim", "linear_head_dim",
         "mamba_d_head", "mamba_head_dim"), WIDTH // HEADS),
    **dict.fromkeys(("rotary_dim",), 4),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dff", "dim_ff", "d_ff",
         "ffn_hidden_size", "block_ff_dim", "feed_forward_size"), 2 * WIDTH),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
         "shared_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"), WIDTH // 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions", "max_target_positions"), POSITIONS),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
         "resid_dropout"), 0),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 2 * WIDTH // (WIDTH // HEADS)),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("image_size", "patch_size"), 16),
    "pad_token_id": 0,
    "initializer_range": 0.15,
    "layerdrop": 0,
    "is_decoder": True,
}  # fmt: skip
TINY_LLAMA = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2,
    "max_position_embeddings": POSITIONS, "initializer_range": 0.15,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
# What the names do not tell. A family whose first layers are of another kind gets one of its full ones too.
FAMILIES: dict[str, dict] = {
    **dict.fromkeys(
        ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "gemma2", "gemma3_text", "gpt_oss", "granite_swa",
         "granitemoe_swa", "kolibri1", "ministral", "olmo3", "vaultgemma", "dory", "lara_mini", "flint", "laguna",
         "mellum", "mimo_v2_flash", "modernbert-decoder", "gemma4_text", "gemma4_unified_text", "cwm"), SLIDING),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "olmo_hybrid", "bailing_hybrid",
         "kimi_linear"), LINEAR),
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "mistral": {"sliding_window": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * LAYERS,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "gemma3n_text": {**SLIDING, "num_kv_shared_layers": 0, "laurel_rank": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "reformer": {"attn_layers": ["local", "local"], "attention_head_size": 8, "axial_pos_shape": [16, 16],
                 "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {"shape_vocab_size": VOCABULARY, "pronunciation_vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}  # fmt: skip


TINY_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "image_size": 16,
    "patch_size": 4, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "projection_dim": WIDTH,
}  # fmt: skip
TINY_WHISPER = {
    "model_type": "qwen2_audio_encoder", "d_model": WIDTH, "encoder_layers": 1, "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": WIDTH, "num_mel_bins": 8, "max_source_positions": 8,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
PARTS = {"text_config": TINY_LLAMA, "vision_config": TINY_CLIP, "audio_config": TINY_WHISPER}
COMPOSITES: dict[str, dict] = {
    **dict.fromkeys(("llava", "vipllava", "llava_next", "llava_next_video"),
                    {"vision_feature_layer": -1, "image_token_id": 90, "image_seq_length": 16}),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm4v", "glm_ocr"), {"mrope_section": [2, 1, 1]}),
    "qwen2_5_vl": {"mrope_section": [2, 1, 1],
                   "vision_config": {"out_hidden_size": WIDTH, "window_size": 64, "fullatt_block_indexes": [1]}},
    "glm4v_moe": {"mrope_section": [1, 1, 0]},
    "fuyu": {"text_config": {**TINY_LLAMA, "model_type": "persimmon", "num_key_value_heads": HEADS}},
    "gemma3": {"text_config": SLIDING},
    "paligemma": {"text_config": {**TINY_LLAMA, "model_type": "gemma"}},
}  # fmt: skip


def tiny_fields(config_class: type[PreTrainedConfig], **changes) -> dict:
    """Arguments for a configuration of this class that make it tiny, those of its parts included."""
    known = {field.name: field.type for field in dataclasses.fields(config_class)}
    named = {config_class.attribute_map.get(name, name): value for name, value in FIELDS.items()}
    fields = {name: value for name, value in {**FIELDS, **named}.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has no groups
        fields["num_key_value_heads"] = HEADS
    for name, value in fields.items():
        if value == 0 and name not in ("pad_token_id",) and "float" in str(known[name]):
            fields[name] = 0.0  # these fields are strict
    for name, part in config_class.sub_configs.items():
        if dataclasses.is_dataclass(part):
            fields[name] = tiny_fields(part)
            if name == "text_config" and "mrope_section" in changes:
                fields[name]["rope_parameters"] = {**ROPE, "mrope_section": changes.pop("mrope_section")}
        elif name in PARTS:
            fields[name] = PARTS[name]
        if isinstance(changes.get(name), dict) and "model_type" not in changes[name]:
            fields[name] = {**fields[name], **changes.pop(name)}
    return {**fields, **changes}


def make_tiny(model_type: str, auto_class: str = "AutoModelForCausalLM", **changes) -> PreTrainedModel:
    """A model of random weights that depends on its whole context.

    Raises:
        ValueError: it would not be tiny.
    """
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[model_type]
    tables = FAMILIES if auto_class == "AutoModelForCausalLM" else COMPOSITES
    config = config_class(**tiny_fields(config_class, **{**tables.get(model_type, {}), **changes}))
    with torch.device("meta"):
        size = sum(x.numel() for x in getattr(transformers, auto_class).from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    return getattr(transformers, auto_class).from_config(config).eval()
