"""Random and hostile calls of the public entry points: each is right or refused, and nothing else happens.

Right: equal to the naive definition, or to the same without a cache, chunks or a file between. Refused: a ValueError
of ours that names an argument that was given, or Transformers' own refusal, or what a Llama makes of the very call.

    FUZZ_CALLS=3000 FUZZ_SEED=1 python -m pytest tests/test_fuzz.py -s

A failure tells entry, seed and number of the call, which decide it: `python tests/test_fuzz.py ENTRY SEED NUMBER`.
"""

import copy
import functools
import json
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import SCHEDULE, VARIANTS, tiny_config
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from conversion.convert_torchscale_to_hf import load_torchscale
from modeling_longnet import LongNetConfig, LongNetForCausalLM, dilated_attention
from modeling_longnet.dilated_attention_reference import dilated_attention_reference
from modeling_longnet.dilated_cache import DilatedCache
from modeling_longnet.patching import is_patched, load_patched_model, patch_model, unpatch_model
from modeling_longnet.streaming import stream_loss
from modeling_longnet.transformers_compat import CACHE, named_cache


CALLS, SEED = int(os.environ.get("FUZZ_CALLS", "640")), int(os.environ.get("FUZZ_SEED", "0"))
VOCABULARY = 61
FIXTURES = Path(__file__).parent / "fixtures"
HOSTILE = (
    None, True, False, 0, 1, 2, 3, -1, 7, 1.5, -0.5, float("nan"), float("inf"), 10**20, "", "8", "sdpa", b"8", [], [0],
    [8], [8, 32], [32, 8], [1, 4], [8, "32"], [[8, 32]], (8, 32), [8.0, 32.0], [True, 4], {}, {"rope_type": "yarn"},
    {"rope_type": "linear", "factor": np.float32(2)}, {8: 32}, {8}, np.int64(8), np.float32(2.5), np.array([8, 32]),
    torch.tensor(8), torch.tensor([8, 32]), torch.tensor(float("nan")), range(8, 9), 1j, object(), len, Ellipsis,
)  # fmt: skip


class Wrong(AssertionError):
    """A call that was neither right nor refused."""


def close(found: torch.Tensor, wanted: torch.Tensor, atol: float = 2e-5) -> None:
    if found.shape != wanted.shape or not torch.allclose(
        found.double(), wanted.double(), atol=atol, rtol=atol, equal_nan=True
    ):
        differs = (found.double() - wanted.double()).abs().max() if found.shape == wanted.shape else "another shape"
        raise Wrong(f"a wrong number: {differs} (shapes {tuple(found.shape)} and {tuple(wanted.shape)})")


def spoil(rng: random.Random, arguments: dict, names: list[str], chance: float = 0.5) -> None:
    """Puts hostile values in place of up to two arguments."""
    if rng.random() < chance:
        for name in rng.sample(names, min(len(names), rng.choice([1, 1, 2]))):
            arguments[name] = rng.choice(HOSTILE)


