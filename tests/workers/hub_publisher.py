"""Pushes models to the Hub at HF_ENDPOINT, as a user with the package does, and reads some back.

Usage: hub_publisher.py FOLDER. Writes FOLDER/logits.safetensors, prints a JSON line of what was seen.
"""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny_models import SCHEDULE, tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from modeling_longnet import LongNetForCausalLM
from modeling_longnet.exporting import export_patched_model
from modeling_longnet.patching import is_patched, load_patched_model, patch_model


INPUT_IDS = torch.arange(1, 51)[None]


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    return LlamaForCausalLM(config)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(INPUT_IDS).logits.contiguous()


def push_longnet(seen: dict, found: dict) -> None:
    model = LongNetForCausalLM(tiny_config())
    model.push_to_hub("tester/longnet", tags=["bytes"])
    found["longnet"] = logits(model)
    again = AutoModelForCausalLM.from_pretrained("tester/longnet")
    seen["with the package"] = type(again) is LongNetForCausalLM and torch.equal(logits(again), found["longnet"])
    seen["tags of another"] = LongNetForCausalLM(tiny_config()).model_tags


def push_interrupted(seen: dict, found: dict) -> None:
    model = LongNetForCausalLM(tiny_config())
    found["interrupted"] = logits(model)
    try:
        model.push_to_hub("tester/interrupted", max_shard_size="20KB")
    except (RuntimeError, HfHubHTTPError) as error:  # by version of huggingface_hub
        seen["interruption"] = type(error).__name__
    seen["files after the interruption"] = HfApi().list_repo_files("tester/interrupted")
    model.push_to_hub("tester/interrupted", max_shard_size="20KB")


def push_patched(seen: dict, found: dict, folder: Path) -> None:
    llama().push_to_hub("tester/base")
    model = patch_model(AutoModelForCausalLM.from_pretrained("tester/base"), **SCHEDULE)
    found["patched"] = logits(model)
    export_patched_model(model, folder / "export", repo_id="tester/patched", license="mit")
    model.push_to_hub("tester/plainly-pushed")
    again = load_patched_model("tester/plainly-pushed")
    seen["plainly pushed"] = is_patched(again) and torch.equal(logits(again), found["patched"])
    torch.manual_seed(1)
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapter.push_to_hub("tester/adapter")
    again = load_patched_model("tester/adapter")
    seen["adapter"] = isinstance(again, PeftModel) and torch.equal(logits(again), logits(adapter))
    seen["adapter acts"] = float((logits(adapter) - found["patched"]).abs().max())


def push_from_trainer(seen: dict, found: dict, folder: Path) -> None:
    model = LongNetForCausalLM(tiny_config())
    arguments = TrainingArguments(
        folder / "trained", max_steps=2, save_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to=[],
        push_to_hub=True, hub_model_id="tester/trained", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": INPUT_IDS[0], "labels": INPUT_IDS[0]}] * 2
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.push_to_hub()
    found["trained"] = logits(model)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    seen, found = {}, {}
    push_longnet(seen, found)
    push_interrupted(seen, found)
    push_patched(seen, found, folder)
    push_from_trainer(seen, found, folder)
    save_file(found, folder / "logits.safetensors")
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
