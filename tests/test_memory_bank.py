"""Banks: read once, asked many times, and what they give is what the same text in the context gives."""

import copy
import json
import os
import pickle
import shutil

import pytest
import torch
from test_memory_patch import TOLERANCE, logits, read, recall_cases, recall_model, tiny_llama, tokens, with_memory
from tiny_models import tiny_config
from transformers import ByT5Tokenizer, GenerationConfig

from modeling_longnet import DilatedCache, LongNetForCausalLM, MemoryBank, Passage, calibrate_memory, patch_model
from modeling_longnet.memory_bank import start_cache
from modeling_longnet.memory_pages import STATE_NAME
from modeling_longnet.transformers_compat import named_cache


LENGTH = 90  # not a multiple of the blocks: a bank's last tokens are no whole block


@pytest.fixture(params=["alone", "some-layers", "clamped", "few-dimensions"])
def model(request):
    return with_memory(request.param)


def make_bank(model, path, length=LENGTH, documents=1, **options) -> MemoryBank:
    pieces = tokens(length)[0].tensor_split(documents)
    return MemoryBank.from_tokens(model, pieces, path, chunk_size=32, progress=False, **options)


@pytest.mark.parametrize("store", ["device", "cpu", "disk"])
def test_a_bank_is_the_same_text_in_the_context(model, tmp_path, store):
    """In distances as the model has them: "alone" clamps none of these, "clamped" nearly all, both forms to the bit."""
    text, question = tokens(LENGTH), tokens(40, batch=2)
    bank = make_bank(model, tmp_path / "bank", documents=3)
    assert len(bank) == LENGTH and bank.document_starts == [0, 30, 60] and torch.equal(bank.input_ids, text[0])
    _, cache = read(model, text, [32])
    expected, _ = read(model, question[:1], [11, 1, 1, 27], cache)
    path = {"path": tmp_path / "own"} if store == "disk" else {}
    actual, cache = read(model, question[:1], [11, 1, 1, 27], bank.start_cache(model, store=store, **path))
    assert torch.equal(actual, expected)
    whole = logits(model, torch.cat([text, question[:1]], dim=1))[:, LENGTH:]
    torch.testing.assert_close(actual, whole, **TOLERANCE)
    assert cache.get_seq_length() == LENGTH + 40
    assert set(cache.memory_by_place()) <= {store, "device"}  # the bank takes none of it


def layer_keys(bank: MemoryBank, model, layer: int) -> torch.Tensor:
    """Of all tokens, [G, N, D]."""
    rows = bank.rows(DilatedCache(model.config).dilated_layers[layer], layer, torch.device("cpu"))
    return rows.span(0, len(bank))[0][0]


def test_a_text_may_be_read_by_what_lies_within_reach(tmp_path):
    """The window is 8: a chunk's state, the last one of one token too, depends on its reach alone, and on sinks."""
    model, text = patch_model(tiny_llama(), [8], [1], num_sink_tokens=2, memory={"top_k": 9}), tokens(193)[0]
    edited = text.clone()
    edited[20:28] = edited[20:28] % 96 + 1  # words of layer 0, which nothing but a choice carries to the end
    banks = {
        (reach, name): MemoryBank.from_tokens(
            model, [words], tmp_path / f"{reach}-{name}", chunk_size=32, reach=reach, progress=False
        )
        for reach in (None, 40, 1000) for name, words in (("text", text), ("edited", edited))
    }  # fmt: skip
    keys = {key: layer_keys(bank, model, 1)[:, 160:] for key, bank in banks.items()}
    assert torch.equal(keys[40, "text"], keys[40, "edited"])
    assert not torch.equal(keys[None, "text"], keys[None, "edited"])
    torch.testing.assert_close(keys[None, "text"], keys[1000, "text"], **TOLERANCE)  # a single token by another path
    # Whoever asks looks at all of it: the first token of the question reads as by the keys of the whole text.
    asked = [read(model, tokens(8), [8], banks[40, name].start_cache(model))[0] for name in ("text", "edited")]
    assert not torch.equal(*asked)


def test_a_reach_is_checked_and_belongs_to_the_bank(tmp_path):
    model = with_memory("alone")
    for wrong in (0, 3.5, "40", True):
        with pytest.raises(ValueError, match="reach"):
            make_bank(model, tmp_path / "bank", reach=wrong)
    bank = make_bank(model, tmp_path / "bank", reach=40)
    assert torch.equal(make_bank(model, tmp_path / "bank", reach=40).input_ids, bank.input_ids)
    for other in (None, 50):
        with pytest.raises(ValueError, match="reach"):
            make_bank(model, tmp_path / "bank", reach=other)