def is_upstream(error: BaseException) -> bool:
    """Whether Transformers, or the library that checks its configurations, raised it by itself."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = [i for i, name in enumerate(frames) if "modeling_longnet" in name or "conversion" in name]
    return any(part in frames[-1] for part in ("/transformers/", "/huggingface_hub/")) and (
        not ours or isinstance(error, ValueError) or ours[-1] < len(frames) - 1
    )


def check_refusal(error: BaseException, names, twin=None) -> str:
    """"refused" or "upstream", where that is what an error is; raises what it is otherwise."""
    text = str(error)
    if isinstance(error, ValueError) and any(f"`{name}" in text or f"'{name}" in text for name in names):
        return "refused"
    if is_upstream(error):
        return "upstream"
    if twin is not None:
        try:
            twin()
        except Exception as other:
            if type(other) is type(error):
                return "upstream"
    raise Wrong(f"{type(error).__name__}: {text[:300]}") from error


def names_file(error: BaseException, folder: str) -> bool:
    return isinstance(error, ValueError) and folder in str(error)


# The operator, against its definition


def schedules(rng: random.Random) -> dict:
    count = rng.choice([1, 2, 2, 3])
    lengths = sorted(rng.choice([1, 2, 4, 5, 8, 12, 16, 32, 64, 100]) for _ in range(count))
    rates = [1, *sorted(rng.randint(1, 6) for _ in range(count - 1))]
    return {
        "segment_lengths": lengths,
        "dilation_rates": [min(rate, length) for rate, length in zip(rates, lengths)],
        "head_offsets": rng.choice(["modulo", "contiguous"]),
        "overlap": rng.choice(["count", "once"]),
        "num_sink_tokens": rng.choice([0, 0, 1, 4]),
        "local": rng.choice(["segment", "sliding"]),
    }


def fuzz_operator(rng: random.Random) -> str:
    batch, heads, groups, keys = rng.randint(1, 3), rng.choice([1, 2, 4, 6]), rng.choice([1, 2]), rng.randint(1, 90)
    heads, width, queries = heads * groups, rng.choice([1, 3, 8]), rng.randint(1, keys)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    tensors = [torch.randn(batch, n, size, width, dtype=dtype) for n, size in
               ((heads, queries), (groups, keys), (groups, keys))]  # fmt: skip
    arguments = {**schedules(rng), "is_causal": rng.random() < 0.8, "scale": rng.choice([None, 0.3])}
    if not arguments["is_causal"]:
        arguments["local"] = "segment"
        if rng.random() < 0.3:
            arguments |= {"padding": "zeros", "overlap": "count", "num_sink_tokens": 0}
    if rng.random() < 0.4:
        arguments["document_ids"] = torch.randint(-1, 3, (batch, keys)).sort(1).values
    if rng.random() < 0.2:
        arguments["query_offset"] = rng.randint(0, keys - queries)
    if rng.random() < 0.2:
        arguments["head_index_offset"] = rng.randint(0, 4)
        arguments["total_num_heads"] = heads + 4
    names = [*arguments, "document_ids", "query_offset", "head_index_offset", "total_num_heads", "dropout", "padding"]
    backend = rng.choice([None, "sdpa", "eager", "flash_attention_2", "flash"])
    spoil(rng, arguments, sorted(set(names)), 0.35)
    if rng.random() < 0.1:
        tensors[rng.randrange(3)] = rng.choice([tensors[0][0], tensors[0].long(), tensors[0].double(), None, 3])
    return_lse = rng.random() < 0.3
    try:
        found = dilated_attention(*tensors, **arguments, backend=backend, return_lse=return_lse)
    except Exception as error:
        return check_refusal(error, [*names, "query", "key", "value", "backend", "scale"])
    wide = [x.double() for x in tensors]
    if arguments.get("dropout"):
        return "right"  # of random weights; their shape is all that can be told
    if arguments.get("scale") is not None:
        arguments["scale"] = float(arguments["scale"])
    wanted = dilated_attention_reference(*wide, **arguments, return_lse=return_lse)
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(dtype, 1e-5)
    for one, other in zip(*((found, wanted) if return_lse else ((found,), (wanted,)))):
        seen = other.isfinite()
        close(one.double().masked_fill(~seen, 0), other.masked_fill(~seen, 0), tolerance)
    return "right"


# Configurations: what is taken makes a model that computes its definition, and survives a file


def fuzz_config(rng: random.Random) -> str:
    fields = {**schedules(rng), **rng.choice(list(VARIANTS.values()))}
    fields = {**tiny_config().to_dict(), **fields, "num_key_value_heads": rng.choice([1, 2, 4, None])}
    fields = {name: value for name, value in fields.items() if name in LongNetConfig.__annotations__}
    fields["max_position_embeddings"] = 128
    fields["num_hidden_layers"] = 1
    if fields.get("position_embedding_type") not in ("xpos", "rope"):
        fields["rope_parameters"] = None
    if "local" not in LongNetConfig.__annotations__ or rng.random() < 0.5:
        fields.pop("local", None)
    names = [name for name in LongNetConfig.__annotations__ if name not in ("model_type", "use_cache")]
    spoil(rng, fields, names, 0.7)
    try:
        config = LongNetConfig(**fields)
    except Exception as error:
        return check_refusal(error, [*names, "local"])
    text = config.to_json_string(use_diff=False)
    again = LongNetConfig.from_dict(json.loads(text))
    if again.to_json_string(use_diff=False) != text:
        raise Wrong("another configuration after to_json_string and from_dict")
    sizes = [config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
             config.num_attention_heads, config.max_position_embeddings, config.head_dim]  # fmt: skip
    if max(sizes) > 512:
        return "right"
    ids = torch.randint(0, config.vocab_size, (2, min(45, config.max_position_embeddings)))
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
        return "upstream"  # nn.Embedding's own affair
    try:
        model = LongNetForCausalLM(config).eval() if config.is_causal else None
    except Exception as error:
        return check_refusal(error, names)
    if model is None:
        return "right"
    with torch.no_grad():
        found = model(ids).logits
        model.set_attn_implementation("eager")
        close(found, model(ids).logits, 1e-4)
    return "right"


# Models


@functools.cache
def longnet(variant: str) -> LongNetForCausalLM:
    torch.manual_seed(0)
    config = tiny_config(**VARIANTS[variant], tie_word_embeddings=False, initializer_range=0.15)
    return LongNetForCausalLM(config).eval()


@functools.cache
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.15, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@functools.cache
def patched() -> LlamaForCausalLM:
    return patch_model(copy.deepcopy(llama()), SCHEDULE["segment_lengths"], SCHEDULE["dilation_rates"])


def some_model(rng: random.Random):
    return patched() if rng.random() < 0.4 else longnet(rng.choice(list(VARIANTS)))


@functools.cache
def naive_of(model) -> torch.nn.Module:
    """The same weights under the definition."""
    if not is_patched(model):
        naive = copy.deepcopy(model)
        naive.set_attn_implementation("eager")
        return naive
    naive = copy.deepcopy(unpatch_model(copy.deepcopy(model)))
    use_naive_attention(naive, model.config.dilated_attention)
    return naive


def use_naive_attention(model, settings: dict) -> None:
    names = ("segment_lengths", "dilation_rates", "head_offsets", "overlap", "num_sink_tokens", "local")
    arguments = {name: settings[name] for name in names}

    def naive(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out = dilated_attention_reference(query, key, value, **arguments, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("naive_of_fuzz", naive)
    AttentionMaskInterface.register("naive_of_fuzz", lambda **kwargs: None)
    model.set_attn_implementation("naive_of_fuzz")


@torch.no_grad()
def row_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] of one row alone, without mask or cache, by the definition."""
    naive = naive_of(model)
    if is_patched(model):
        use_naive_attention(naive, model.config.dilated_attention)  # the name may be another model's by now
    return naive(ids[None], use_cache=False).logits[0]


