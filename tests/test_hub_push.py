"""Push and pull over HTTP, against a stand-in for the Hub on this machine: LongNets, patched models, adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard
from minihub import Hub
from tiny_models import tiny_config

from modeling_longnet import DilationSchedule, LongNetForCausalLM, make_model_card
from modeling_longnet.model_card import draw_schedule


pytest.importorskip("peft", reason="needs peft")

ROOT = Path(__file__).parent.parent
PULLED = ("longnet", "interrupted", "patched", "trained")
STRANGER = """
import json, sys
sys.modules["modeling_longnet"] = sys.modules["peft"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

expected, seen = load_file(sys.argv[1]), {}
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(f"tester/{name}", trust_remote_code=True).eval()
    with torch.no_grad():
        seen[name] = float((model(torch.arange(1, 51)[None]).logits - expected[name]).abs().max())
    seen[name + " module"] = type(model).__module__
print(json.dumps(seen))
"""


def run(hub: Hub, home: Path, *command: str) -> dict:
    """The JSON line that a Python process prints, with a home of its own and this Hub as its Hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_nobody", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "ignore", *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory) -> tuple[Path, dict]:
    """What a user who has the package pushes, in one process, and says."""
    folder = tmp_path_factory.mktemp("published")
    hub.interrupted.add("tester/interrupted")
    return folder, run(hub, folder / "home", str(ROOT / "tests/workers/hub_publisher.py"), str(folder))


@pytest.fixture(scope="module")
def pulled(hub, published, tmp_path_factory) -> dict:
    """What somebody without the package gets: largest difference of logits by repository."""
    folder, _ = published
    return run(hub, tmp_path_factory.mktemp("home"), "-c", STRANGER, str(folder / "logits.safetensors"), *PULLED)


@pytest.mark.parametrize("name", PULLED)
def test_what_was_pushed_is_what_a_stranger_pulls(pulled, name):
    assert pulled[name] <= 1e-6
    assert pulled[f"{name} module"].startswith("transformers_modules.tester")


def test_with_the_package_nothing_has_to_be_trusted(published):
    assert published[1]["with the package"]


def test_a_plainly_pushed_patched_model_loads_patched(hub, published):
    assert published[1]["plainly pushed"]
    assert "dilated_attention" in json.loads(hub.repositories["tester/plainly-pushed"].text("config.json"))


def test_an_adapter_brings_the_patch_and_finds_its_base_model(hub, published):
    assert published[1]["adapter"] and published[1]["adapter acts"] > 1e-4
    files = hub.repositories["tester/adapter"].files
    assert {"adapter_config.json", "adapter_model.safetensors", "dilated_attention.json", "README.md"} <= set(files)
    assert "load_patched_model(" in read_card(hub, "adapter").text


def test_an_interrupted_push_leaves_nothing_half_done_and_can_be_repeated(hub, published, pulled):
    """Commits are whole: the first try leaves no file, and the second sends only what had not arrived."""
    assert published[1]["interruption"] in ("RuntimeError", "HfHubHTTPError")
    assert published[1]["files after the interruption"] == []
    repository = hub.repositories["tester/interrupted"]
    shards = [oid for path, (_, oid) in repository.files.items() if path.endswith(".safetensors")]
    assert len(shards) > 2 and "model.safetensors.index.json" in repository.files
    sent = [line for line in hub.log if line.startswith("PUT /large/")]
    assert [sum(oid in line for line in sent) for oid in shards] == [1] * len(shards)
    assert pulled["interrupted"] <= 1e-6


def test_each_push_is_one_commit(hub, published):
    for name in ("longnet", "patched", "interrupted"):
        assert len(hub.repositories[f"tester/{name}"].commits) == 1, name


def read_card(hub: Hub, name: str) -> ModelCard:
    return ModelCard(hub.repositories[f"tester/{name}"].text("README.md"))


@pytest.mark.parametrize("name", ["longnet", "patched", "plainly-pushed", "interrupted"])
def test_a_push_writes_a_card(hub, published, name):
    card = read_card(hub, name)
    assert {"longnet", "dilated-attention"} <= set(card.data.tags) and card.data.library_name == "transformers"
    options = {"num_sink_tokens": 4, "local": "sliding"} if name in ("patched", "plainly-pushed") else {}
    schedule = DilationSchedule((8, 16, 32), (1, 2, 4), **options)
    assert "| b | 16 | 2 | 8 |" in card.text and draw_schedule(schedule) in card.text
    assert f'"tester/{name}"' in card.text and "More Information Needed" not in card.text


def test_cards_say_what_is_known_of_license_and_origin(hub, published):
    assert read_card(hub, "patched").data.license == "mit"
    assert read_card(hub, "patched").data.base_model == "tester/base"
    card = read_card(hub, "longnet")
    assert card.data.license is None and "No license of the weights was given" in card.text
    assert "bytes" in card.data.tags and "bytes" not in published[1]["tags of another"]


def test_the_cards_of_trainer_and_peft_carry_the_tags(hub, published):
    for name in ("trained", "adapter"):
        assert {"longnet", "dilated-attention"} <= set(read_card(hub, name).data.tags), name


def test_a_card_with_results_tells_the_hub_and_the_reader():
    result = EvalResult(
        task_type="text-generation", dataset_type="kjv", dataset_name="King James Bible",
        metric_type="perplexity", metric_value=6.5,
    )  # fmt: skip
    model = LongNetForCausalLM(tiny_config())
    card = ModelCard(str(make_model_card(model, "tester/x", license="apache-2.0", evaluation=[result])))
    assert card.data.eval_results[0].metric_value == 6.5 and card.data.license == "apache-2.0"
    assert "| text-generation | King James Bible | perplexity | 6.5 |" in card.text


@pytest.mark.parametrize("options", [
    {}, {"is_causal": False}, {"local": "sliding"}, {"num_sink_tokens": 2}, {"local": "sliding", "num_sink_tokens": 2},
], ids=str)  # fmt: skip
def test_the_picture_shows_what_the_definition_computes(options):
    """At one cell a token: a letter exactly where some head sees that key, "s" where it is a sink alone."""
    import torch

    from modeling_longnet import dilated_attention_reference

    schedule = DilationSchedule((4, 8, 16), (1, 2, 4), **options)
    q, k, v = torch.randn(3, 1, 4, 16, 8)
    _, weights = dilated_attention_reference(q, k, v, **schedule.as_arguments(), return_weights=True)
    rows = [row.ljust(32)[::2] for row in draw_schedule(schedule, 16).split("\n")]
    seen = (weights[0] > 0).any(0)
    for query in range(16):
        for key in range(16):
            # The picture is of segments; inside them a head selects one token in r.
            assert not seen[query, key] or rows[query][key].isalpha(), (query, key)
            assert rows[query][key] != "a" or seen[query, key], (query, key)
