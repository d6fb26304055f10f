"""Code on the Hub: what a saved folder holds, and that it works for people who have nothing but Transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import SCHEDULE, tiny_config
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from modeling_longnet import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetModel,
    LongNetSlideEncoderConfig,
    LongNetSlideEncoderForImageClassification,
    LongNetSlideEncoderModel,
    LongViTConfig,
    LongViTForImageClassification,
)


# What each file is for. A new name here is one more file that every user of a checkpoint downloads and runs.
CODE = {
    "configuration_longnet.py",
    "dilated_config.py",
    "longnet_xpos_range.py",
    "modeling_longnet.py",
    "longnet_layers.py",
    "longnet_positions.py",
    "document_ids.py",
    "chunked_loss.py",
    "transformers_compat.py",
    # the operator
    "dilation_schedule.py",
    "dilated_attention.py",
    "attention_pairs.py",
    "dilation_plan.py",
    "attention_token.py",
    "triton_attention.py",
    "triton_kernels.py",
    "triton_key_kernels.py",
    "attention_blocks.py",
    "attention_kernels.py",
    # the bounded cache
    "dilated_cache.py",
    "dilated_cache_export.py",
    "dilated_cache_generation.py",
    "dilated_cache_layer.py",
    "dilated_cache_layout.py",
    # the memory: what a schedule may hold, the definition, the search, the ways to read, the cache that keeps it all
    "memory_split.py",
    "memory_spec.py",
    "memory_reference.py",
    "memory_positions.py",
    "memory_search.py",
    "memory_pieces.py",
    "memory_rows.py",
    "memory_step.py",
    "memory_store.py",
    "memory_fetching.py",
    "memory_pages.py",
    "memory_attention.py",
    "dilated_memory_layer.py",
}
SLIDE_ENCODER_CODE = CODE | {"configuration_longnet_slide_encoder.py", "modeling_longnet_slide_encoder.py"}
LONGVIT_CODE = CODE | {"configuration_longvit.py", "modeling_longvit.py"}
ENCODER = {"is_causal": False, "position_embedding_type": "rope"}


def slide_encoder(architecture=LongNetSlideEncoderModel) -> LongNetSlideEncoderModel:
    config = LongNetSlideEncoderConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, in_chans=16, **SCHEDULE
    )
    return architecture(config)


def longvit() -> LongViTForImageClassification:
    config = LongViTConfig(image_size=32, patch_size=4, num_hidden_layers=2, hidden_size=32, intermediate_size=48,
                           num_attention_heads=4, **SCHEDULE)  # fmt: skip
    return LongViTForImageClassification(config)


MODELS = {
    "causal_lm": lambda: LongNetForCausalLM(tiny_config(eos_token_id=60)),
    "masked_lm": lambda: LongNetForMaskedLM(tiny_config(**ENCODER)),
    "classification": lambda: LongNetForSequenceClassification(tiny_config(pad_token_id=0, num_labels=3)),
    "base": lambda: LongNetModel(tiny_config()),
    "slide_encoder": slide_encoder,
    "slide_classifier": lambda: slide_encoder(LongNetSlideEncoderForImageClassification),
    "longvit": longvit,
}
AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "base": "AutoModel",
    "slide_encoder": "AutoModel",
    "slide_classifier": "AutoModelForImageClassification",
    "longvit": "AutoModelForImageClassification",
}
# What a stranger runs: no package of ours, no optional kernel, no einops, and another working directory.
STRANGER = """
import json, sys
from importlib.machinery import PathFinder
from pathlib import Path
ABSENT = {"modeling_longnet", "triton", "flash_attn", "einops", "xformers", "peft", "accelerate"}

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *args, **kwargs):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, *args, **kwargs)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import torch, transformers
from safetensors.torch import load_file, save_file

folder, auto_classes = Path(sys.argv[1]), json.loads(sys.argv[2])
inputs, said = load_file(folder / "inputs.safetensors"), {}
for name, auto_class in auto_classes.items():
    auto_class = getattr(transformers, auto_class)
    try:
        auto_class.from_pretrained(folder / name, trust_remote_code=False)
    except ValueError as error:
        said[f"{name} untrusted"] = str(error)
    model = auto_class.from_pretrained(folder / name, trust_remote_code=True).eval()
    config = transformers.AutoConfig.from_pretrained(folder / name, trust_remote_code=True)
    said[f"{name} config"] = type(config).__name__
    said[f"{name} module"] = type(model).__module__.split(".")[0]
    slide = {key: inputs[key] for key in ("tile_embeds", "coords")}
    arguments = slide if name.startswith("slide_") else {"input_ids": inputs["input_ids"]}
    if name == "longvit":
        arguments = {"pixel_values": inputs["pixel_values"]}
    found = {}
    with torch.no_grad():
        for place in ("saved", "saved_again"):
            outputs = model(**arguments)
            found[place] = outputs.logits if "logits" in outputs else outputs.last_hidden_state
            if name == "causal_lm":
                generated = model.generate(
                    **arguments, max_new_tokens=60, do_sample=False, return_dict_in_generate=True, pad_token_id=0
                )
                found[place + "_tokens"] = generated.sequences
                said["cache"] = next(type(x).__name__ for x in generated.values() if hasattr(x, "get_seq_length"))
                base = transformers.AutoModel.from_pretrained(folder / name, trust_remote_code=True).eval()
                found[place + "_hidden"] = base(**arguments).last_hidden_state
            model.save_pretrained(folder / (name + "_again"))
            model = auto_class.from_pretrained(folder / (name + "_again"), trust_remote_code=True).eval()
    save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{name}.safetensors")