def some_mask(rng: random.Random, batch: int, length: int) -> torch.Tensor | None:
    kind = rng.choice(["none", "none", "ones", "left", "left", "right", "holes"])
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=rng.choice([torch.long, torch.bool, torch.float32, torch.int32]))
    for row in mask:
        pad = rng.randint(0, length - 1)
        if kind == "left":
            row[:pad] = 0
        if kind == "right":
            row[length - pad :] = 0
        if kind == "holes":
            row[rng.randrange(length)] = 0
    return mask


def fuzz_forward(rng: random.Random) -> str:
    model, batch, length = some_model(rng), rng.randint(1, 3), rng.randint(1, 90)
    ids = torch.randint(0, VOCABULARY, (batch, length))
    mask = some_mask(rng, batch, length)
    arguments = {"input_ids": ids, "attention_mask": mask}
    if mask is not None and rng.random() < 0.5:
        arguments["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    if rng.random() < 0.3:
        arguments["use_cache"] = True
    if rng.random() < 0.2:
        arguments["labels"] = ids
    if rng.random() < 0.2:
        arguments["output_hidden_states"] = True
    names = ["attention_mask", "position_ids", "inputs_embeds", "labels", "logits_to_keep", "use_cache", CACHE,
             "token_type_ids", "cu_seq_lens_q"]  # fmt: skip
    if rng.random() < 0.3:
        shapes = [(batch, length + 1), (length,), (batch, 1), (1, 1, length), ()]
        name, shape = rng.choice(names[:5]), rng.choice(shapes)
        arguments[name] = torch.randint(0, 2, shape)
    before = dict(arguments)
    spoil(rng, arguments, names, 0.25)
    chunks = None
    if arguments.keys() == before.keys() and all(arguments[name] is before[name] for name in before):
        cut = rng.randint(0, length)
        chunks = [cut, length - cut] if 0 < cut < length and mask is None and rng.random() < 0.4 else None

    def call(model):
        with torch.no_grad():
            if chunks is None:
                return model(**arguments).logits
            cache = rng.choice([DilatedCache, lambda config: DynamicCache(config=config)])(model.config)
            parts = [model(part, **named_cache(cache)).logits for part in ids.split(chunks, 1)]
            return torch.cat(parts, 1)

    try:
        found = call(model)
    except Exception as error:
        return check_refusal(error, [*names, "cache"], lambda: llama()(**arguments))
    told = arguments.get("position_ids")
    plain = told is None or mask is not None and told is before.get("position_ids")
    keep = "logits_to_keep" in arguments
    embeds = arguments.get("inputs_embeds")
    if not plain or keep or embeds is not None or arguments["attention_mask"] is not mask:
        return "right"  # nothing to compare with is at hand
    for row, logits, real in zip(ids, found, torch.ones_like(ids) if mask is None else mask):
        kept = real.bool()
        if told is None and model.config.model_type != "longnet" and not bool(kept[: int(kept.sum())].all()):
            continue  # Llama numbers padded tokens from the row's beginning, where nobody tells it otherwise
        if kept.any():
            close(logits[kept], row_logits(model, row[kept]))
    return "right"


def fuzz_generate(rng: random.Random) -> str:
    model, batch, length = some_model(rng), rng.randint(1, 3), rng.randint(1, 40)
    ids = torch.randint(0, VOCABULARY, (batch, length))
    mask = torch.ones_like(ids)
    if rng.random() < 0.5:
        for row in mask:
            row[: rng.randint(0, length - 1)] = 0
    arguments = {"max_new_tokens": rng.randint(1, 24), "num_beams": rng.choice([1, 1, 1, 2, 3])}
    ways = [{}, {}, {}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"}]
    ways += [{"prefill_chunk_size": rng.randint(1, 9)}, {"prompt_lookup_num_tokens": rng.randint(1, 5)}]
    cache = rng.choice(ways)
    if "prompt_lookup_num_tokens" in cache:
        ids, mask, arguments["num_beams"] = ids[:1], mask[:1], 1
    names = ["max_new_tokens", "num_beams", "cache_implementation", "attention_mask", "use_cache", CACHE,
             "prefill_chunk_size", "temperature", "num_return_sequences"]  # fmt: skip
    hostile: dict = {}
    spoil(rng, hostile, names, 0.3)
    given = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, **arguments, **cache, **hostile}
    if not isinstance(given["max_new_tokens"], int) or given["max_new_tokens"] > 24:
        given["max_new_tokens"] = 4

    def call(model):
        return model.generate(ids, **given)

    try:
        found = call(model)
    except Exception as error:
        return check_refusal(error, [*names, "cache", "past_key_values"], lambda: call(llama()))
    if hostile:
        return "right"
    wanted = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, use_cache=False, **arguments)
    if not torch.equal(found, wanted):
        first = int((found != wanted).any(0).nonzero()[0])
        top = torch.stack([row_logits(model, row[:first][real.bool() if len(real) == first else
              torch.cat([real.bool(), torch.ones(first - len(real), dtype=torch.bool)])])[-1].topk(2).values
              for row, real in zip(wanted, mask)])  # fmt: skip
        if arguments["num_beams"] > 1 or float((top[:, 0] - top[:, 1]).min()) < 1e-4:
            return "tie"
        raise Wrong(f"other tokens than without a cache, from place {first}")
    return "right"


