"""Evidence: the tasks are what they say, and a model that finds needles finds them however it is patched, cached, sent.

The model of `finder` recalls by one attention layer, so what it finds is what its attention has read: a patch without a
memory must lose what lies behind its window, or these tests could not fail.
"""

import contextlib
import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from examples.benchmarks import memory_study
from examples.evidence import adaptation, needles, positions, runtime
from examples.evidence.reading import ask, read
from examples.evidence.records import mean
from examples.evidence.ruler_tasks import DEPTHS, Question, Tasks, largest, score
from modeling_longnet import export_patched_model, load_patched_model, patch_model


LENGTH, WIDTH, QUIET = 1500, 128, 8
FOUND = [1.0] * len(DEPTHS)
PLAIN = {"segment_lengths": [64, 256], "dilation_rates": [1, 4]}
MEMORY = {"segment_lengths": [64], "dilation_rates": [1], "memory": {"block_size": 4, "top_k": 8}}


class Words:
    """A tokenizer of words that grows with what it reads; a needle is one token, and so is a question."""

    PIECES = re.compile(r"One of the special magic numbers for \S+ is: \d+\.|\nWhat is the special .*|\S+")

    def __init__(self):
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self.ids.setdefault(word, len(self.ids)) for word in self.PIECES.findall(text)]

    def decode(self, ids: list[int]) -> str:
        words = list(self.ids)
        return " ".join(words[i] for i in ids)


def finder(words: Words) -> LlamaForCausalLM:
    """A model of one layer that has needle and question tokens attend by the key they name, and says the number.

    Half of a needle's vector is a code of its key, the other of its number; a question's is its key's; others are zero.
    Queries and keys are the keys' codes, in channels that rotary embeddings hardly turn; values are the numbers' codes.
    """
    torch.manual_seed(1)
    half, codes, slow = WIDTH // 2, {}, [i for i in range(WIDTH // 2) if i % (WIDTH // 4) >= QUIET]

    def code(name: str) -> torch.Tensor:
        if name not in codes:
            codes[name] = torch.zeros(half)
            codes[name][slow] = torch.nn.functional.normalize(torch.randn(len(slow)), dim=0)
        return codes[name]

    named = re.compile(r"for (\S+) (?:is: (\d+)\.|mentioned)")
    known = [(word, *match.groups()) for word in list(words.ids) if (match := named.search(word))]
    words.encode(" ".join(number for _, _, number in known if number))
    config = LlamaConfig(
        vocab_size=len(words.ids), hidden_size=WIDTH, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        head_dim=half, max_position_embeddings=4096, rope_theta=1e9, eos_token_id=None, bos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    layer, embedding = model.model.layers[0].self_attn, model.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() == 1 else 0.0)
        for word, key, number in known:
            embedding[words.ids[word], :half] = code("key " + key)
            if number:
                embedding[words.ids[word], half:] = code("number " + number)
                model.lm_head.weight[words.ids[number], half:] = code("number " + number)
        layer.q_proj.weight[:, :half] = 2 * torch.eye(half)
        layer.k_proj.weight[:, :half] = torch.eye(half)
        layer.v_proj.weight[:, half:] = torch.eye(half)
        layer.o_proj.weight[half:] = torch.eye(half)
    return model


@pytest.fixture(scope="module")
def case_and_model():
    words = Words()
    case = Tasks(words.encode).make("niah_multikey_1", LENGTH, 0)
    return case, finder(words), words


def scores(model, case, words, chunk_size=400) -> list[float]:
    return [row["score"] for row in needles.measure(model, words, case, chunk_size)]


def generated(model, case, words) -> list[float]:
    said = []
    for question in case.questions:
        prompt = torch.tensor([case.text + question.tokens])
        made = model.generate(prompt, max_new_tokens=1, do_sample=False, attention_mask=torch.ones_like(prompt))
        said.append(score(question, words.decode(made[0, prompt.shape[1] :].tolist())))
    return said


