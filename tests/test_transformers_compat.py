"""The seam to Transformers: a release of it may make us refuse, never make us wrong."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config
from transformers import DynamicCache, GenerationMixin, LlamaConfig, LlamaForCausalLM

from modeling_longnet import DilatedCache, LongNetForCausalLM, LongNetForMaskedLM, LongNetModel, patch_model
from modeling_longnet.transformers_compat import CACHE, CACHE_NAMES, MODEL_DECLARATIONS, named_cache, release


ROOT = Path(__file__).parent.parent
SEAM = ROOT / "modeling_longnet/transformers_compat.py"
OURS = [
    path
    for folder in ("modeling_longnet", "conversion", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != SEAM
]
# Where modules of Transformers are documented for people who add a model.
PUBLIC_MODULES = {
    "transformers", "transformers.activations", "transformers.cache_utils", "transformers.configuration_utils",
    "transformers.modeling_layers", "transformers.modeling_outputs", "transformers.modeling_rope_utils",
    "transformers.modeling_utils", "transformers.processing_utils", "transformers.pytorch_utils",
    "transformers.trainer_utils", "transformers.utils",
}  # fmt: skip
VARIANTS = {
    "paper": {},
    "rope-grouped": {"position_embedding_type": "rope", "num_key_value_heads": 2, "overlap": "once"},
}


def hungry(kind: str):
    """A model whose next token depends on all of its context: untied, with large weights."""
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
        return patch_model(LlamaForCausalLM(config).eval(), [8, 32], [1, 4])
    config = tiny_config(tie_word_embeddings=False, eos_token_id=None, **VARIANTS[kind])
    model = LongNetForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
    return model


def words_of(tree: ast.AST) -> set[str]:
    """Private names that a file's code mentions: attributes, keywords, strings and what it imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.Name)):
            found.add(node.name if isinstance(node, ast.FunctionDef) else node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"\b_[a-z]\w+", node.value))
    return {name for name in found if re.fullmatch(r"_[a-z]\w+", name)}


def private_names_of_transformers() -> set[str]:
    """Every private name that Transformers' base classes, the Trainer and the Auto classes define."""
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    classes = [
        transformers.PreTrainedModel, transformers.PreTrainedConfig, GenerationMixin, transformers.Cache,
        transformers.AttentionInterface, _BaseAutoModelClass, transformers.Trainer,
        transformers.utils.PushToHubMixin,
    ]  # fmt: skip
    names = {name for cls in classes for base in cls.__mro__[:-1] for name in vars(base)}
    names |= {"_attn_implementation", "_is_hf_initialized", "_hf_peft_config_loaded", "_model_mapping", "_auto_class",
              "_raise_exceptions_for_missing_entries", "_loss_shifts_labels"}  # fmt: skip
    return {name for name in names if re.fullmatch(r"_[a-z]\w+", name)} - set(vars(torch.nn.Module))


def trespasses(source: str) -> list[str]:
    """What a file may not say: private names of Transformers, its unstable modules, and its version."""
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            and node.value.id == "self" and isinstance(node.ctx, ast.Store)}  # fmt: skip
    inherited = {name for name in GenerationMixin.__dict__ if name.startswith("_prepare")}
    private = private_names_of_transformers() - set(MODEL_DECLARATIONS) - (own - inherited)
    found = sorted(words_of(tree) & private)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("transformers"):
            if node.module not in PUBLIC_MODULES:
                found.append(node.module)
        if isinstance(node, ast.Compare) and "transformers.__version__" in ast.unparse(node):
            found.append("transformers.__version__")
    return found


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_seam_uses_private_names_unstable_modules_and_versions(path):
    # That study runs two of Transformers' models with a faster loop in place of their own, and says so.
    replaced = ["transformers.models.mamba", "transformers.models.rwkv"]
    assert trespasses(path.read_text()) == (replaced if path.name == "transformers_models.py" else [])


@pytest.mark.parametrize(
    "planted, told",
    [
        ("x = config._attn_implementation", "_attn_implementation"),
        ("def _prepare_cache_for_generation(self): pass", "_prepare_cache_for_generation"),
        ("from transformers.utils.generic import check_model_inputs", "transformers.utils.generic"),
        ("import transformers\nif transformers.__version__ >= '5.24': pass", "transformers.__version__"),
        ("getattr(model, '_hf_peft_config_loaded', None)", "_hf_peft_config_loaded"),
        ("cached_file(p, n, _raise_exceptions_for_missing_entries=False)", "_raise_exceptions_for_missing_entries"),
    ],
)
def test_a_planted_trespass_is_found(planted, told):
    assert trespasses(planted) == [told]