# Patching, files, streams, conversion


def fuzz_patch(rng: random.Random) -> str:
    model = copy.deepcopy(llama())
    backend = rng.choice([None, "sdpa", "eager"])
    arguments = {**schedules(rng), "layers": rng.choice([None, None, [0, 1]]), "backend": backend}
    if rng.random() < 0.2:
        arguments["rope_scaling"] = {"rope_type": rng.choice(["yarn", "linear"]), "factor": 2.0}
    names = [*arguments, "rope_scaling"]
    spoil(rng, arguments, names)
    ids = torch.randint(0, VOCABULARY, (2, 70))
    keys = set(vars(model))
    with torch.no_grad():
        before = model(ids).logits
        try:
            patch_model(model, **arguments)
        except Exception as error:
            if callable(arguments.get("layers")):
                return "upstream"  # the caller's own function
            verdict = check_refusal(error, names)
            if is_patched(model) or set(vars(model)) != keys or not torch.equal(model(ids).logits, before):
                raise Wrong(f"refused, but the model is not as it was: {error}") from error
            return verdict
        settings = model.config.dilated_attention
        if json.loads(json.dumps(settings)) != settings:
            raise Wrong(f"settings that do not survive JSON: {settings}")
        found = model(ids).logits
        cache = DilatedCache(model.config)
        parts = [model(part, **named_cache(cache)).logits for part in ids.split([33, 1, 36], 1)]
        length_dependent = (settings["rope_scaling"] or {}).get("rope_type") in ("dynamic", "longrope")
        if not length_dependent:
            close(torch.cat(parts, 1), found)
        if settings["layers"] == [0, 1] and not settings["rope_scaling"]:
            plain = unpatch_model(copy.deepcopy(model))
            use_naive_attention(plain, settings)
            close(found, plain(ids).logits)
        with tempfile.TemporaryDirectory() as folder:
            copy.deepcopy(model).save_pretrained(folder)
            close(load_patched_model(folder)(ids).logits, found)
        if not torch.equal(unpatch_model(model)(ids).logits, before):
            raise Wrong("unpatching did not restore the model")
    return "right"