def test_rows_share_a_bank_and_leave_it_as_it_is(model, tmp_path):
    bank, questions = make_bank(model, tmp_path / "bank"), tokens(40, batch=3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "bank").iterdir()}
    whole = logits(model, torch.cat([tokens(LENGTH).expand(3, -1), questions], dim=1))[:, LENGTH:]
    cache = bank.start_cache(model, 3)
    read(model, questions[:, :20], [7, 1], cache)
    copied = copy.deepcopy(cache)
    cache.activate_past_recording()
    read(model, tokens(9, batch=3), [9], cache)
    cache.crop(-9)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    torch.testing.assert_close(
        read(model, questions[[2, 2, 0], 20:], [19, 1], cache)[0], whole[[2, 2, 0], 20:], **TOLERANCE
    )
    torch.testing.assert_close(read(model, questions[:, 20:], [20], copied)[0], whole[:, 20:], **TOLERANCE)
    with pytest.raises(ValueError, match="reset"):
        cache.reset()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "bank").iterdir()}


@pytest.mark.parametrize("name", ["clamped", "few-dimensions"])
def test_rows_have_banks_of_their_own(name, tmp_path):
    model, questions = with_memory(name), tokens(30, batch=4)
    long, short = make_bank(model, tmp_path / "a"), make_bank(model, tmp_path / "b", 51)
    cache = start_cache(model, [long, None, short, long])
    actual, _ = read(model, questions, [13, 1, 16], cache)
    for row, bank in enumerate([long, None, short, long]):
        text = (
            questions[row : row + 1] if bank is None else torch.cat([bank.input_ids[None], questions[row : row + 1]], 1)
        )
        torch.testing.assert_close(actual[row : row + 1], logits(model, text)[:, -30:], **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generate_goes_on_behind_a_bank(model, tmp_path, options):
    bank, question = make_bank(model, tmp_path / "bank"), tokens(12, batch=2)
    prompt = torch.cat([bank.input_ids.expand(2, -1), question], dim=1)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)} | options
    expected = model.generate(prompt, **settings, cache_implementation="dynamic")
    cache = bank.start_cache(model, 2 * options.get("num_beams", 1))
    assert torch.equal(model.generate(prompt, **settings, **named_cache(cache)), expected)


def test_generate_refuses_the_question_without_the_bank_before_it(tmp_path):
    model = with_memory("clamped")
    bank = make_bank(model, tmp_path / "bank")
    with pytest.raises(ValueError, match="`input_ids` must begin with the 90 tokens .* got 12"):
        model.generate(tokens(12), max_new_tokens=3, **named_cache(bank.start_cache(model)))


def test_a_book_is_read_once_and_asked_many_times(tmp_path):
    model, pairs, questions = recall_model()
    texts, answers = recall_cases(pairs, questions, count=3)
    found = patch_model(model, [32], [1], memory={"block_size": 4, "top_k": 8})
    for number, (text, answer) in enumerate(zip(texts, answers)):
        bank = MemoryBank.from_tokens(found, [text[:-1]], tmp_path / str(number), progress=False)
        for _ in range(2):
            assert read(found, text[None, -1:], [1], bank.start_cache(found))[0].argmax() == answer


def test_texts_are_tokenized_in_order(tmp_path):
    model = with_memory("alone")

    def tokenizer(text, add_special_tokens, verbose):
        return {"input_ids": [1] * add_special_tokens + [ord(c) % 97 for c in text]}

    bank = MemoryBank.from_texts(model, tokenizer, ["abc", "d"], tmp_path, progress=False)
    assert bank.input_ids.tolist() == [1, *(ord(c) % 97 for c in "abc\n\nd")] and bank.document_starts == [0, 6]
    for wrong in ([], [3], "abc"):
        with pytest.raises(ValueError, match="documents"):
            MemoryBank.from_texts(model, tokenizer, wrong, tmp_path / "wrong")


def test_reading_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    model = with_memory("clamped")
    expected = make_bank(model, tmp_path / "whole")
    calls, forward = [], type(model.base_model).forward

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.base_model), "forward", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        make_bank(model, tmp_path / "bank", save_every=1)
    with pytest.raises(ValueError, match="64 of 90"):
        MemoryBank.open(tmp_path / "bank")
    with pytest.raises(ValueError, match="another text"):
        MemoryBank.from_tokens(model, [tokens(91)[0]], tmp_path / "bank", progress=False)
    bank = make_bank(model, tmp_path / "bank", save_every=1)
    assert len(calls) == 4
    question = tokens(9)
    outs = [read(model, question, [9], x.start_cache(model))[0] for x in (bank, expected)]
    assert torch.equal(*outs)
    assert len(make_bank(model, tmp_path / "bank")) == LENGTH and len(calls) == 4 + 2  # nothing is read again


