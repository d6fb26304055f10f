"""The studies beside LongNet's neighbours: their tasks ask what they say, their runs go on where they stopped."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from examples.evidence import compare, language_model, mqar, source_code
from examples.evidence.neighbours.attention_patterns import Bounded, Fixed
from examples.evidence.neighbours.backbone import ModelShape
from examples.evidence.neighbours.lru import LinearRecurrentUnit
from examples.evidence.neighbours.systems import SYSTEMS
from examples.evidence.recall import IGNORED, RecallModel, accuracy, make_batch, measure_recall
from examples.evidence.records import mean, measure_missing, saving
from examples.evidence.training import bits_per_byte, parameter_groups


TINY = {
    "shape": {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "window": 8},
    "text": {"context": 64, "rows": 1, "steps": 2, "learning_rate": 5e-3, "test_bytes": 256},
    "recall": {
        "grid": [[64, 4]], "test_grid": [[64, 4], [96, 4]], "vocab_size": 64, "window": 8, "tokens_per_batch": 128,
        "steps": 2, "learning_rate": 1e-2,
    },
    "speed": {"seconds_per_text": 20},
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(compare.SCALES, "cpu", TINY)
    monkeypatch.setattr(compare, "CONTEXTS", (32, 64))
    monkeypatch.setattr(compare, "PREFILL", (64, 96))
    monkeypatch.setattr(compare, "DECODE", (32, 96))
    text = torch.arange(4096, dtype=torch.uint8)
    monkeypatch.setattr(compare, "source_bytes", lambda held_out: text)
    monkeypatch.setattr(language_model, "source_bytes", lambda held_out: text)


@pytest.mark.parametrize("length, pairs", [(64, 4), (96, 16), (33, 2)])
def test_recall_asks_each_key_once_for_its_value(length, pairs):
    tokens, labels = make_batch(50, length, pairs, 64, torch.Generator().manual_seed(0))
    for row, wanted in zip(tokens.tolist(), labels.tolist()):
        stored = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]))
        asked = [t for t in range(length) if wanted[t] != IGNORED]
        assert len(stored) == len(asked) == pairs
        assert sorted(row[t] for t in asked) == sorted(stored)
        assert all(wanted[t] == stored[row[t]] and t >= 2 * pairs and t % 2 == 0 for t in asked)
        assert all(row[t] == 0 for t in range(2 * pairs, length) if t not in asked)
        assert all(0 < key < 32 <= value < 64 for key, value in stored.items())


def test_recall_prefers_short_gaps():
    _, labels = make_batch(400, 256, 4, 64, torch.Generator().manual_seed(0))
    at = (labels != IGNORED).nonzero()[:, 1]
    assert (at < 60).float().mean() > 0.6 and at.max() > 200


def test_recall_refuses_more_pairs_than_fit():
    with pytest.raises(ValueError, match="num_pairs"):
        make_batch(1, 64, 32, 64, torch.Generator())
    with pytest.raises(ValueError, match="num_pairs"):
        make_batch(1, 20, 8, 64, torch.Generator())


class Oracle(torch.nn.Module):
    """Answers from a table of what it read, or always the same."""

    def __init__(self, remembers):
        super().__init__()
        self.remembers = remembers
        self.system = SimpleNamespace(embedding_weight=lambda: torch.zeros(1))

    def forward(self, tokens, labels):
        asked, scores = labels != IGNORED, torch.zeros(*tokens.shape, 64)
        for row, place in asked.nonzero().tolist():
            first = tokens[row].tolist().index(int(tokens[row, place]))
            scores[row, place, tokens[row, first + 1] if self.remembers else 40] = 1
        return scores[asked], labels[asked]


def test_accuracy_is_one_for_who_remembers_and_chance_for_who_does_not():
    assert accuracy(Oracle(True), 64, 4, 64, queries=64) == 1
    assert accuracy(Oracle(False), 64, 4, 64, queries=512) < 0.15


@pytest.mark.slow
def test_attention_learns_recall():
    scale = {**compare.SCALES["cpu"]}
    scale["recall"] = {**scale["recall"], "grid": [[32, 2]], "test_grid": [[32, 2]], "steps": 500}
    assert measure_recall(lambda *args: mqar.build("Llama (dense)", *args), scale, "cpu", 0)["accuracy"]["32,2"] > 0.9


@pytest.mark.parametrize("name", mqar.SCHEDULES)
def test_schedules_of_the_recall_study_are_models(name):
    shape = ModelShape(vocab_size=64, hidden_size=16, num_attention_heads=2, window=8, max_length=512)
    model = RecallModel(mqar.build(name, shape, 0))
    scores, labels = model(*make_batch(1, 96, 4, 64, torch.Generator().manual_seed(0)))
    torch.nn.functional.cross_entropy(scores, labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compare_writes_a_row_and_does_not_measure_it_again(tiny, tmp_path, monkeypatch):
    output = tmp_path / "neighbours.json"
    arguments = ["--systems", "LongNet", "Hawk", "--device", "cpu", "--output", str(output)]
    result = compare.main(arguments)
    assert len(result["records"]) == 6
    assert {"hardware", "date", "commit", "command"} <= result["records"][0]["provenance"].keys()
    learns, costs, what = output.with_suffix(".md").read_text().split("\n\n")
    assert len(learns.splitlines()) == len(costs.splitlines()) == 4 and " - " not in learns + costs
    assert len(what.splitlines()) == 2 + len(SYSTEMS) and output.with_suffix(".png").stat().st_size > 5000

    def refuse(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(compare, "PARTS", dict.fromkeys(compare.PARTS, refuse))
    assert compare.main(arguments) == json.loads(output.read_text())
    monkeypatch.setitem(compare.SCALES, "cpu", {**TINY, "text": {**TINY["text"], "steps": 3}})
    with pytest.raises(ValueError, match="'text'"):
        compare.main(arguments)
    assert compare.main([*arguments, "--parts", "recall", "speed"])["records"] == result["records"]


def test_lengths_that_take_too_long_are_left_out(tiny):
    measured = compare.measure_speed("Hawk", {**TINY, "speed": {"seconds_per_text": 0.0}}, "cpu", 0)
    assert measured["prefill_tokens_per_second"]["96"] is None and measured["state_bytes"]["96"] is None
    assert measured["decode_ms_per_token"]["32"] > 0


def test_an_interrupted_run_goes_on(tmp_path):
    path, seen = tmp_path / "r.json", []

    def measure(a):
        seen.append(a)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return {"value": a * 10}

    wanted = [{"a": 1}, {"a": 2}, {"a": 3}]
    with pytest.raises(KeyboardInterrupt):
        measure_missing(path, {"s": 1}, wanted, measure)
    result = measure_missing(path, {"s": 1}, wanted, measure)
    assert seen == [1, 2, 2, 3] and [r["value"] for r in result["records"]] == [10, 20, 30]
    assert mean(result["records"], "value") == 20 and mean(result["records"], "value", a=4) is None


@pytest.mark.parametrize("interrupted", [False, True])
def test_records_are_written_every_few_seconds_and_always_at_the_end(tmp_path, monkeypatch, interrupted):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("examples.evidence.records.time", SimpleNamespace(monotonic=lambda: now.seconds))
    path, records, held = tmp_path / "r.json", [], []
    with contextlib.suppress(KeyboardInterrupt), saving(path, {"records": records}, every=5.0) as save:
        for second in (0, 2, 4.9, 5, 6, 7):
            now.seconds = second
            records.append(second)
            save()
            held.append(json.loads(path.read_text())["records"][-1])
        if interrupted:
            raise KeyboardInterrupt
    assert held == [0, 0, 0, 5, 5, 5] and json.loads(path.read_text())["records"] == records
    before = path.stat().st_mtime_ns
    with saving(path, {"records": []}):
        pass
    assert path.stat().st_mtime_ns == before


def test_the_small_table_2_bounds_distances_by_the_training_context(tiny, tmp_path, monkeypatch):
    scale = {
        "shape": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "window": 4, "max_length": 64},
        "contexts": [16, 64], "tokens_per_batch": 64, "steps": 2, "learning_rate": 1e-3, "test_bytes": 128,
    }  # fmt: skip
    monkeypatch.setitem(language_model.SCALES, "cpu", scale)
    output = tmp_path / "lm.json"
    result = language_model.main(["--seeds", "2", "--device", "cpu", "--output", str(output)])
    assert len(result["records"]) == 12 and output.with_suffix(".png").stat().st_size > 5000
    for record in result["records"]:
        plain, bounded = record["bits_per_byte"], record["bits_per_byte_bounded"]
        assert record["tokens"] == 128 and plain["16"] == bounded["16"]
        assert (plain["64"] == bounded["64"]) == (record["context"] == 64)
    assert len(output.with_suffix(".md").read_text().splitlines()) == 2 + 6


@pytest.mark.parametrize("name", language_model.SYSTEMS)
def test_bounded_models_see_no_farther_than_the_training_context(name):
    shape = ModelShape(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, window=4, max_length=64)
    model = language_model.SYSTEMS[name](shape, 16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        tokens = torch.randint(256, (1, 64))
        changed = tokens.clone()
        changed[:, 20] = (changed[:, 20] + 1) % 256
        felt = (model(tokens)[0] - model(changed)[0]).abs().amax((0, 2)).nonzero()[:, 0]
    assert felt.min() == 20 and felt.max() < 36


def test_bounded_patterns_keep_pairs_within_reach():
    at = torch.arange(40)
    bounded, whole = Bounded(Fixed(6, 2), 15), Fixed(6, 2)
    distance = at[:, None] - at
    assert bounded.visible(at, at).equal(whole.visible(at, at) & (distance < 15))
    assert bounded.candidates(30, 36).min() > 15


def test_perplexity_is_that_of_all_blocks():
    system = mqar.build("Llama (dense)", ModelShape(hidden_size=16, num_attention_heads=2), 0)
    tokens = torch.randint(256, (64,), dtype=torch.uint8)
    losses = [
        torch.nn.functional.cross_entropy(system(block[None, :-1].long())[0][0], block[1:].long(), reduction="sum")
        for block in tokens.view(2, 32)
    ]
    wanted = sum(losses).item() / 62 / 0.6931471805599453
    assert bits_per_byte(system, tokens, 32) == pytest.approx(wanted, rel=1e-5)


def test_recurrences_learn_slowly_and_do_not_decay():
    module = LinearRecurrentUnit(8, 8)
    groups = parameter_groups(module, 1e-2)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rates[id(module.log_decay)] == rates[id(module.input_matrix)] == (1e-3, 0.0)
    assert rates[id(module.output_matrix)] == (1e-2, 0.1) and rates[id(module.skip)] == (1e-2, 0.0)


def test_held_out_files_are_others():
    files = source_code.source_files()
    assert len(set(files)) == len(files) > 300
    training, test = source_code.source_bytes(False), source_code.source_bytes(True)
    assert len(test) > 100_000 and 5 < len(training) / len(test) < 20
    assert bytes(test[:300].tolist()) not in bytes(training.numpy())
