"""An adapter loads from where it is, onto a base model with the vocabulary that it was trained with."""

import copy

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from modeling_longnet import load_patched_model, patch_model


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
SCHEDULE = {"segment_lengths": [8, 32], "dilation_rates": [1, 4]}
TOKENIZER = ByT5Tokenizer(extra_ids=0)
ROWS = len(TOKENIZER)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, max_position_embeddings=128, initializer_range=0.3, **sizes))
    model.save_pretrained(tmp_path / "base")
    return LlamaForCausalLM.from_pretrained(tmp_path / "base")


LORAS = {
    "attention alone": {"target_modules": ["q_proj", "v_proj"]},
    "token vectors saved": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "token vectors adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


def trained(model, **lora):
    """A patched model with an adapter that does something."""
    model = peft.get_peft_model(patch_model(model, **SCHEDULE), peft.LoraConfig(**lora), adapter_name="default")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    return model.eval()


@torch.no_grad()
def assert_same(loaded, model):
    x = torch.randint(0, model.get_input_embeddings().weight.shape[0], (2, 50))
    assert loaded.get_base_model().config.dilated_attention["segment_lengths"] == SCHEDULE["segment_lengths"]
    torch.testing.assert_close(loaded.eval()(input_ids=x).logits, model(input_ids=x).logits)


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_an_adapter_in_a_subfolder_loads(base, lora, tmp_path):
    model = trained(base, **lora)
    model.save_pretrained(tmp_path / "runs" / "step-100")
    loaded = load_patched_model(tmp_path / "runs", subfolder="step-100")
    assert_same(loaded, model)
    assert_same(load_patched_model(tmp_path / "runs", subfolder="step-100", base_model=tmp_path / "base"), model)


def test_each_of_several_adapters_loads_from_its_own_subfolder(base, tmp_path):
    model = trained(base, target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "both")
    model.set_adapter("other")
    assert_same(load_patched_model(tmp_path / "both", subfolder="other"), model)


def test_a_whole_model_in_a_subfolder_loads(base, tmp_path):
    patch_model(base, **SCHEDULE).eval().save_pretrained(tmp_path / "runs" / "last")
    loaded, x = load_patched_model(tmp_path / "runs", subfolder="last"), torch.arange(50)[None]
    assert torch.equal(loaded.eval()(input_ids=x).logits, base(input_ids=x).logits)


def test_a_subfolder_without_anything_is_refused(base, tmp_path):
    trained(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "runs" / "step-100")
    with pytest.raises((ValueError, OSError)):
        load_patched_model(tmp_path / "runs", subfolder="step-200")


@pytest.mark.parametrize("lora", list(LORAS.values())[1:], ids=list(LORAS)[1:])
@pytest.mark.parametrize("added", [-5, 3])
def test_weights_tell_of_a_resized_vocabulary(base, lora, added, tmp_path):
    base.resize_token_embeddings(ROWS + added, mean_resizing=False)
    model = trained(base, **lora)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    loaded = load_patched_model(tmp_path / "adapter")
    assert loaded.get_input_embeddings().weight.shape[0] == ROWS + added
    assert_same(loaded, model)


def test_the_tokenizer_beside_it_tells_of_added_tokens(base, tmp_path):
    """As PEFT's own AutoPeftModelForCausalLM."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens(["<call>", "</call>"])
    model = trained(base, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = load_patched_model(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert loaded.get_input_embeddings().weight.shape[0] == len(tokenizer) == ROWS + 2
    x = torch.randint(0, ROWS, (2, 50))
    with torch.no_grad():
        found = loaded.eval()(input_ids=x).logits[..., :ROWS]
        torch.testing.assert_close(found, model(input_ids=x).logits)
    TOKENIZER.save_pretrained(tmp_path / "adapter")  # one that is not larger changes nothing
    assert load_patched_model(tmp_path / "adapter").get_input_embeddings().weight.shape[0] == ROWS


def test_it_can_be_trained_on_and_saved_again(base, tmp_path):
    base.resize_token_embeddings(ROWS + 3, mean_resizing=False)
    trained(base, **LORAS["token vectors saved"]).save_pretrained(tmp_path / "adapter")
    loaded = load_patched_model(tmp_path / "adapter", is_trainable=True)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(load_patched_model(tmp_path / "again"), loaded.eval())