said["loaded"] = sorted(key for key in sys.modules if key.partition(".")[0] in ABSENT)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with one saved folder per class."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("hub_code")
    torch.manual_seed(0)
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
    inputs = {
        "input_ids": torch.randint(1, 60, (2, 50)),
        "tile_embeds": torch.randn(2, 50, 16),
        "coords": torch.randint(0, 200_000, (2, 50, 2)),
        "pixel_values": torch.randn(2, 3, 32, 32),
    }
    save_file(inputs, folder / "inputs.safetensors")
    return folder


@pytest.fixture(scope="module")
def stranger(saved) -> dict:
    """What a process says that has loaded all the folders without our package."""
    environment = {"HF_MODULES_CACHE": str(saved / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, "-c", STRANGER, str(saved), json.dumps(AUTO_CLASSES)]
    done = subprocess.run(command, cwd=saved, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def load_results(saved: Path, name: str) -> tuple[dict, dict]:
    from safetensors.torch import load_file

    inputs, found = load_file(saved / "inputs.safetensors"), load_file(saved / f"{name}.safetensors")
    slide = {key: inputs[key] for key in ("tile_embeds", "coords")}
    if name == "longvit":
        return {"pixel_values": inputs["pixel_values"]}, found
    return (slide if name.startswith("slide_") else {"input_ids": inputs["input_ids"]}), found


@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_copies_exactly_these_code_files(saved, name):
    expected = {"slide_encoder": SLIDE_ENCODER_CODE, "slide_classifier": SLIDE_ENCODER_CODE, "longvit": LONGVIT_CODE}
    expected = expected.get(name, CODE)
    assert {path.name for path in (saved / name).glob("*.py")} == expected
    assert not [path for path in (saved / name).iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", MODELS)
def test_code_files_travel_unchanged(saved, name):
    import modeling_longnet

    package = Path(modeling_longnet.__file__).parent
    for path in (saved / name).glob("*.py"):
        assert path.read_bytes() == (package / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", MODELS)
def test_every_name_in_the_auto_map_exists(saved, name):
    config = json.loads((saved / name / "config.json").read_text())
    assert {"AutoConfig", AUTO_CLASSES[name]} <= set(config["auto_map"])
    for place in config["auto_map"].values():
        file, _, class_name = place.rpartition(".")
        assert f"class {class_name}(" in (saved / name / f"{file}.py").read_text(), place


@pytest.mark.parametrize("name", MODELS)
def test_a_stranger_gets_equal_outputs(saved, stranger, name):
    import transformers

    arguments, found = load_results(saved, name)
    model = getattr(transformers, AUTO_CLASSES[name]).from_pretrained(saved / name).eval()
    with torch.no_grad():
        outputs = model(**arguments)
    expected = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    assert_close(found["saved"], expected, rtol=0, atol=1e-6)
    assert torch.equal(found["saved_again"], found["saved"])
    assert stranger[f"{name} module"] == "transformers_modules"
    assert stranger[f"{name} config"] == type(model.config).__name__


def test_a_stranger_generates_with_the_bounded_cache(saved, stranger):
    """60 tokens after 50, over segments of 8, 16 and 32: the same tokens as with a cache of all keys."""
    arguments, found = load_results(saved, "causal_lm")
    model = AutoModelForCausalLM.from_pretrained(saved / "causal_lm").eval()
    expected = model.generate(
        **arguments, max_new_tokens=60, do_sample=False, pad_token_id=0, cache_implementation="dynamic"
    )
    assert torch.equal(found["saved_tokens"], expected) and torch.equal(found["saved_again_tokens"], expected)
    assert stranger["cache"] == "DilatedCache"


def test_a_strangers_causal_lm_opens_as_the_base_model(saved, stranger):
    arguments, found = load_results(saved, "causal_lm")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(saved / "causal_lm").eval()(**arguments).last_hidden_state
    assert_close(found["saved_hidden"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_what_a_stranger_saves_is_what_was_saved(saved, stranger, name):
    files = {path.name for path in (saved / name).iterdir()}
    assert {path.name for path in (saved / f"{name}_again").iterdir()} == files
    again, first = (json.loads((saved / n / "config.json").read_text()) for n in (f"{name}_again", name))
    assert again == first
    for path in (saved / name).glob("*.py"):
        assert path.read_bytes() == (saved / f"{name}_again" / path.name).read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_nobody_runs_remote_code_unasked(stranger, name):
    assert "trust_remote_code=True" in stranger[f"{name} untrusted"]


def test_a_stranger_needs_neither_the_package_nor_optional_libraries(stranger):
    assert stranger["loaded"] == []


@pytest.mark.parametrize("name", ["causal_lm", "slide_encoder", "longvit"])
def test_transformers_finds_no_package_to_demand(saved, name):
    """It demands what any import statement outside `try` names, inside functions too, when code comes from the Hub."""
    allowed = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
    for path in (saved / name).glob("*.py"):
        assert set(get_imports(path)) <= allowed, path.name


def test_with_the_package_no_remote_code_runs(saved):
    """The installed classes win, trusted or not."""
    for trust in (None, True):
        model = AutoModelForCausalLM.from_pretrained(saved / "causal_lm", trust_remote_code=trust)
        assert type(model) is LongNetForCausalLM
        assert type(AutoConfig.from_pretrained(saved / "causal_lm", trust_remote_code=trust)) is LongNetConfig
    assert type(AutoModel.from_pretrained(saved / "slide_encoder")) is LongNetSlideEncoderModel