def test_setup_and_seam_tell_the_same_window():
    from modeling_longnet.transformers_compat import NEWEST_TESTED, OLDEST_TESTED

    bounds = re.search(r"transformers>=([\d.]+),<([\d.]+)", (ROOT / "setup.cfg").read_text())
    (major, minor), oldest = NEWEST_TESTED, ".".join(map(str, OLDEST_TESTED))
    assert bounds.groups() == (oldest, f"{major}.{minor + 1}")


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_importing_prints_nothing_and_warns_of_nothing():
    done = python(
        "import sys; sys.modules['torchao'] = None\nimport warnings; warnings.simplefilter('error')\n"
        "import modeling_longnet; from modeling_longnet import *; from modeling_longnet import streaming"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_release_outside_the_window_is_warned_of_once():
    done = python("import transformers; transformers.__version__ = '5.99.0'\nimport modeling_longnet")
    assert done.returncode == 0 and done.stderr.count("this is 5.99.0") == 1
    assert re.search(r"tested with Transformers 5\.17 to 5\.\d+", done.stderr)


@pytest.mark.parametrize(
    "change, told",
    [
        ("""def prepare_inputs_for_generation(self, input_ids, kv_state=None, **kwargs): pass
GenerationMixin.prepare_inputs_for_generation = prepare_inputs_for_generation""", "under a name that"),
        ("del GenerationMixin._prepare_cache_for_generation", "prepares its cache in a way"),
        ("""def prepare(self, generation_config, model_kwargs, state): pass
GenerationMixin._prepare_cache_for_generation = prepare""", "prepares its cache in a way"),
    ],
)  # fmt: skip
def test_a_release_whose_seam_has_moved_is_refused_at_import(change, told):
    done = python(f"from transformers import GenerationMixin\n{change}\nimport modeling_longnet")
    assert done.returncode and "ImportError" in done.stderr and told in done.stderr


# The cache argument


@pytest.mark.parametrize("model_class", [LongNetForCausalLM, LongNetModel])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_is_taken_by_either_name(model_class, name):
    model, ids = model_class(tiny_config()).eval(), torch.randint(3, 61, (1, 20))
    whole = model(ids)[0]
    cache = DynamicCache(config=model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        parts = [model(part, **{name: cache})[0] for part in ids.split([9, 11], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_two_caches_under_the_two_names_are_refused():
    model, ids = LongNetForCausalLM(tiny_config()).eval(), torch.randint(3, 61, (1, 5))
    caches = {name: DynamicCache(config=model.config) for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="two names of one argument, got both"):
        model(ids, **caches)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_prompts_of_an_adapter_are_read_or_refused_in_generation(kind):
    """PEFT looks for the cache by the name of its own time: where it finds none, it would lose the prompts."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(LongNetForCausalLM(tiny_config(initializer_range=0.15)), config).eval()
    torch.nn.init.normal_(next(model.prompt_encoder.parameters()))
    ids = torch.randint(3, 61, (2, 20))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for use_cache in (True, False) if kind == "PromptTuning" else (True,):
        try:
            tokens = model.generate(input_ids=ids, use_cache=use_cache, **options)
        except ValueError as error:
            assert use_cache and CACHE == "cache" and "would lose the prompts of this adapter" in str(error)
            continue
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, -tokens.shape[1] :]
        assert torch.equal(logits[:, 19:-1].argmax(-1), tokens[:, 20:])


def test_the_old_name_warns_where_upstream_does():
    model, ids = LongNetForCausalLM(tiny_config()).eval(), torch.randint(3, 61, (1, 5))
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        model(ids, past_key_values=DynamicCache(config=model.config))
    told = [str(warning.message) for warning in noted if warning.category is FutureWarning]
    assert bool(told) == (CACHE == "cache") and all("`past_key_values` is deprecated" in text for text in told)


def test_outputs_have_the_field_of_the_release():
    out = LongNetForCausalLM(tiny_config()).eval()(torch.randint(3, 61, (1, 5)), use_cache=True)
    assert [name for name in CACHE_NAMES if name in out.keys()] == [CACHE]
    assert (CACHE == "cache") == (release() >= (5, 24))


# What carries meaning is used or refused


@pytest.mark.parametrize(
    "name, value",
    [
        ("kv_state", DynamicCache()),
        ("cache_params", DynamicCache()),
        ("head_mask", torch.ones(2)),
        ("padding_mask", torch.ones(2, 5)),
        ("cache_position", torch.arange(5)),
        ("positions", [0, 1, 2, 3, 4]),
        ("token_type_ids", torch.ones(2, 5, dtype=torch.long)),
        ("encoder_hidden_states", torch.zeros(2, 5, 32)),
        ("past_length", 3),
    ],
)
@pytest.mark.parametrize("kind", ["paper", "llama", "masked"])
def test_a_keyword_that_carries_state_is_refused_by_name(kind, name, value):
    if kind == "masked":
        model = LongNetForMaskedLM(tiny_config(is_causal=False, position_embedding_type="rope")).eval()
    else:
        model = hungry(kind)
    with pytest.raises(ValueError, match=name if kind != "llama" else f"{name}|`cache`"):
        model(torch.randint(3, 61, (2, 5)), **{name: value})


@pytest.mark.parametrize("kind", ["paper", "llama"])
def test_keywords_that_say_nothing_are_no_matter(kind):
    model, ids = hungry(kind), torch.randint(3, 61, (2, 5))
    said = {"token_type_ids": torch.zeros(2, 5, dtype=torch.long), "head_mask": None, "return_dict": True,
            "output_router_logits": False}  # fmt: skip
    assert torch.equal(model(ids, **said).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["paper", "llama"])
def test_a_planted_rename_of_the_cache_is_refused_by_name(kind, monkeypatch):
    """As a release would rename it: `generate` and its helpers say `kv_state`, the model still says `cache`."""
    model, prepare = hungry(kind), GenerationMixin.prepare_inputs_for_generation

    def renamed(self, input_ids, *args, **kwargs):
        inputs = prepare(self, input_ids, *args, **kwargs)
        return inputs | {"kv_state": inputs.pop(CACHE)}

    renamed.__wrapped__ = prepare
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", renamed)
    with pytest.raises(ValueError, match="kv_state|sets it aside"):
        model.generate(torch.randint(3, 61, (1, 20)), max_new_tokens=5, do_sample=False)
    forward = type(model).forward

    def forward_renamed(self, **kwargs):
        cache = next((kwargs.pop(name) for name in CACHE_NAMES if name in kwargs), None)
        return forward(self, **kwargs, kv_state=cache)

    monkeypatch.undo()
    monkeypatch.setattr(type(model), "forward", forward_renamed)
    with pytest.raises(ValueError, match="kv_state"):
        model.generate(torch.randint(3, 61, (1, 20)), max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("kind", ["paper", "llama"])
def test_a_cache_that_no_forward_reads_is_refused(kind, monkeypatch):
    model = hungry(kind)
    forward = type(model).forward

    def forgetful(self, **kwargs):
        return forward(self, **{name: value for name, value in kwargs.items() if name not in CACHE_NAMES})

    monkeypatch.setattr(type(model), "forward", forgetful)
    with pytest.raises(ValueError, match="goes on with 1 of 22 tokens"):
        model.generate(torch.randint(3, 61, (1, 20)), max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("kind", ["paper", "llama"])
def test_a_cache_that_is_dropped_on_the_way_is_refused(kind, monkeypatch):
    """As Phi-3 does where its text outgrows the short factors of its positions."""
    model, prepare = hungry(kind), GenerationMixin.prepare_inputs_for_generation

    def dropping(self, input_ids, *args, **kwargs):
        inputs = prepare(self, input_ids, *args, **kwargs)
        return inputs if input_ids.shape[1] < 23 else inputs | {CACHE: None}

    dropping.__wrapped__ = prepare
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", dropping)
    with pytest.raises(ValueError, match="sets it aside for this step"):
        model.generate(torch.randint(3, 61, (1, 20)), max_new_tokens=5, do_sample=False)


# Greedy tokens with a cache are those without one, in every way of decoding


def assistant(model):
    torch.manual_seed(5)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    bos_token_id=None, eos_token_id=None)
    ).eval()  # fmt: skip


DECODING = {
    "default": lambda model: {},
    "static": lambda model: {"cache_implementation": "static"},
    "dynamic": lambda model: {"cache_implementation": "dynamic"},
    "passed bounded": lambda model: named_cache(DilatedCache(model.config)),
    "passed growing": lambda model: named_cache(DynamicCache(config=model.config)),
    "assisted": lambda model: {"assistant_model": assistant(model)},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "prefill in chunks": lambda model: {"prefill_chunk_size": 8},
}


@pytest.mark.parametrize("mode", DECODING)
@pytest.mark.parametrize("kind", [*VARIANTS, "llama"])
def test_greedy_tokens_with_a_cache_are_those_without(kind, mode):
    model, ids = hungry(kind), torch.randint(3, 61, (1, 50))
    expected = model.generate(ids, max_new_tokens=40, do_sample=False, use_cache=False)
    assert len(set(expected[0, 50:].tolist())) > 10, "a model that repeats itself would not notice a lost context"
    found = model.generate(ids, max_new_tokens=40, do_sample=False, **DECODING[mode](model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [*VARIANTS, "llama"])
def test_beams_with_a_cache_are_those_without(kind):
    model, ids = hungry(kind), torch.randint(3, 61, (2, 30))
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