def fuzz_load(rng: random.Random) -> str:
    """A folder of a patched model whose files somebody has edited."""
    model, ids = patched(), torch.randint(0, VOCABULARY, (1, 50))
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(model).save_pretrained(folder)
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text())
        settings = config["dilated_attention"]
        kind = rng.choice(["value", "value", "value", "missing", "extra", "all", "cut", "nothing"])
        names = sorted(settings)
        if kind == "value":
            value = rng.choice(HOSTILE)
            try:
                json.dumps(value)
            except TypeError:
                value = str(value)
            settings[rng.choice(names)] = value
        if kind == "missing":
            del settings[rng.choice(names)]
        if kind == "extra":
            settings[rng.choice(["x", "local_", "layer"])] = 1
        if kind == "all":
            config["dilated_attention"] = rng.choice([None, [], "x", 3, {}])
        path.write_text(json.dumps(config))
        if kind == "cut":
            file = rng.choice(list(Path(folder).glob("*.*")))
            data = file.read_bytes()
            file.write_bytes(data[: rng.randrange(len(data))])
        try:
            loaded = load_patched_model(folder)
        except Exception as error:
            if kind == "cut" and type(error).__name__ in ("SafetensorError", "JSONDecodeError", "OSError"):
                return "upstream"
            return "refused" if names_file(error, folder) else check_refusal(error, names)
    with torch.no_grad():
        found = loaded(ids).logits
        if loaded.config.dilated_attention == model.config.dilated_attention:
            close(found, model(ids).logits)
        elif settings.get("layers") == [0, 1] and not settings.get("rope_scaling"):
            plain = unpatch_model(copy.deepcopy(loaded))
            use_naive_attention(plain, loaded.config.dilated_attention)
            close(found, plain(ids).logits)
    return "right"