def test_a_bank_of_another_model_is_refused(tmp_path):
    model = with_memory("few-dimensions")
    bank = make_bank(model, tmp_path / "bank")
    others = {
        "weights": with_memory("few-dimensions", tiny_llama(initializer_range=0.1)),
        "schedule": with_memory("clamped"),
        "calibrated": calibrate_memory(with_memory("few-dimensions"), tokens(80)[0]),
    }
    for word, other in others.items():
        with pytest.raises(ValueError, match=word):
            bank.start_cache(other)
    other = with_memory("few-dimensions", tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    with pytest.raises(ValueError, match="configuration"):
        bank.start_cache(other)


def test_a_bank_of_other_adapters_is_refused(tmp_path):
    """Their weights stand in the model whether they are switched on or not."""
    peft = pytest.importorskip("peft")
    config, text = peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False), tokens(LENGTH + 9)
    model = peft.get_peft_model(with_memory("clamped"), config).eval()
    model.add_adapter("second", config)
    for name in ("second", "default"):
        model.set_adapter(name)
        bank = make_bank(model, tmp_path / name, LENGTH)
        told = read(model, text[:, LENGTH:], [9], bank.start_cache(model))[0]
        expected = logits(model, torch.cat([bank.input_ids[None], text[:, LENGTH:]], dim=1))[:, LENGTH:]
        torch.testing.assert_close(told, expected, **TOLERANCE)
    with model.disable_adapter(), pytest.raises(ValueError, match="adapters"):
        bank.start_cache(model)
    model.set_adapter("second")
    with pytest.raises(ValueError, match="adapters"):
        bank.find_passages(model, text[0, :5], text[0, 5:9])
    MemoryBank.open(tmp_path / "second").start_cache(model)


def test_a_pickled_bank_is_opened_anew(tmp_path, monkeypatch):
    """Nothing of the first one goes with it: neither its pages nor its lock, which belongs to a process."""
    model, question = with_memory("clamped"), tokens(9)
    monkeypatch.chdir(tmp_path)
    bank = make_bank(model, "bank", 600)
    monkeypatch.chdir("/")
    bank.start_cache(model)
    pickled = pickle.dumps(bank)
    assert len(pickled) < 1000
    expected, _ = read(model, question, [9], bank.start_cache(model))
    other = pickle.loads(pickled)
    assert torch.equal(read(model, question, [9], other.start_cache(model))[0], expected)
    lock = bank.folder._lock
    del other
    assert bank.folder._lock == lock and os.fstat(lock)
    on_disk = DilatedCache(model.config, store="disk", path=tmp_path / "own")
    with pytest.raises(ValueError, match="pickled"):
        pickle.dumps(on_disk)


def test_what_a_folder_says_is_not_trusted(tmp_path):
    from safetensors.torch import load_file, save_file

    model = with_memory("alone")
    bank = make_bank(model, tmp_path / "bank")
    tensors, metadata = load_file(bank.folder.state_path), bank.metadata
    changes = {
        "rows": json.dumps({"0": -1}),
        "pages.1": json.dumps({"groups": 2, "width": 10**9, "index": 16, "far": 16}),
        "dtype": "load",
        "format": "other",
    }
    for number, (name, value) in enumerate(changes.items()):
        shutil.copytree(tmp_path / "bank", tmp_path / str(number))
        save_file(tensors, tmp_path / str(number) / STATE_NAME, metadata | {name: value})
        with pytest.raises(ValueError, match="damaged|cut off|format"):
            MemoryBank.open(tmp_path / str(number)).start_cache(model)
    with pytest.raises(FileNotFoundError):
        MemoryBank.open(tmp_path / "nowhere")
    for path in (tmp_path / "bank").iterdir():
        path.chmod(0o444)
    assert len(MemoryBank.open(tmp_path / "bank")) == LENGTH


def test_banks_that_do_not_go_together_are_refused(tmp_path):
    model = with_memory("some-layers")
    a, b = make_bank(model, tmp_path / "a"), make_bank(model, tmp_path / "b")
    for banks in ([a, b], [a, None], [None], []):
        with pytest.raises(ValueError, match="banks"):
            start_cache(model, banks)
    with pytest.raises(ValueError, match="memory"):
        make_bank(patch_model(tiny_llama(), [8], [1]), tmp_path / "none")


