"""What --demo stands for in each script: small data sets and encoders, made on the spot below `runs/slides/`."""

import shutil
from pathlib import Path

import numpy as np
import torch

from examples.slides.synthetic import FEATURES_FOLDER, LABELS_FILE, write_data
from modeling_longnet import LongNetSlideEncoderConfig, LongNetSlideEncoderModel


ROOT = Path("runs/slides")
NUM_SLIDES = {"rare": 480, "arrangement": 800}


def demo_config(**fields) -> LongNetSlideEncoderConfig:
    """An encoder for the synthetic slides: 2 layers of 48, about 40,000 parameters."""
    return LongNetSlideEncoderConfig(
        **{
            "in_chans": 24, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "segment_lengths": [64, 256], "dilation_rates": [1, 2], "padding": "mask",
            "slide_ngrids": 12, "pooling": "mean", "hidden_dropout": 0.0, "drop_path_rate": 0.0,
            # Features of unit variance must reach the layers as large as the positions: 24 ** -0.5.
            "initializer_range": 0.2,
        }
        | fields
    )  # fmt: skip


def demo_data(task: str) -> Path:
    """The folder of a synthetic data set, made if it is not there."""
    return write_data(task, ROOT / task, NUM_SLIDES[task])


def demo_encoder() -> Path:
    """A folder with an encoder of random weights."""
    folder = ROOT / "encoder"
    if not (folder / "config.json").is_file():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LongNetSlideEncoderModel(demo_config()).save_pretrained(folder)
    return folder


def one_thread() -> None:
    """Tiny tensors gain nothing from a second core, and lose much on a busy machine: 30 times was seen."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def prepare_encode(options) -> None:
    """Sixty slides of three pipelines, and three files that no pipeline should have written."""
    one_thread()
    folder = ROOT / "encode" / FEATURES_FOLDER
    if not folder.is_dir():
        source = write_data("arrangement", ROOT / "encode" / "slides", 60)
        shutil.copytree(source / FEATURES_FOLDER, folder)
        (folder / "cut-short.h5").write_bytes((folder / "arrangement-0000.h5").read_bytes()[:3000])
        np.save(folder / "without-coordinates.npy", np.ones((5, 24), np.float32))
        (folder / "a-letter.h5").write_text("Dear pathologist,\n")
    options.features, options.checkpoint = folder, demo_encoder()
    options.output, options.layers = options.output or ROOT / "encode" / "embeddings.safetensors", True


def labels(task: str) -> Path:
    return demo_data(task) / LABELS_FILE