def fuzz_stream(rng: random.Random) -> str:
    model, length = some_model(rng), rng.randint(0, 120)
    if length > 90 and model.config.to_dict().get("position_embedding_type") == "learned":
        length = 90
    tokens = torch.randint(0, VOCABULARY, (length,))
    arguments = {"tokens": rng.choice([tokens, tokens.tolist(), tokens.numpy()]), "chunk_size": rng.randint(1, 130)}
    names = ["tokens", "chunk_size", "save_every"]
    spoil(rng, arguments, names, 0.35)
    with tempfile.TemporaryDirectory() as folder:
        if rng.random() < 0.3:
            arguments["state_path"] = Path(folder) / "state.safetensors"
            if rng.random() < 0.3:
                arguments["state_path"].write_bytes(rng.randbytes(rng.randint(0, 200)))
        names.append("state_path")
        try:
            found = stream_loss(model, **arguments, progress=False)
        except Exception as error:
            return "refused" if names_file(error, folder) else check_refusal(error, [*names, "model"])
    text = torch.as_tensor(arguments["tokens"]).long()
    logits = row_logits(model, text)
    wanted = torch.nn.functional.cross_entropy(logits[:-1].double(), text[1:])
    close(torch.tensor(found.loss, dtype=torch.float64), wanted)
    return "right"


@functools.cache
def torchscale_file(name: str) -> tuple[dict, dict]:
    tensors = torch.load(FIXTURES / f"{name}.pt", weights_only=True)["model"]
    return tensors, json.loads((FIXTURES / f"{name}.args.json").read_text())


def fuzz_convert(rng: random.Random) -> str:
    name = rng.choice(["torchscale_decoder_xpos", "torchscale_decoder_learned_positions", "torchscale_encoder"])
    tensors, arguments = (dict(part) for part in torchscale_file(name))
    keys = sorted(tensors)
    kinds = ["nothing"] * 3 + ["argument"] * 3 + ["no argument", "tensor", "no tensor", "more", "nan"]
    kind = rng.choice(kinds)
    touched = [rng.choice(sorted(arguments)), rng.choice(keys)]
    if kind == "argument":
        arguments[touched[0]] = rng.choice([v for v in HOSTILE if isinstance(v, (int, float, str, list, type(None)))])
    if kind == "no argument":
        del arguments[touched[0]]
    if kind == "no tensor":
        del tensors[touched[1]]
    if kind == "tensor":
        x = tensors[touched[1]]
        others = [x[:-1], x.long(), x[None], x.double(), x.to(torch.complex64), x[..., :0]]
        tensors[touched[1]] = rng.choice(others).clone()
    if kind == "more":
        touched[1] = "layers.9.self_attn.q_proj.weight"
        tensors[touched[1]] = torch.ones(2)
    if kind == "nan":
        tensors[touched[1]] = torch.full_like(tensors[touched[1]], float("nan"))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, config = Path(folder) / "model.safetensors", Path(folder) / "args.json"
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, checkpoint)
        config.write_text(json.dumps(arguments))
        try:
            dtype = rng.choice([None, None, None, None, "float32", "float8", 3])
            model, rows = load_torchscale(checkpoint, config, dtype)
        except Exception as error:
            return "refused" if names_file(error, folder) else check_refusal(error, ["dtype"])
    state = model.state_dict()
    for source, target, _ in rows:
        wanted = tensors.get(source)  # not of what is tied, zeros or computed
        if wanted is None or target not in state or wanted.isnan().any():
            continue
        if not torch.equal(state[target].double(), wanted.double()):
            raise Wrong(f"{target} is not what {source} was")
    return "right"


ENTRIES = {
    name.removeprefix("fuzz_"): function for name, function in list(globals().items()) if name.startswith("fuzz_")
}


def run(entry: str, seed: int, number: int) -> str:
    rng = random.Random(f"{entry} {seed} {number}")
    torch.manual_seed(rng.getrandbits(31))
    np.random.seed(rng.getrandbits(31))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ENTRIES[entry](rng)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_call_is_right_or_refused(entry):
    counts, wrong = Counter(), []
    for number in range(max(1, CALLS // len(ENTRIES))):
        try:
            counts[run(entry, SEED, number)] += 1
        except Exception as error:
            kind = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
            wrong.append(f"{entry} {SEED} {number}: {kind[:400]}")
    print(f"\n{entry}: {sum(counts.values()) + len(wrong)} calls, {dict(counts)}, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)
    assert counts["right"] >= sum(counts.values()) // 10, f"next to nothing was taken: {counts}"


if __name__ == "__main__":
    print(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