def test_a_longnet_reads_a_bank(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(
        position_embedding_type="xpos", segment_lengths=[8, 32], dilation_rates=[1, 4], overlap="once", local="sliding",
        num_sink_tokens=2, memory={"block_size": 4, "top_k": 3, "layers": [1]}, initializer_range=0.2,
    )  # fmt: skip
    model, text = LongNetForCausalLM(config).eval(), torch.randint(3, 61, (1, 100))
    bank = MemoryBank.from_tokens(model, [text[0, :70]], tmp_path, chunk_size=32, progress=False)
    actual, _ = read(model, text[:, 70:], [1, 29], bank.start_cache(model))
    torch.testing.assert_close(actual, logits(model, text)[:, 70:], **TOLERANCE)
    made = model.generate(text, max_new_tokens=4, do_sample=False, **named_cache(bank.start_cache(model)))
    assert torch.equal(made, model.generate(text, max_new_tokens=4, do_sample=False))
    assert DilatedCache(model.config).memory_footprint() == 0


@pytest.mark.parametrize("documents, said", [
    ([], "at least a token"), ([[], []], "at least a token"), ([[1, 2, 300]], "0 to 96, got 300"),
    ([[1], [-1]], "0 to 96, got -1"),
    ([1, 2], "in a row"), ([torch.ones(1, 5, dtype=torch.long)], "in a row"), ([[0.5, 1.5]], "float32"), ("ab", "'a'"),
])  # fmt: skip
def test_documents_without_tokens_of_the_model_are_refused(documents, said, tmp_path):
    with pytest.raises(ValueError, match=f"`documents` must .*{said}"):
        MemoryBank.from_tokens(with_memory("alone"), documents, tmp_path / "bank", progress=False)
    assert not (tmp_path / "bank").exists()


def test_reading_leaves_each_module_in_its_mode(tmp_path):
    model = with_memory("alone").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    make_bank(model, tmp_path / "bank")
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2


# Passages


def recall_bank(path, at: int, length: int = 400):
    """A bank of facts about names from 2 on, but for one fact about name 0 at a place; the model; the questions."""
    model, pairs, questions = recall_model()
    model = patch_model(model, [32], [1], memory={"block_size": 4, "top_k": 4})
    generator = torch.Generator().manual_seed(at)
    names, numbers = (torch.randint(*x, (length,), generator=generator) for x in ((2, len(pairs)), (0, pairs.shape[1])))
    text = pairs[names, numbers]
    text[at] = pairs[0, 3]
    return MemoryBank.from_tokens(model, [text], path, chunk_size=64, progress=False), model, questions


@pytest.mark.parametrize("at", [6, 150, 301, 390])
def test_the_passage_that_a_question_is_about_is_found(tmp_path, at):
    bank, model, questions = recall_bank(tmp_path / "bank", at)
    about, nothing = ([questions[i].item()] * 2 for i in (0, 1))
    (best,) = bank.find_passages(model, about, nothing, count=1, size=16)
    assert best.start <= at < best.stop == best.start + 16 and best.score > 1
    several = bank.find_passages(model, torch.tensor(about), nothing, count=5, size=16)
    assert best in several and [x.start for x in several] == sorted(x.start for x in several)
    everything = bank.find_passages(model, about, about, count=100, size=64)
    assert [(x.start, x.stop) for x in everything] == [(i, min(i + 64, 400)) for i in range(0, 400, 64)]
    assert not any(x.score for x in everything)  # no question is about more than itself


@pytest.mark.parametrize("length", [1, 3, 16, 18, 33])
def test_passages_are_the_whole_text(length, tmp_path):
    model = with_memory("clamped")
    bank = MemoryBank.from_tokens(model, tokens(length), tmp_path / "bank", progress=False)
    found = bank.find_passages(model, tokens(5)[0], tokens(6)[0], count=9, size=16)
    assert [i for x in found for i in range(x.start, x.stop)] == list(range(length))


def test_passages_are_ranked_by_the_likelihood_of_the_question_behind_them(tmp_path):
    model, ids, question = with_memory("alone"), tokens(90)[0], tokens(9)[0]
    bank = MemoryBank.from_tokens(model, [ids], tmp_path / "bank", chunk_size=32, progress=False)
    passages = bank.find_passages(model, question, tokens(8)[0], count=3, size=16)
    ranked = bank.rank_passages(model, passages, question, around=4)
    assert {x.start for x in ranked} == {x.start for x in passages}
    assert [x.score for x in ranked] == sorted((x.score for x in ranked), reverse=True)
    best = ranked[0]
    text = torch.cat([ids[max(0, best.start - 4) : best.stop + 4], question])[None]
    told = logits(model, text)[0, -len(question) - 1 : -1].log_softmax(-1).gather(-1, question[:, None]).sum()
    assert best.score == pytest.approx(told.item(), abs=2e-3)


class Letters:
    """A tokenizer of characters, with a first special token."""

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": [1] * add_special_tokens + [2 + ord(c) % 95 for c in text]}

    def decode(self, ids, skip_special_tokens):
        return "".join(f" {i}" for i in ids.tolist())


def test_a_question_is_answered_from_the_passages_that_it_is_likeliest_behind(tmp_path):
    model, ids, encode = with_memory("alone").train(), tokens(90)[0], Letters()
    bank = MemoryBank.from_tokens(model, [ids], tmp_path / "bank", chunk_size=32, progress=False)
    asked, beside = (encode(f" q {x}?", False, False)["input_ids"] for x in ("{who}", "what"))
    found = bank.find_passages(model, asked, beside, count=32)
    first, second = bank.rank_passages(model, found, asked, around=3)[:2]
    answer = bank.ask(
        model, encode, "{who}", template="T {passages} q {question}?", nothing="what", passages=2, around=3,
        max_new_tokens=5,
    )  # fmt: skip
    assert answer.passages == (second, first) and model.training
    gap = encode("\n...\n", False, False)["input_ids"]
    parts = [encode("T ", True, False)["input_ids"]]
    parts += [part for passage in (second, first) for part in (passage.cut(ids, 3).tolist(), gap)]
    prompt = torch.tensor([sum(parts, []) + asked])
    said = model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert answer.text == encode.decode(said[0, prompt.shape[1] :], True).strip()
    wrongs = {"template": "{question} {passages}"}, {"template": "{passages}"}, {"passages": 0}, {"nothing": None}
    for wrong in (*wrongs, {"num_return_sequences": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            bank.ask(model, encode, "who", **wrong)


def test_an_answer_ends_where_the_settings_of_generation_say(tmp_path):
    model, tokenizer = with_memory("alone", tiny_llama(vocab_size=259)), ByT5Tokenizer(extra_ids=0)
    bank = MemoryBank.from_texts(model, tokenizer, ["Once upon a time " * 9], tmp_path / "bank", progress=False)

    def ask(**settings) -> str:
        return bank.ask(model, tokenizer, "Who?", **settings).text

    long = ask(max_new_tokens=90)
    assert ask(generation_config=GenerationConfig(max_new_tokens=90, pad_token_id=0)) == long != ask()
    assert ask(max_length=2000, max_time=1e-9) == ask(max_new_tokens=1)
    stop = next(c for c in long if c.isascii() and c.isprintable())
    assert ask(stop_strings=[stop]) == long[: long.index(stop) + 1]


def test_passages_that_make_no_sense_are_refused(tmp_path):
    bank, model, questions = recall_bank(tmp_path / "bank", 9)
    about = [questions[0].item()] * 2
    for word, question, options in (
        ("question", about[:1], {}), ("question", [0.5, 1.5], {}), ("question", [about], {}), ("question", "Who?", {}),
        ("question", [1, 10**6], {}), ("question", {"input_ids": about}, {}),
        ("count", about, {"count": 0}), ("size", about, {"size": 6}), ("size", about, {"size": 2}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{word}`"):
            bank.find_passages(model, question, about, **options)
    with pytest.raises(ValueError, match="`around`"):
        bank.rank_passages(model, [], about, around=-1)
    for start, stop in ((5, 5), (400, 416), (-5, 11)):
        with pytest.raises(ValueError, match="`passages`"):
            bank.rank_passages(model, [Passage(start, stop, 0.0)], about)
    with pytest.raises(ValueError, match="another schedule"):
        bank.find_passages(with_memory("alone"), about, about)


def test_a_bank_of_a_model_in_which_no_head_has_a_memory_is_read_but_not_searched(tmp_path):
    model, text = patch_model(tiny_llama(), [8], [1], memory={"heads": {}, "max_distance": 16}), tokens(90)
    bank = MemoryBank.from_tokens(model, [text[0, :60]], tmp_path / "bank", chunk_size=32, progress=False)
    told, _ = read(model, text[:, 60:], [9, 1], bank.start_cache(model))
    torch.testing.assert_close(told, logits(model, text)[:, 60:], **TOLERANCE)
    with pytest.raises(ValueError, match="heads that have a memory, and its `memory` names none"):
        bank.find_passages(model, [3, 4], [5, 6])
