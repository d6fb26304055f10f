"""Where a cache keeps what a memory has read: every store is the device's, and nothing is lost or silently wrong."""

import copy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_memory_patch import TOLERANCE, logits, read, recall_cases, recall_model, tiny_llama, tokens, with_memory

from modeling_longnet import DilatedCache, patch_model
from modeling_longnet.dilated_cache_file import load_cache, save_cache
from modeling_longnet.dilated_memory_layer import MemoryLayer
from modeling_longnet.memory_files import BASIS_NAME, write_bases
from modeling_longnet.memory_pages import STATE_NAME, StoreFolder
from modeling_longnet.memory_store import RowFiles, Shape, TensorStore
from modeling_longnet.transformers_compat import named_cache


SIZES = [50, 1, 1, 30, 7, 42]
KINDS = ["cpu", "fetched", "disk"]


@pytest.fixture(params=["beside-dilated", "some-layers", "some-heads", "few-dimensions"])
def model(request):
    return with_memory(request.param)


@pytest.fixture
def make_cache(tmp_path, monkeypatch):
    """Makes a cache of a kind; "fetched" is what "cpu" is beside a GPU: no keys and values may be read in place."""

    def make(model, kind, name="pages"):
        if kind == "fetched":
            monkeypatch.setattr(TensorStore, "whole", lambda *_: None)
        path = {"path": tmp_path / name} if kind == "disk" else {}
        return DilatedCache(model.config, store="cpu" if kind == "fetched" else kind, **path)

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_store_gives_the_bits_of_the_device(model, make_cache, kind, batch):
    text = tokens(131, batch=batch)
    expected, _ = read(model, text, SIZES)
    actual, cache = read(model, text, SIZES, make_cache(model, kind))
    if kind == "disk" and batch > 1:  # rows decode one by one: sums in another order
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    else:
        assert torch.equal(actual, expected)
    torch.testing.assert_close(expected, logits(model, text), **TOLERANCE)
    places = cache.memory_by_place()
    assert sum(places.values()) == cache.memory_footprint()
    assert places[{"cpu": "cpu", "fetched": "cpu", "disk": "disk"}[kind]] >= 131 * batch * 2 * 2 * 8 * 4
    if kind == "cpu":  # of layers with a memory the device holds the index of the blocks and nothing else
        layers = [layer for layer in cache.dilated_layers if isinstance(layer, MemoryLayer)]
        index = [x.nbytes for layer in layers for n in ("index", "far") for x in layer.store.ranked(n, slice(None))]
        assert sum(index) == sum(layer.bytes()["device"] for layer in layers) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [9, 13, 17, 22])
