"""Streams of tokens: constant memory, the whole forward's loss, and resumption to the last bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from examples import stream_a_billion
from examples.benchmarks import benchmark_decoding, patched_decoding
from modeling_longnet import LongNetForCausalLM
from modeling_longnet.dilated_cache import DilatedCache
from modeling_longnet.dilated_cache_file import load_cache, save_cache
from modeling_longnet.patching import patch_model
from modeling_longnet.streaming import TextStream, stream_logits, stream_loss
from modeling_longnet.transformers_compat import named_cache


ROOT = Path(__file__).resolve().parent.parent


def make_model(**fields) -> LongNetForCausalLM:
    torch.manual_seed(0)
    return LongNetForCausalLM(tiny_config(**({"position_embedding_type": "rope"} | fields)))


def make_text(length: int = 2500) -> torch.Tensor:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_stream_is_whole_forward():
    model, text = make_model(), make_text()
    logits = model.eval()(text[None], use_cache=False).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], text[1:], reduction="none").double()
    model.train()
    result = stream_loss(model, text, chunk_size=301, progress=False)
    assert model.training and result.finished and result.tokens == 2500
    assert result.loss == pytest.approx(losses.mean().item(), abs=1e-5)
    assert [(b["start"], b["end"], b["tokens"]) for b in result.buckets] == [
        (0, 1024, 1023), (1024, 2048, 1024), (2048, 2500, 452),
    ]  # fmt: skip
    assert result.buckets[1]["loss"] == pytest.approx(losses[1023:2047].mean().item(), abs=1e-5)
    parts = list(stream_logits(model, text, chunk_size=700))
    assert [start for start, _ in parts] == [0, 700, 1400, 2100]
    torch.testing.assert_close(torch.cat([part for _, part in parts]), logits, atol=1e-5, rtol=0)


def test_a_stream_leaves_each_module_in_its_mode():
    model = make_model().train()
    model.model.layers[0].eval()  # held there, as a frozen part is
    modes = [module.training for module in model.modules()]
    stream_loss(model, make_text(100), 32, progress=False)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2


def test_patched_models_stream():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

    def make():
        return LlamaForCausalLM(LlamaConfig(vocab_size=61, max_position_embeddings=4096, **sizes))

    text = make_text(600)
    model = patch_model(make(), [16, 64], [1, 4])
    whole = model(input_ids=text[None], labels=text[None], use_cache=False).loss.item()
    assert stream_loss(model, text, chunk_size=50, progress=False).loss == pytest.approx(whole, abs=1e-5)
    partly = patch_model(make(), [16, 64], [1, 4], layers=[1])
    with pytest.raises(ValueError, match="every layer"):
        stream_loss(partly, text)


def test_a_saved_stream_goes_on_to_the_same_bits(tmp_path):
    model, text = make_model(overlap="once", num_sink_tokens=2), make_text()
    straight = stream_loss(model, text, chunk_size=100, progress=False)
    state = tmp_path / "state.safetensors"
    for stop in (300, 1100, 1200):
        stream = TextStream(model, text, 100)
        if state.exists():
            stream.load(state)
        assert stream.run(stop=stop, state_path=state, save_every=3, progress=False)
    assert stream_loss(model, text, chunk_size=100, state_path=state, progress=False) == straight


def test_ctrl_c_saves_and_resumes(tmp_path):
    model, text, state = make_model(), make_text(), tmp_path / "state.safetensors"
    straight = stream_loss(model, text, chunk_size=100, progress=False)
    forwards = []

    def interrupt(*_):
        forwards.append(1)
        if len(forwards) in (4, 9):
            os.kill(os.getpid(), signal.SIGINT)

    hook = model.model.layers[0].register_forward_hook(interrupt)
    first = stream_loss(model, text, chunk_size=100, state_path=state, progress=False)
    assert not first.finished and first.tokens == 400
    with pytest.raises(KeyboardInterrupt):
        stream_loss(model, text, chunk_size=100, progress=False)
    hook.remove()
    assert stream_loss(model, text, chunk_size=100, state_path=state, progress=False) == straight


@pytest.fixture
def saved(tmp_path):
    model, path = make_model(), tmp_path / "state.safetensors"
    stream = TextStream(model, make_text(), 100)
    stream.run(stop=500, state_path=path, progress=False)
    return path


def test_save_load_identity(saved):
    model = make_model()
    cache, extra = load_cache(saved, model)
    save_cache(saved.with_name("again.safetensors"), cache, model, **extra)
    first, second = load_file(saved), load_file(saved.with_name("again.safetensors"))
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.99], ids=str)
def test_a_truncated_file_is_refused(saved, kept):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="damaged"):
        load_cache(saved, make_model())


def test_states_of_something_else_are_refused(saved, tmp_path):
    text = make_text()
    with pytest.raises(ValueError, match="another schedule"):
        load_cache(saved, make_model(segment_lengths=[8, 16, 64]))
    with pytest.raises(ValueError, match="another schedule"):
        load_cache(saved, make_model(overlap="once"))
    other = make_model()
    with torch.no_grad():
        other.model.norm.weight.add_(1e-6)
    for model in (other, make_model(num_hidden_layers=1), make_model(num_key_value_heads=2)):
        with pytest.raises(ValueError, match="another model"):
            load_cache(saved, model)
    with pytest.raises(ValueError, match="another text"):
        stream_loss(make_model(), (text + 1) % 61, chunk_size=100, state_path=saved)
    with pytest.raises(ValueError, match="`chunk_size` must be 100"):
        stream_loss(make_model(), text, chunk_size=50, state_path=saved)
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "nothing", make_model())
    weights = tmp_path / "weights"
    make_model().save_pretrained(weights)
    with pytest.raises(ValueError, match="no cache of the format"):
        load_cache(weights / "model.safetensors", make_model())


def test_caches_that_cannot_be_saved_are_refused(tmp_path):
    model = make_model()
    cache = DilatedCache(model.config)
    with pytest.raises(ValueError, match="must have seen a token"):
        save_cache(tmp_path / "state", cache, model)
    cache.activate_past_recording()
    with torch.no_grad():
        model(make_text(5)[None], **named_cache(cache))
    with pytest.raises(ValueError, match="waits for a `crop`"):
        save_cache(tmp_path / "state", cache, model)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`chunk_size`"):
        stream_loss(make_model(), make_text(), chunk_size=0)
    for tokens in (make_text(1), make_text().float(), make_text()[None], 3, None, torch.tensor(3), ["a", "b"], "text"):
        with pytest.raises(ValueError, match="`tokens`"):
            stream_loss(make_model(), tokens, progress=False)
    for save_every in (0, None, 1.5):
        with pytest.raises(ValueError, match="`save_every`"):
            stream_loss(make_model(), make_text(), save_every=save_every, progress=False)


def test_the_example_streams_and_resumes_to_the_same_bits(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    arguments = ["--chunk-size", "512", "--tokens", "2e4", "--output-dir"]
    results = [stream_a_billion.main([*arguments, str(straight)])]
    killed = subprocess.run(
        [sys.executable, "-m", "examples.stream_a_billion", *arguments, str(resumed), "--kill-after", "9000"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    results.append(stream_a_billion.main([*arguments, str(resumed)]))
    assert results[1] == json.loads((resumed / "results.json").read_text())
    for name in ("loss", "buckets", "cache_bytes"):
        assert results[0][name] == results[1][name]
    assert [point["position"] for point in results[1]["points"]] == [p["position"] for p in results[0]["points"]]
    assert (resumed / "stream.png").stat().st_size > 10_000
    states = [load_file(folder / "state.safetensors") for folder in (straight, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@torch.no_grad()
def test_the_example_reads_bytes_as_the_model_learned_them(tmp_path):
    model = make_model(vocab_size=259)
    model.save_pretrained(tmp_path / "model")
    text = "What ByT5's tokenizer makes of it, \N{GREEK SMALL LETTER PI} included. " * 20
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    arguments = ["--text", str(tmp_path / "text.txt"), "--tokens", "500", "--output-dir", str(tmp_path / "run")]
    result = stream_a_billion.main([*arguments, "--model", str(tmp_path / "model")])
    ids = torch.tensor([ByT5Tokenizer(extra_ids=0)(text).input_ids[:500]])
    assert result["loss"] == pytest.approx(model.eval()(ids, labels=ids).loss.item(), abs=1e-5)
    for other in (make_model(), LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=259))):
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=f"a LongNet over bytes.*got {type(other).__name__}"):
            stream_a_billion.main([*arguments, "--model", str(tmp_path / "other")])


def test_the_decoding_benchmark_measures_all_sides():
    arguments = "--rounds 1 --reading-rounds 1 --tokens-per-turn 1 --context 300 --chunk-size 100"
    result = benchmark_decoding.main(arguments.split())
    assert len(result["decoding_seconds_per_token"]) == 5
    assert all(ratio > 0 for ratios in result["ratios"].values() for ratio in ratios.values())


def test_the_benchmark_of_patched_decoding_measures_all_sides():
    measured = list(patched_decoding.main("--rounds 1 --layers 1 --places 40".split()).values())[1:]
    assert all(len(sides) == 5 for places in measured for sides in places.values())
