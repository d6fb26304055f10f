"""The benchmarks of a memory: each runs in small, and measures what it says."""

import pytest
import torch
from test_evidence import byte_model  # noqa: F401  a fixture

from examples.benchmarks import memory_heads, memory_model_cost
from examples.evidence.reading import VARIANTS
from modeling_longnet import DilatedCache


FORM = {"segment_lengths": [64], "dilation_rates": [1], "memory": {"heads": {0: [0]}, "top_k": 4}}


def test_the_map_of_heads_says_what_each_text_alone_would_choose(byte_model, tmp_path):  # noqa: F811
    arguments = ["--model", str(byte_model), "--texts", "python-docs", "python-source", "--length", "300"]
    result = memory_heads.main([*arguments, "--num-heads", "2", "--output", str(tmp_path / "x.json")])
    assert sum(len(heads) for heads in result["best"].values()) == 2
    assert set(result["of these chosen by one text alone"].values()) <= {0, 1, 2}
    assert (tmp_path / "x.png").exists()
    assert memory_heads.overlap({1: [0, 2], 3: [1]}, {1: [2], 3: [1], 4: [0]}) == 2
    assert memory_heads.mean_of([{0: [0.0, 0.5]}, {0: [1.0, 0.5]}]) == {0: [0.5, 0.5]}


@pytest.mark.parametrize("store", ["device", "cpu"])
def test_the_cost_of_a_model_is_told_by_form_and_length(byte_model, tmp_path, monkeypatch, store):  # noqa: F811
    monkeypatch.setitem(VARIANTS, "memory in 18 heads", FORM)
    caches = []
    decode = memory_model_cost.decode
    monkeypatch.setattr(memory_model_cost, "decode", lambda m, cache, n: caches.append(cache) or decode(m, cache, n))
    result = memory_model_cost.main([
        "--model", str(byte_model), "--lengths", "100", "300", "--decoding-lengths", "200", "400", "--store", store,
        "--variants", "dense", "memory in 18 heads", "--output", str(tmp_path / "x.json"),
    ])  # fmt: skip
    for part, lengths in (("forward", [100, 300]), ("decoding", [200, 400])):
        assert [row["tokens"] for row in result[part]] == lengths
        assert all(set(row["seconds"]) == {"dense", "memory in 18 heads"} for row in result[part])
    assert (tmp_path / "x.png").exists() and [x.get_seq_length() for x in caches] == [208] * 4 + [408] * 4
    stored = [x.layers[0].stored() for x in caches if isinstance(x, DilatedCache)]
    assert len(stored) == 4 and all(x["keys"].shape[2] >= 208 for x in stored) and stored[-1]["forgotten"].max() > 250
    assert torch.isfinite(stored[-1]["keys"][:, :, :408]).all() and "index" in stored[-1]


def test_a_part_that_was_not_measured_has_no_picture(tmp_path, monkeypatch):
    shown, new_figure = [], memory_model_cost.new_figure
    monkeypatch.setattr(memory_model_cost, "new_figure", lambda count: shown.append(count) or new_figure(count))
    row = {"tokens": 2048, "seconds": {"dense": 1.0}}
    origin = {"provenance": {"hardware": "a", "date": "b", "commit": "c"}}
    for forward, decoding in (([row], [row]), ([], [row])):
        memory_model_cost.draw(origin | {"forward": forward, "decoding": decoding}, tmp_path / "x.png")
    assert shown == [2, 1]