def test_short_texts_of_few_blocks(make_cache, kind, length):
    model, text = with_memory("alone"), tokens(length)
    actual, _ = read(model, text, [length - 3, 1], make_cache(model, kind))
    torch.testing.assert_close(actual, logits(model, text), **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_stored_as_it_is(make_cache, kind):
    model, text = with_memory("clamped", tiny_llama().to(torch.bfloat16)), tokens(100)
    expected, _ = read(model, text, [40, 1, 30])
    actual, _ = read(model, text, [40, 1, 30], make_cache(model, kind))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_read_what_they_read_alone(model, make_cache, kind):
    text, pad = tokens(100, batch=2), 23
    padded = torch.cat([torch.zeros(2, pad, dtype=torch.long), text], dim=1)
    padded[1] = torch.cat([text[1], tokens(pad)[0]])
    mask = torch.ones_like(padded)
    mask[0, :pad] = 0
    expected = logits(model, text[:1])[0]
    cache, outs = make_cache(model, kind), []
    for begin, end in ((0, 60), (60, 61), (61, 123)):
        with torch.no_grad():
            outs.append(
                model(
                    input_ids=padded[:, begin:end], attention_mask=mask[:, :end], use_cache=True, **named_cache(cache)
                ).logits  # fmt: skip
            )
    out = torch.cat(outs, dim=1)
    torch.testing.assert_close(out[0, pad:], expected, **TOLERANCE)
    torch.testing.assert_close(out[1], logits(model, padded[1:])[0], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_cropped_selected_and_reset_it_is_as_if_it_had_not_been(model, make_cache, kind):
    text = tokens(90, batch=3)
    expected = logits(model, text)
    _, cache = read(model, text[:, :70], [70], make_cache(model, kind))
    cache.activate_past_recording()
    read(model, tokens(21, batch=3), [8, 13], cache)
    cache.crop(-21)
    cache.batch_select_indices(torch.tensor([2, 0]))
    rows = torch.tensor([2, 0])
    if kind != "disk":
        cache.batch_repeat_interleave(2)
        rows = rows.repeat_interleave(2)
    torch.testing.assert_close(read(model, text[rows, 70:], [1, 19], cache)[0], expected[rows, 70:], **TOLERANCE)
    cache.reset()
    torch.testing.assert_close(read(model, text[rows], [90], cache)[0], expected[rows], **TOLERANCE)


def test_rows_on_disk_are_not_doubled(make_cache):
    model, text = with_memory("alone"), tokens(40, batch=2)
    _, cache = read(model, text, [40], make_cache(model, "disk"))
    for change in (lambda: cache.batch_repeat_interleave(2), lambda: cache.reorder_cache(torch.tensor([0, 0]))):
        with pytest.raises(ValueError, match="doubled"):
            change()
    torch.testing.assert_close(
        read(model, text[:, :9], [9], cache)[0], logits(model, torch.cat([text, text[:, :9]], 1))[:, 40:], **TOLERANCE
    )
    fresh = make_cache(model, "disk", "beams")
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(text, num_beams=2, max_new_tokens=2, attention_mask=torch.ones_like(text), **named_cache(fresh))
    assert fresh.get_seq_length() == 0
    with pytest.raises(ValueError, match="copied"):
        copy.deepcopy(cache)


@pytest.mark.parametrize("kind", ["device", *KINDS])
def test_generate_takes_any_store(model, make_cache, kind):
    prompt = torch.cat([tokens(40), tokens(40)], dim=1)
    settings = {"max_new_tokens": 7, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **settings, cache_implementation="dynamic")
    assert torch.equal(model.generate(prompt, **settings, **named_cache(make_cache(model, kind))), expected)
    if kind != "disk":
        beams = model.generate(prompt, **settings, num_beams=3, cache_implementation="dynamic")
        cache = make_cache(model, kind)
        assert torch.equal(model.generate(prompt, **settings, num_beams=3, **named_cache(cache)), beams)


def test_a_needle_is_found_in_files(tmp_path):
    model, pairs, questions = recall_model()
    texts, answers = recall_cases(pairs, questions)
    found = patch_model(model, [32], [1], memory={"block_size": 4, "top_k": 8})
    _, cache = read(found, texts[:, :-1], [300], DilatedCache(found.config, store="disk", path=tmp_path / "pages"))
    save_cache(tmp_path / "pages", cache, found)
    cache.close()
    loaded, _ = load_cache(tmp_path / "pages", found)
    assert torch.equal(read(found, texts[:, -1:], [1], loaded)[0][:, -1].argmax(-1), answers)


# On disk


def on_disk(model, path, count=70, batch=1):
    _, cache = read(model, tokens(110, batch)[:, :count], [31, 1], DilatedCache(model.config, store="disk", path=path))
    return cache


@pytest.mark.parametrize("batch", [1, 2])
def test_saved_loaded_and_gone_on_with_it_is_the_one_that_never_stopped(model, tmp_path, batch):
    rest = tokens(110, batch)[:, 70:]
    cache = on_disk(model, tmp_path / "pages", batch=batch)
    save_cache(tmp_path / "pages", cache, model, note=torch.tensor(7))
    shutil.copytree(tmp_path / "pages", tmp_path / "copy")
    went_on, _ = read(model, rest, [1, 39], cache)
    loaded, extra = load_cache(tmp_path / "copy", model)
    assert torch.equal(read(model, rest, [1, 39], loaded)[0], went_on) and extra["note"] == 7
    save_cache(tmp_path / "copy", loaded, model)
    with pytest.raises(ValueError, match="folder of `cache`"):
        save_cache(tmp_path / "elsewhere", loaded, model)


def test_what_was_read_after_the_last_save_is_not_there(model, tmp_path):
    """A reader that is killed leaves pages behind its last state; whoever goes on does not see them."""
    text = tokens(110)
    cache = on_disk(model, tmp_path / "pages")
    save_cache(tmp_path / "pages", cache, model)
    read(model, (text[:, 70:] + 3) % 97, [40], cache)
    shutil.copytree(tmp_path / "pages", tmp_path / "left")  # as a killed process leaves it
    loaded, _ = load_cache(tmp_path / "left", model)
    torch.testing.assert_close(read(model, text[:, 70:], [40], loaded)[0], logits(model, text)[:, 70:], **TOLERANCE)


def test_a_reader_that_is_killed_leaves_its_last_state(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        sys.path[:0] = sys.argv[2:]
        from test_memory_patch import read, tokens, with_memory
        from modeling_longnet import DilatedCache
        from modeling_longnet.dilated_cache_file import save_cache
        from modeling_longnet.memory_pages import PageFile
        model, text = with_memory("clamped"), tokens(110)
        cache = DilatedCache(model.config, store="disk", path=sys.argv[1])
        read(model, text[:, :70], [70], cache)
        save_cache(sys.argv[1], cache, model)
        write, calls = PageFile.write, []
        def killing(self, first, records):
            calls.append(1)
            if len(calls) == 5:  # in the middle of a forward, with some layers written and some not
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, first, records)
        PageFile.write = killing
        read(model, text[:, 70:] * 0 + 5, [40], cache)
    """)
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "pages"), *folders], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    model, text = with_memory("clamped"), tokens(110)
    loaded, _ = load_cache(tmp_path / "pages", model)
    assert loaded.get_seq_length() == 70
    torch.testing.assert_close(read(model, text[:, 70:], [40], loaded)[0], logits(model, text)[:, 70:], **TOLERANCE)


def test_tokens_that_a_state_counts_are_not_written_over_under_it(tmp_path):
    model = with_memory("alone")
    cache = on_disk(model, tmp_path / "pages")
    cache.activate_past_recording()
    read(model, tokens(20), [20], cache)
    cache.crop(0)
    save_cache(tmp_path / "pages", cache, model)
    read(model, tokens(9), [9], cache)
    cache.crop(-9)
    assert (tmp_path / "pages" / STATE_NAME).exists()  # what was cropped stood behind the state
    cache.reset()
    assert not (tmp_path / "pages" / STATE_NAME).exists()
    read(model, tokens(50), [50], cache)
    with pytest.raises(FileNotFoundError, match="no saved memory"):
        load_cache(tmp_path / "pages", model)


def test_a_closed_cache_is_written_to_no_more(tmp_path):
    cache = on_disk(with_memory("alone"), tmp_path / "pages")
    cache.close()
    with pytest.raises(ValueError, match="closed"):
        read(with_memory("alone"), tokens(9), [9], cache)


def test_a_device_that_reads_no_files_gets_only_what_is_new(tmp_path):
    shape = Shape(1, 2, 8, torch.float32, torch.device("cpu"), 4)
    files = RowFiles(StoreFolder(tmp_path, is_new=True), 0, 0, shape)
    files.copies = {}  # as beside a GPU
    written = torch.randn(2, 700, 16)
    first = 0
    for count in (1, 3, 250, 2, 300, 144):  # 256 records, and more
        files.write_index("index", first, written[:, first : first + count])
        first += count
        (copied,) = files.ranked("index")
        assert torch.equal(copied[0, :, :first], written[:, :first])
        assert torch.equal(copied[0].transpose(0, 1), files.indices["index"].records)
    held = copied.data_ptr()
    files.write_index("index", 500, written[:, :2])  # what was cropped is written anew
    (copied,) = files.ranked("index")
    assert copied.data_ptr() == held and torch.equal(copied[0, :, 500:502], written[:, :2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory is a GPU's")
def test_pinned_memory_stays_pinned():
    store = TensorStore(Shape(2, 1, 8, torch.float32, torch.device("cuda"), 4), on_device=False)
    store.write(slice(None), 0, *(torch.randn(2, 1, 9, 8) for _ in range(2)))
    store.map_batch(lambda x: x[:1])
    assert store.keys.is_pinned() and store.values.is_pinned()


def test_dimensions_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = with_memory("few-dimensions")
    write_bases(tmp_path, model)
    before = (tmp_path / BASIS_NAME).read_bytes()

    def killed(tensors, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_bases(tmp_path, model)
    assert (tmp_path / BASIS_NAME).read_bytes() == before


def test_what_is_damaged_foreign_or_in_use_is_refused(tmp_path):
    model = with_memory("clamped")
    cache = on_disk(model, tmp_path / "pages")
    save_cache(tmp_path / "pages", cache, model)
    with pytest.raises(ValueError, match="in use"):
        load_cache(tmp_path / "pages", model)
    with pytest.raises(ValueError, match="in use|holds a memory"):
        DilatedCache(model.config, store="disk", path=tmp_path / "pages")
    cache.close()
    with pytest.raises(ValueError, match="holds a memory"):
        DilatedCache(model.config, store="disk", path=tmp_path / "pages")
    with pytest.raises(ValueError, match="schedule"):
        load_cache(tmp_path / "pages", with_memory("alone"))
    other = with_memory("clamped", tiny_llama(initializer_range=0.1))
    with pytest.raises(ValueError, match="weights"):
        load_cache(tmp_path / "pages", other)
    for name in ("tokens-001-000.bin", "far-002-000.bin"):
        shutil.copytree(tmp_path / "pages", tmp_path / name)
        with (tmp_path / name / name).open("r+b") as file:
            file.truncate(400)
        with pytest.raises(ValueError, match="cut off"):
            load_cache(tmp_path / name, model)
    with pytest.raises(ValueError, match="must be a file"):
        save_cache(tmp_path / "pages", read(model, tokens(20), [20])[1], model)
    state = tmp_path / "pages" / STATE_NAME
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        load_cache(tmp_path / "pages", model)


def test_a_folder_is_gone_on_from_where_the_first_row_is_padding_so_far(tmp_path):
    model, text, mask = with_memory("clamped"), tokens(120, batch=2), torch.ones(2, 120, dtype=torch.long)
    mask[0, :70] = 0
    cache = DilatedCache(model.config, store="disk", path=tmp_path / "pages")
    for begin, end in ((0, 60), (60, 120)):
        given = {"input_ids": text[:, begin:end], "attention_mask": mask[:, :end]}
        with torch.no_grad():
            out = model(**given, use_cache=True, **named_cache(cache)).logits
        if end == 60:
            save_cache(tmp_path / "pages", cache, model)
            cache.close()
            cache, _ = load_cache(tmp_path / "pages", model)
    torch.testing.assert_close(out[1], logits(model, text[1:])[0, 60:], **TOLERANCE)
    torch.testing.assert_close(out[0, 10:], logits(model, text[:1, 70:])[0], **TOLERANCE)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"store": "gpu"}, "store"), ({"store": "disk"}, "path"), ({"path": "x"}, "path"), ({"store": "cpu"}, "memory")],
)
def test_stores_that_make_no_sense_are_refused(options, word):
    model = with_memory("alone") if word != "memory" else patch_model(tiny_llama(), [8], [1])
    with pytest.raises(ValueError, match=word):
        DilatedCache(model.config, **options)
