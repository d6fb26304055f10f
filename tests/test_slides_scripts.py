"""The slide scripts end to end on small synthetic sets: figures, files, and runs that go on after they were killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from examples.slides import encode, finetune, heatmap
from examples.slides.demo import demo_config
from examples.slides.outcomes import Outcome, bootstrap, concordance, cox_loss, hazard_loss
from examples.slides.synthetic import make_slide, write_data
from modeling_longnet import LongNetSlideEncoderForImageClassification, LongNetSlideEncoderModel


ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' on small data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Thirty slides whose label lies in the arrangement, and a random encoder beside them."""
    folder = write_data("arrangement", tmp_path_factory.mktemp("data"), 30)
    torch.manual_seed(0)
    LongNetSlideEncoderModel(demo_config()).save_pretrained(folder / "encoder")
    return folder


def encode_arguments(data, output, *more):
    return ["--features", str(data / "features"), "--checkpoint", str(data / "encoder"), "--output", str(output),
            "--max-tiles", "500", "--layers", *more]  # fmt: skip


def finetune_arguments(data, output, *more):
    return [
        "--features", str(data / "features"), "--labels", str(data / "labels.csv"), "--output_dir", str(output),
        "--bootstrap", "50", "--disable_tqdm", "true", "--use_cpu", *more,
    ]  # fmt: skip


def end_to_end(data, output, *more):
    return finetune_arguments(
        data, output, "--checkpoint", str(data / "encoder"), "--num_train_epochs", "2",
        "--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3", *more,
    )  # fmt: skip


# encode


@pytest.fixture(scope="module")
def encoded(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("encoded") / "slides.safetensors"
    return output, encode.main(encode_arguments(data, output))


def test_embeddings_are_those_of_each_slide_alone(data, encoded):
    ids, tensors = encode.read_embeddings(encoded[0])
    model = LongNetSlideEncoderModel.from_pretrained(data / "encoder").eval()
    assert ids == [f"arrangement-{i:04d}" for i in range(30)]
    assert tensors["layers"].shape == (30, 3, 48)
    for index in (0, 7, 20):  # of three pipelines; STAMP's features were float16
        slide = make_slide("arrangement", index)
        with torch.no_grad():
            alone = model(torch.from_numpy(slide.features)[None], torch.from_numpy(slide.coords)[None])
        tolerance = 5e-3 if index % 3 == 2 else 1e-5
        torch.testing.assert_close(tensors["pooled"][index], alone.pooler_output[0], rtol=0, atol=tolerance)
        for layer, wanted in enumerate(alone.layer_embeddings):
            torch.testing.assert_close(tensors["layers"][index, layer], wanted[0], rtol=0, atol=tolerance)


def test_hdf5_holds_the_same(data, encoded, tmp_path):
    encode.main(encode_arguments(data, tmp_path / "slides.h5"))
    (ids, tensors), (wanted_ids, wanted) = map(encode.read_embeddings, (tmp_path / "slides.h5", encoded[0]))
    assert ids == wanted_ids and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_an_interrupted_run_goes_on_to_the_same_file(data, encoded, tmp_path, monkeypatch):
    whole, calls = encode.encode_batch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(encode, "encode_batch", interrupted)
    output = tmp_path / "slides.safetensors"
    with pytest.raises(KeyboardInterrupt):
        encode.main(encode_arguments(data, output))
    assert not output.exists()
    with pytest.raises(SystemExit):  # not with other settings
        encode.main(encode_arguments(data, output, "--dtype", "bfloat16"))
    encode.main(encode_arguments(data, output))
    batches = len(encode.make_batches(encode.inspect_folder(data / "features", encode.Reading())[0], 500))
    assert len(calls) == batches + 1, "finished batches were computed again"
    assert output.read_bytes() == encoded[0].read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "parts" in path.name] == []


def test_what_cannot_be_read_is_in_the_report(data, tmp_path, capsys):
    for path in sorted((data / "features").iterdir())[:4]:
        (tmp_path / "features" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "features" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "features" / "broken.h5").write_bytes(b"nothing")
    arguments = encode_arguments(data, tmp_path / "o.safetensors")
    arguments[1] = str(tmp_path / "features")
    report = encode.main(arguments)
    assert len(report["slides"]) == 4 and list(report["skipped"]) == [str(tmp_path / "features" / "broken.h5")]
    assert "broken.h5: cannot be read" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        encode.main([*arguments, "--strict"])
    assert stopped.value.code == 1