def test_the_needle_is_found_dense_and_with_a_memory_and_lost_without(case_and_model):
    case, model, words = case_and_model
    assert scores(model, case, words) == generated(model, case, words) == FOUND
    assert sum(scores(patch_model(copy.deepcopy(model), **PLAIN), case, words)) < 3
    remembers = patch_model(copy.deepcopy(model), **MEMORY)
    for chunk_size in (LENGTH, 400, 33):
        assert scores(remembers, case, words, chunk_size) == FOUND
    assert generated(remembers, case, words) == FOUND


def test_the_needle_is_found_by_what_was_saved_and_exported(case_and_model, tmp_path):
    case, model, words = case_and_model
    remembers = patch_model(copy.deepcopy(model), **MEMORY)
    remembers.save_pretrained(tmp_path / "saved")
    export_patched_model(remembers, tmp_path / "exported")
    assert scores(load_patched_model(tmp_path / "saved").eval(), case, words) == FOUND
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True).eval()
    assert type(remote).__module__.startswith("transformers_modules")
    assert generated(remote, case, words) == FOUND
    without = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert generated(without, case, words) == FOUND  # dense, as the checkpoint was


def test_a_draft_saves_time_and_changes_nothing(case_and_model):
    case, model, words = case_and_model
    for variant in (None, PLAIN, MEMORY):
        one = copy.deepcopy(model) if variant is None else patch_model(copy.deepcopy(model), **variant)
        cache = read(one, case.text, 500)
        for question in case.questions:
            first = ask(one, cache, dataclasses.replace(question, draft=()), words)
            wrong = ask(one, cache, dataclasses.replace(question, draft=(0, 1)), words)
            assert ask(one, cache, question, words).split()[0] == wrong.split()[0] == first.split()[0]
            assert cache.get_seq_length() == len(case.text)


def test_the_first_number_that_is_said_is_the_answer():
    question = Question([1], ["4711"], 9, is_number=True)
    said = {"": False, " is 47": False, " is 4711": True, " is 48": True, " 47112": True}
    assert {text: question.is_over(text) for text in said} == said
    assert score(question, " it is 4711.") == 1 and score(Question([1], ["ab", "cd", "ef", "gh"], 9), "CD, gh") == 0.5


@pytest.mark.parametrize(("low", "bound", "high"), [(1, 1, 9), (3, 7, 100), (3, 99, 100), (5, 63, 64), (2, 999, 64)])
def test_the_largest_size_that_fits_is_found(low, bound, high):
    tried = []
    assert largest(lambda size: tried.append(size) or size <= bound, low, high) == min(bound, high - 1)
    assert max(tried) <= 2 * bound  # a text is made and counted for every try
    with pytest.raises(ValueError, match="lengths"):
        largest(lambda size: False, low, high)


@pytest.mark.parametrize("task", Tasks.NAMES)
@pytest.mark.parametrize("length", [2048, 4096])
def test_tasks_fill_their_length_and_hold_their_answers(task, length):
    words = re.compile(r"\d|\w+|\W")
    ids: dict[str, int] = {}
    tasks = Tasks(lambda text: [ids.setdefault(piece, len(ids)) for piece in words.findall(text)])
    case = tasks.make(task, length, 3)
    assert case == tasks.make(task, length, 3) != tasks.make(task, length, 4)
    longest = len(case.text) + max(len(question.tokens) + question.new_tokens for question in case.questions)
    assert 0.9 * length < longest <= length
    pieces = list(ids)
    text = "".join(pieces[i] for i in case.text)
    for question in case.questions:
        assert all(answer in text for answer in question.answers)
        if question.depth is not None:
            assert text.index(question.answers[0]) / len(text) == pytest.approx(question.depth, abs=0.1)
    if task == "cwe":
        counts = [len(re.findall(rf"\d\. {answer}\b", text)) for answer in case.questions[0].answers]
        assert min(counts) >= (6 if length < 4096 else 30)
    if task == "fwe":
        counts = [text.count(answer) for answer in case.questions[0].answers]
        assert counts == sorted(counts, reverse=True) and counts[-1] > 1


