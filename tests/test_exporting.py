"""Exported patched models: patched with the folder's own code, the original without, and no package in sight."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_packaging import RELATIVE_IMPORT
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import get_imports

from modeling_longnet.exporting import export_patched_model
from modeling_longnet.patching import is_patched, load_patched_model, patch_model, unpatch_model


SCHEDULE = {"segment_lengths": [8, 16, 32], "dilation_rates": [1, 2, 4], "num_sink_tokens": 2}
SMALL = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": None}
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64, **SMALL)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **SMALL)),
}  # fmt: skip
EXTRAS = {"llama": {"layers": [1], "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "gpt2": {}}
STRANGER = """
import json, sys
from importlib.machinery import PathFinder
from pathlib import Path
ABSENT = {"modeling_longnet", "peft", "triton", "flash_attn", "einops"}

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *args, **kwargs):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, *args, **kwargs)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline

folder, said = Path(sys.argv[1]), {}
input_ids = load_file(folder / "inputs.safetensors")["input_ids"]
for name in ("llama", "gpt2"):
    found = {}
    with torch.no_grad():
        vanilla = AutoModelForCausalLM.from_pretrained(folder / name).eval()
        found["vanilla"] = vanilla(input_ids).logits
        patched, info = AutoModelForCausalLM.from_pretrained(
            folder / name, trust_remote_code=True, output_loading_info=True
        )
        found["patched"] = patched.eval()(input_ids).logits
        found["tokens"] = patched.generate(input_ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
        patched.save_pretrained(folder / f"{name}_again")
        again = AutoModelForCausalLM.from_pretrained(folder / f"{name}_again", trust_remote_code=True).eval()
        found["again"] = again(input_ids).logits
        made = AutoModelForCausalLM.from_config(patched.config, trust_remote_code=True).eval()
        made.load_state_dict(patched.state_dict())
        found["from_config"] = made(input_ids).logits
    said[name] = {
        "names": [type(vanilla).__module__.split(".")[0], type(patched).__module__.split(".")[0]],
        "classes": [type(vanilla).__name__, type(patched).__name__],
        "missing": sorted(info["missing_keys"]),
        "implementation": patched.config._attn_implementation,
    }
    save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{name}.safetensors")
print(json.dumps(said))
"""


def patched_model(name: str):
    torch.manual_seed(0)
    return patch_model(MODELS[name]().eval(), **SCHEDULE, **EXTRAS[name])


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for name in MODELS:
        export_patched_model(patched_model(name), folder / name)
    save_file({"input_ids": torch.randint(1, 61, (2, 60))}, folder / "inputs.safetensors")
    return folder


def read_input_ids(folder: Path) -> torch.Tensor:
    return load_file(folder / "inputs.safetensors")["input_ids"]


@pytest.fixture(scope="module")
def stranger(exported) -> dict:
    environment = {"HF_MODULES_CACHE": str(exported / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, "-c", STRANGER, str(exported)]
    done = subprocess.run(command, cwd=exported, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MODELS)
def test_a_stranger_loads_the_patched_model(exported, stranger, name):
    found, input_ids = load_file(exported / f"{name}.safetensors"), read_input_ids(exported)
    model = patched_model(name)
    with torch.no_grad():
        expected = model(input_ids).logits
        tokens = model.generate(input_ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    for way in ("patched", "again", "from_config"):
        torch.testing.assert_close(found[way], expected, rtol=0, atol=1e-6, msg=way)
    assert torch.equal(found["tokens"], tokens)
    assert stranger[name]["missing"] == [] and stranger[name]["implementation"].startswith("dilated")


@pytest.mark.parametrize("name", MODELS)
def test_without_remote_code_it_is_the_original(exported, stranger, name):
    found, input_ids = load_file(exported / f"{name}.safetensors"), read_input_ids(exported)
    with torch.no_grad():
        expected = unpatch_model(patched_model(name))(input_ids).logits
    assert torch.equal(found["vanilla"], expected)
    assert (found["patched"] - expected).abs().max() > 1e-3
    assert stranger[name]["names"] == ["transformers", "transformers_modules"]
    assert stranger[name]["classes"] == [type(MODELS[name]()).__name__] * 2


@pytest.mark.parametrize("name", MODELS)
def test_an_export_loads_by_load_patched_model_too(exported, name):
    input_ids = read_input_ids(exported)
    model = load_patched_model(exported / name).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, patched_model(name)(input_ids).logits)


def test_copies_of_the_code_in_one_process_keep_to_themselves(exported, monkeypatch, tmp_path):
    """The package and the code of an export side by side, each patching after the other was loaded."""
    input_ids = read_input_ids(exported)
    remote = AutoModelForCausalLM.from_pretrained(exported / "llama", trust_remote_code=True).eval()
    local = patched_model("llama")
    assert type(remote).__module__.startswith("transformers_modules") and is_patched(remote)
    assert remote.config._attn_implementation != local.config._attn_implementation
    with torch.no_grad():
        assert torch.equal(remote(input_ids).logits, local(input_ids).logits)
    with pytest.raises(ValueError, match="patched already"):
        patch_model(remote, **SCHEDULE)
    with pytest.raises(ValueError, match="without `trust_remote_code`"):
        unpatch_model(remote)
    export_patched_model(remote, tmp_path / "exported_again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported_again", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, local(input_ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_exported_code_demands_only_transformers(exported, name):
    """The folder holds every file that its code imports, and imports nothing else."""
    allowed = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
    files = {path.stem: path for path in (exported / name).glob("*.py")}
    for path in files.values():
        assert set(get_imports(path)) <= allowed, path.name
        assert set(RELATIVE_IMPORT.findall(path.read_text())) <= set(files), path.name
    assert not {"exporting", "modeling_longnet", "sequence_parallel"} & set(files)


def test_the_card_of_an_export_says_how_it_loads(exported):
    card = (exported / "llama" / "README.md").read_text()
    assert "in 1 of its 2 layers" in card and 'from_pretrained("llama", trust_remote_code=True)' in card
    assert "| b | 16 | 2 | 8 |" in card and "- dilated-attention" in card


def test_what_cannot_be_exported_is_refused(tmp_path):
    model = MODELS["llama"]()
    with pytest.raises(ValueError, match="not patched"):
        export_patched_model(model, tmp_path)
    peft = pytest.importorskip("peft", reason="needs peft")
    adapted = peft.get_peft_model(patched_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge"):
        export_patched_model(adapted, tmp_path)

    class Mine(LlamaForCausalLM):
        pass

    with pytest.raises(ValueError, match="Mine"):
        export_patched_model(patch_model(Mine(model.config), **SCHEDULE), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", ["save_pretrained", "export_patched_model"])
def test_a_saved_patch_names_an_architecture_that_nobody_runs_dense(save, tmp_path):
    """Serving programs look for a model by that name, and would have run the vanilla one without a word."""
    import transformers

    model = patched_model("llama")
    for _ in range(2):
        export_patched_model(model, tmp_path) if save == "export_patched_model" else model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["DilatedLlamaForCausalLM"]
    assert not hasattr(transformers, "DilatedLlamaForCausalLM")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    unpatch_model(load_patched_model(tmp_path)).save_pretrained(tmp_path / "vanilla")
    assert json.loads((tmp_path / "vanilla/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