# finetune


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    return output, finetune.main(end_to_end(data, output))


def test_a_trained_model_is_whole_and_its_figures_are_its_own(data, trained):
    output, results = trained
    model = AutoModelForImageClassification.from_pretrained(output / "model").eval()
    assert type(model) is LongNetSlideEncoderForImageClassification
    assert model.config.id2label == {0: "negative", 1: "positive"}
    with open(output / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in [row for row in rows if int(row["slide_id"][-4:]) % 3 < 2][:3]:
        slide = make_slide("arrangement", int(row["slide_id"][-4:]))
        with torch.no_grad():
            logits = model(torch.from_numpy(slide.features)[None], torch.from_numpy(slide.coords)[None]).logits
        assert float(row["positive"]) == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-4)
    assert {"auroc", "balanced_accuracy"} == set(results["test"]) and (output / "results.png").stat().st_size > 5000
    assert results["slides"]["test"] == len(rows) and sum(results["slides"].values()) == 30


def test_no_patient_is_in_two_parts(trained):
    run = json.loads((trained[0] / "run.json").read_text())
    patients = [{int(name[-4:]) // 2 for name in run["slides"][part]} for part in ("train", "val", "test")]
    assert len(set.union(*patients)) == sum(map(len, patients)) == 15


def test_a_killed_run_resumes_to_the_same_weights(data, trained, tmp_path, monkeypatch):
    step, steps = finetune.SlideTrainer.training_step, []

    def interrupted(self, *arguments, **options):
        steps.append(1)
        if len(steps) == 9:  # in the second epoch
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(finetune.SlideTrainer, "training_step", interrupted)
    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        finetune.main(end_to_end(data, output))
    with pytest.raises(SystemExit):  # not by accident
        finetune.main(end_to_end(data, output))
    with pytest.raises(ValueError, match="learning_rate"):
        finetune.main(end_to_end(data, output, "--resume", "--learning_rate", "0.5"))
    resumed = finetune.main(end_to_end(data, output, "--resume"))
    assert len(steps) == 9 + 6, "it went on from elsewhere than the first epoch's end"
    got, wanted = (load_file(folder / "model" / "model.safetensors") for folder in (output, trained[0]))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert resumed["test"] == trained[1]["test"]


def test_a_finished_run_is_not_trained_on(data, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune.SlideTrainer, "training_step", lambda *a, **o: pytest.fail("it trained on"))
    assert finetune.main(end_to_end(data, trained[0], "--resume"))["test"] == trained[1]["test"]


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(tmp_path):
    for step, state in ((2, "{}"), (10, '{"global_'), (9, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert finetune.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_lora_leaves_an_adapter_and_a_plain_model(data, tmp_path):
    pytest.importorskip("peft")
    results = finetune.main(end_to_end(data, tmp_path / "run", "--lora_rank", "2", "--num_train_epochs", "1"))
    model = LongNetSlideEncoderForImageClassification.from_pretrained(tmp_path / "run" / "model")
    base = LongNetSlideEncoderModel.from_pretrained(data / "encoder")
    assert results["training"]["trainable_parameters"] < 0.5 * base.num_parameters()
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert torch.equal(model.model.embeddings.projection.weight, base.embeddings.projection.weight)
    assert not torch.equal(model.model.layers[0].mlp.fc1.weight, base.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize("task", ["hazards", "cox"])
def test_survival_end_to_end_and_by_a_probe(task, data, encoded, tmp_path):
    options = ["--task", task, "--max_tiles", "40", "--num_train_epochs", "1"]
    run = finetune.main(end_to_end(data, tmp_path / "run", *options))
    embeddings = ["--embeddings", str(encoded[0]), "--layer", "1", "--task", task]
    probe = finetune.main(finetune_arguments(data, tmp_path / "probe", *embeddings))
    for results in (run, probe):
        assert 0 <= results["test"]["c_index"]["value"] <= 1
    assert (tmp_path / "run" / "results.png").exists()
    config = LongNetSlideEncoderForImageClassification.from_pretrained(tmp_path / "run" / "model").config
    assert config.num_labels == (1 if task == "cox" else len(run["interval_edges"]) + 1)


def test_the_arrangement_is_learnt_where_the_mean_of_the_tiles_knows_nothing(tmp_path, monkeypatch):
    """Acceptance in small: fewer slides than the demo, so the bar is lower than its 0.9."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = write_data("arrangement", tmp_path / "data", 420, noise=0.3)
    torch.manual_seed(0)
    LongNetSlideEncoderModel(demo_config()).save_pretrained(data / "encoder")
    mean = finetune.main(finetune_arguments(data, tmp_path / "mean", "--embeddings", "mean"))
    training = ["--checkpoint", str(data / "encoder"), "--num_train_epochs", "12", "--learning_rate", "2e-3",
                "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1"]  # fmt: skip
    whole = finetune.main(finetune_arguments(data, tmp_path / "whole", *training))
    torch.set_num_threads(threads)
    assert mean["test"]["auroc"]["low"] < 0.5 < mean["test"]["auroc"]["high"] and mean["test"]["auroc"]["value"] < 0.66
    assert whole["test"]["auroc"]["value"] > 0.85


BAD_LABELS = {
    "no column": ("slide_id,patient_id\na,b\n", "must have the columns"),
    "twice": ("slide_id,patient_id,label\na,b,x\na,b,y\n", "line 3: 'a' is named twice"),
    "no patient": ("slide_id,patient_id,label\na,,x\n", "line 2"),
    "no target": ("slide_id,patient_id,label\na,b,\n", "no row with a target"),
    "no file": ("slide_id,patient_id,label\na,b,x\nc,d,y\n", "none of the 2 slides"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_bad_labels_are_named(kind, data, tmp_path):
    text, message = BAD_LABELS[kind]
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        finetune.main(finetune_arguments(data, tmp_path / "o", "--embeddings", "mean",
                                         "--labels", str(tmp_path / "labels.csv")))  # fmt: skip


def test_a_patient_in_two_given_parts_is_refused(data, tmp_path):
    rows = list(csv.reader(open(data / "labels.csv", newline="")))
    parts = ["split"] + [("train", "val", "test")[i % 3] for i in range(30)]
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([*row, part] for row, part in zip(rows, parts))
    with pytest.raises(ValueError, match="patient 'patient-0000' is in 'train' and in 'val'"):
        finetune.main(finetune_arguments(data, tmp_path / "o", "--embeddings", "mean", "--split_column", "split",
                                         "--labels", str(tmp_path / "labels.csv")))  # fmt: skip


# losses and figures


def test_cox_loss_is_the_partial_likelihood():
    time, event = torch.tensor([5.0, 3.0, 8.0, 3.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    risk = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    r = risk[:, 0]
    wanted = -((r[0] - torch.stack([r[0], r[2]]).logsumexp(0)) + (r[1] - r.logsumexp(0))) / 2
    got = cox_loss(risk, torch.stack([time, event], dim=1))
    torch.testing.assert_close(got, wanted)
    assert torch.autograd.grad(got, risk)[0].isfinite().all()
    assert cox_loss(risk, torch.stack([time, 0 * event], dim=1)).item() == 0


def test_hazard_loss_is_the_likelihood_of_each_interval():
    logits = torch.randn(3, 4, dtype=torch.float64)
    hazard, outcome = logits.sigmoid(), torch.tensor([[2, 1], [1, 0], [0, 1]])
    wanted = [(1 - hazard[0, 0]) * (1 - hazard[0, 1]) * hazard[0, 2], (1 - hazard[1, 0]) * (1 - hazard[1, 1]),
              hazard[2, 0]]  # fmt: skip
    torch.testing.assert_close(hazard_loss(logits, outcome), -torch.stack(wanted).log().mean())


def test_intervals_and_risk():
    outcome = Outcome("hazards", edges=[2.0, 5.0])
    assert [outcome.encode((t, 1)).tolist() for t in (1.0, 2.0, 3.0, 9.0)] == [[0, 1], [0, 1], [1, 1], [2, 1]]
    risk = outcome.scores(torch.tensor([[2.0, 2.0, 2.0], [-2.0, -2.0, -2.0]]))
    assert risk[0] > risk[1]
    assert concordance(np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 3.0]), np.ones(3)) == 1
    assert concordance(np.array([1.0, 1.0]), np.array([1.0, 2.0]), np.array([1, 0])) == 0.5


def test_intervals_resample_patients_not_slides():
    """Ten copies of one patient's slide are no more evidence than one."""
    values = np.repeat(np.array([0.0, 1.0, 0.0, 1.0]), 10)
    patients = [str(i // 10) for i in range(40)]
    by_patient = bootstrap(lambda x: float(x.mean()), (values,), patients, 400)
    by_slide = bootstrap(lambda x: float(x.mean()), (values,), [str(i) for i in range(40)], 400)
    assert by_patient["high"] - by_patient["low"] > 2 * (by_slide["high"] - by_slide["low"])
    assert by_patient["value"] == 0.5


# heatmap


def test_heat_maps_are_chosen_by_deletion_and_go_on(data, trained, tmp_path, monkeypatch):
    names = [f"arrangement-{i:04d}" for i in range(3)]
    arguments = ["--features", str(data / "features"), "--checkpoint", str(trained[0] / "model"), "--slides", *names,
                 "--output-dir", str(tmp_path / "maps")]  # fmt: skip
    whole, calls = heatmap.explain_slide, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(heatmap, "explain_slide", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heatmap.main(arguments)
    resumed = heatmap.main(arguments)
    assert len(calls) == 4
    again = heatmap.main([*arguments[:-1], str(tmp_path / "again")])
    assert resumed["mean_of_deletion_curve"] == again["mean_of_deletion_curve"]
    areas = {name: area for name, area in resumed["mean_of_deletion_curve"].items() if name != "random"}
    assert resumed["method"] == min(areas, key=areas.get) and len(areas) == 3
    for name in names:
        about, other = (json.loads((tmp_path / d / f"{name}.json").read_text()) for d in ("maps", "again"))
        assert about == other and len(about["methods"]["rollout"]["scores"]) == about["tiles"]
        assert (tmp_path / "maps" / f"{name}.png").stat().st_size > 5000


def test_integrated_gradients_sum_to_the_change_of_the_output(trained):
    from examples.slides.attribution import integrated_scores, output_of, rollout_scores

    model = LongNetSlideEncoderForImageClassification.from_pretrained(trained[0] / "model").eval()
    slide = make_slide("arrangement", 4)
    batch = {"tile_embeds": torch.from_numpy(slide.features)[None], "coords": torch.from_numpy(slide.coords)[None]}
    mean = batch["tile_embeds"].mean(dim=1, keepdim=True).expand_as(batch["tile_embeds"])
    with torch.no_grad():
        change = output_of(model(**batch).logits, 1) - output_of(model(mean, batch["coords"]).logits, 1)
    assert integrated_scores(model, batch, 1).sum() == pytest.approx(change.item(), rel=0.05, abs=0.02)
    shares = rollout_scores(model, batch, 1)
    assert (shares >= 0).all() and 0.5 < shares.sum() <= 1.0001


# killed for good


@pytest.mark.slow
@pytest.mark.parametrize("script", ["encode", "finetune", "heatmap"])
def test_a_process_killed_without_notice_goes_on_to_the_same(script, data, trained, tmp_path):
    def arguments_of(output):
        if script == "encode":
            return [*encode_arguments(data, output / "o.safetensors"), "--max-tiles", "100"]
        if script == "finetune":
            return end_to_end(data, output, "--num_train_epochs", "6")
        return ["--features", str(data / "features"), "--checkpoint", str(trained[0] / "model"), "--output-dir",
                str(output)]  # fmt: skip

    def begin(output, *more):
        command = [sys.executable, "-W", "ignore", "-m", f"examples.slides.{script}", *arguments_of(output), *more]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)

    sign = {"encode": "o.safetensors.parts/000003.safetensors", "finetune": "checkpoint-*", "heatmap": "*-0004.json"}
    assert begin(tmp_path / "whole").wait() == 0
    killed = begin(tmp_path / "killed")
    while killed.poll() is None and not list((tmp_path / "killed").glob(sign[script])):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    result = {"encode": "o.safetensors", "finetune": "model/model.safetensors", "heatmap": "arrangement-0029.json"}
    assert not (tmp_path / "killed" / result[script]).exists(), "it was done before it was killed"
    assert begin(tmp_path / "killed", *["--resume"] * (script == "finetune")).wait() == 0
    one, other = ((tmp_path / name / result[script]).read_bytes() for name in ("whole", "killed"))
    assert one == other