@pytest.fixture
def byte_model(tmp_path):
    """A folder with a tiny model over bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2048, initializer_range=0.2, eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_was_asked_is_not_asked_again(byte_model, tmp_path, monkeypatch):
    arguments = ["--model", str(byte_model), "--tasks", "passkey", "niah_multikey_1", "--lengths", "2048",
                 "--variants", "dense", "with memory", "--output", str(tmp_path / "x.json")]  # fmt: skip
    first = needles.main([*arguments, "--trials", "1"])
    assert len(first["records"]) == 2 * (1 + 5) and (tmp_path / "x.png").exists()
    asked = []
    monkeypatch.setattr(needles, "measure", lambda *given: asked.append(given) or [first["records"][0]])
    again = needles.main([*arguments, "--trials", "2"])
    assert len(asked) == 4 and again["records"][:12] == first["records"]
    lines = (tmp_path / "x.md").read_text().splitlines()
    assert lines[0] == "| task | tokens | dense | with memory |" and len(lines) == 4
    assert json.loads((tmp_path / "x.json").read_text())["provenance"]["command"]
    with pytest.raises(ValueError, match="haystack"):
        needles.main([*arguments, "--trials", "2", "--haystack", "python-source"])


def test_a_memory_study_goes_on_and_refuses_other_settings(byte_model, tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    arguments = ["--model", str(byte_model), "--tasks", "passkey-700", "--output", str(path)]
    first = memory_study.main([*arguments, "--settings", "dense", "64 x 4, 16 dimensions", "--trials", "1"])
    old = json.loads(path.read_text())
    del old["earlier runs"], old["settings"]["64 x 4"]  # as written before either was
    old["provenance"]["date"] = "2026-01-01"
    path.write_text(json.dumps(old))
    again = memory_study.main([*arguments, "--settings", "64 x 4", "64 x 4, 16 dimensions", "dense", "--trials", "2"])
    assert again["records"][:2] == first["records"] and len(again["records"]) == 2 + 2 + 1 + 1
    likelihoods = {r["setting"]: r["log_likelihood"] for r in again["records"] if r["trial"] == 1}
    assert len(set(likelihoods.values())) == 3 and (tmp_path / "x.png").exists()
    written = path.read_text()
    assert json.loads(written)["earlier runs"] == [old["provenance"]]
    monkeypatch.setitem(memory_study.SETTINGS, "64 x 4", memory_study.SETTINGS["32 x 8"])
    with pytest.raises(ValueError, match="'64 x 4'"):
        memory_study.main([*arguments, "--settings", "dense", "--trials", "3"])
    monkeypatch.undo()
    monkeypatch.setattr(memory_study, "CALIBRATION", ("python-docs", 99))
    with pytest.raises(ValueError, match="'calibration'"):
        memory_study.main([*arguments, "--settings", "dense", "--trials", "3"])
    assert path.read_text() == written


def test_the_committed_memory_study_can_be_gone_on_with():
    path = Path(__file__).parents[1] / "docs/results/memory_study.json"
    records, beside = memory_study.open_study(path, "smollm2-135m-instruct")
    found = json.loads(path.read_text())
    assert records == found["records"] and beside["settings"] == beside["settings"] | found["settings"]
    with pytest.raises(ValueError, match="'model'"):
        memory_study.open_study(path, "another")


def test_the_table_compares_forms_on_the_same_texts():
    def record(variant, trial, score):
        return {"task": "vt", "length": 64, "variant": variant, "trial": trial, "score": score, "depth": None}

    rows = [record("dense", 0, 1.0), record("dense", 1, 0.0), record("with memory", 0, 0.5)]
    assert needles.table(rows).splitlines()[-1] == "| vt | 64 | 0.50 of 2 | 0.50 of 1 (0.50) |"
    longer = rows + [rows[-1] | {"variant": "with memory", "length": 128}]  # dense has read none of that length
    assert needles.table(longer).splitlines()[-1] == f"| vt | 128 |  | {rows[-1]['score']:.2f} of 1 |"


def test_losses_by_position_are_those_of_the_full_forward(byte_model, tmp_path):
    arguments = ["--model", str(byte_model), "--length", "1300", "--chunk-size", "500", "--windows", "2", "--variants",
                 "dense", "default patch", "--output", str(tmp_path / "x.json")]  # fmt: skip
    result = positions.main(arguments)
    assert len(result["records"]) == 2 * 2 * 2 and (tmp_path / "x.png").exists()
    model = LlamaForCausalLM.from_pretrained(byte_model).eval()
    for record in result["records"][:2]:
        text = positions.load_text(record["text"])
        tokens = positions.window_of(lambda part: ByT5Tokenizer(extra_ids=0)(part).input_ids, text, 0, 2, 1300)
        if record["variant"] != "dense":
            patch_model(model, **positions.VARIANTS[record["variant"]])
        with torch.no_grad():
            logits = model(tokens[None], use_cache=False).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        assert record["loss"] == pytest.approx(losses.mean().item(), abs=1e-4)
        last = record["buckets"][-1]
        assert last["loss"] == pytest.approx(losses[last["start"] :].mean().item(), abs=1e-4)
    assert {row["text"] for row in result["summary"]} == {"python-docs", "python-source", "all texts"}
    whole = [row for row in result["summary"] if row["whole"]]
    assert [(row["text"], row["start"], row["end"]) for row in whole] == [
        (text, 0, 1299) for text in ("python-docs", "python-source", "all texts")
    ]
    for row in whole[:2]:
        own = [record for record in result["records"] if record["text"] == row["text"]]
        dense, patched = (mean(own, "loss", variant=variant) for variant in ("dense", "default patch"))
        assert row["dense"]["perplexity"] == pytest.approx(math.exp(dense))
        assert row["default patch"]["ratio"] == pytest.approx(math.exp(patched - dense))
    assert "| 0 to 1,299, the whole |" in (tmp_path / "x.md").read_text()
    before = (tmp_path / "x.json").read_text()
    positions.main(arguments)
    assert (tmp_path / "x.json").read_text() == before


def test_an_interval_holds_the_ratio_and_narrows_with_agreement():
    apart, close = ({"a": [x, -x, 0.1], "b": [0.2, 0.1, x]} for x in (0.5, 0.1))
    wide, narrow = positions.interval(apart), positions.interval(close)
    assert wide["low"] < wide["ratio"] < wide["high"]
    assert narrow["high"] - narrow["low"] < wide["high"] - wide["low"]
    same = positions.interval({"a": [0.25, 0.25]})
    assert same["low"] == pytest.approx(same["high"]) == pytest.approx(1.2840254)


def test_figure_5_measures_both_sides_until_the_budget_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "seconds_of", lambda run, device: run().isfinite().all().item() * 1.0)
    monkeypatch.setattr(runtime, "PART", 8192)
    arguments = ["--lengths", "1024", "2048", "--budget", "3", "--stream-tokens", "9000", "--output",
                 str(tmp_path / "x.json")]  # fmt: skip
    rows = runtime.main(arguments)["rows"]
    assert [(row["side"], row["tokens"]) for row in rows if row["kind"] == "operator"] == [
        ("dense", 1024), ("LongNet", 1024), ("LongNet", 2048),
    ]  # fmt: skip
    assert "not tried" in (tmp_path / "x.md").read_text() and (tmp_path / "x.png").exists()
    assert [(row.get("start"), row["tokens"]) for row in rows if row["kind"] == "stream"] == [(0, 8192), (8192, 9000)]
    assert runtime.main(arguments)["rows"] == rows
    with pytest.raises(ValueError, match="'stream tokens' 9000, not 9001"):
        runtime.main([*arguments[:-3], "9001", *arguments[-2:]])


def test_a_stream_goes_on_and_its_rows_end_where_the_position_doubles(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "CHUNK", 64)
    monkeypatch.setattr(runtime, "PART", 256)
    state, seconds = tmp_path / "state.safetensors", iter(range(1000))
    monkeypatch.setattr(runtime, "clock", lambda device: next(seconds))

    def read(rows, stop=None):
        read_to = []

        def write():
            read_to.append(rows[-1]["tokens"])
            if rows[-1]["tokens"] == stop:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            runtime.read_stream(rows, write, state, 1500, torch.float32, "cpu")
        assert state.exists() == (stop is not None)
        return read_to

    other = {"kind": "model", "side": "dense", "tokens": 64, "seconds": 1.0}
    rows = [other]
    assert read(rows, stop=768) == [256, 512, 768]
    assert read(rows) == [1024, 1280, 1500]
    parts = [(row["start"], row["tokens"], row["seconds"]) for row in rows[1:]]
    assert parts == [(0, 256, 1), (256, 512, 1), (512, 1024, 2), (1024, 1500, 2)] and rows[0] is other
    read(rows[:1], stop=512)
    assert read(rows[:2]) == [256, 512, 768, 1024, 1280, 1500]  # a state of another moment: from the beginning


def test_figure_5_ends_where_memory_does(tmp_path, monkeypatch):
    def forget(run, device):
        raise torch.OutOfMemoryError

    measured = {"kind": "operator", "side": "dense", "tokens": 64, "seconds": 1.0}
    rows = [measured, measured | {"side": "LongNet"}]
    runtime.write_json(tmp_path / "x.json", {"provenance": {}, "earlier runs": [], "rows": rows})
    monkeypatch.setattr(runtime, "seconds_of", forget)
    rows = runtime.main(["--kinds", "operator", "--lengths", "128", "256", "--budget", "99", "--output",
                         str(tmp_path / "x.json")])["rows"]  # fmt: skip
    assert [(row["tokens"], row["seconds"]) for row in rows[2:]] == [(128, None)] * 2
    assert (tmp_path / "x.md").read_text().splitlines()[-1] == "| 128 | out of memory | out of memory |"
    assert all(row["peak bytes"] > 0 for row in rows[2:])


def test_the_document_shows_the_tables_of_the_records():
    docs = Path(__file__).parents[1] / "docs"
    text, records = (docs / "evidence.md").read_text(), {}
    for name in ("needles", "needles_lora", "positions", "runtime", "adaptation", "adaptation_gpu", "adaptation_long"):
        written = (docs / f"results/evidence_{name}.md").read_text()
        assert written in text
        records[name] = json.loads((docs / f"results/evidence_{name}.json").read_text()), written
    found, written = records["needles"]
    assert needles.table(found["records"]) == written
    found, written = records["needles_lora"]
    assert needles.table(found["records"]) == written
    found, written = records["positions"]
    assert positions.table(found["summary"], found["costs"]) == written
    found, written = records["runtime"]
    assert runtime.table(found["rows"], budget=60) == written
    for name in ("adaptation", "adaptation_gpu", "adaptation_long"):
        found, written = records[name]
        assert adaptation.table(found["summary"], found["settings"]["lengths"]) == written


@pytest.mark.parametrize("has_dense", [True, False])
def test_without_dense_the_perplexity_itself_is_drawn(has_dense):
    rows = [{"start": n, "end": 2 * n, "dense": {"perplexity": 9.0}, "a": {"perplexity": 10.0}} for n in (512, 1024)]
    forms = ["dense", "a"] if has_dense else ["a"]
    for row in rows if has_dense else ():
        row["a"] |= {"ratio": 1.1, "low": 1.0, "high": 1.2}
    axis = Figure().subplots()
    positions.draw_quality(axis, rows, forms)
    labels = axis.get_legend_handles_labels()[1]
    assert (axis.get_ylabel() == "perplexity") != has_dense and ("dense" in labels) == has_dense
