"""Turn a quantized GGUF file into an ordinary Transformers folder: safetensors, config, tokenizer.

Transformers reads GGUF weights and dequantizes them, but flags the model as quantized, after which `save_pretrained`
and the Trainer refuse it. This script loads once, takes the flag off and saves, so that later loads are fast and plain.

    python -m conversion.dequantize_gguf model.Q4_1.gguf folder-for-the-result --dtype bfloat16
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conversion.checkpoint_files import DTYPES, new_folder, run_converter


def unflag_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a GGUF-loaded model, whose weights are plain tensors already, count as an ordinary one. In place."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _locate(source: str | Path, gguf_file: str | None) -> Path:
    path = Path(source) / gguf_file if gguf_file else Path(source)
    if not path.is_file():
        wanted = "a GGUF file" if gguf_file else "a GGUF file, or a folder together with `gguf_file`"
        raise ValueError(f"`source` must be {wanted}, got {str(path)!r}, which is not a file.")
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"`source` must be a GGUF file, got {str(path)!r}, which begins with {magic!r}.")
    return path


def dequantize_gguf(
    source: str | Path, output: str | Path, *, gguf_file: str | None = None, dtype: str = "float32"
) -> Path:
    """Converts a GGUF causal language model into a safetensors folder with its config and tokenizer.

    The folder appears under its name only when it is complete; an interrupted run leaves nothing behind.

    Args:
        source: a GGUF file, or the folder that holds `gguf_file`.
        output: the folder to make. It must not exist, or be empty.
        gguf_file: the file's name when `source` is a folder.
        dtype: "float32", "bfloat16" or "float16".

    Returns:
        `output` as a path.

    Raises:
        ValueError: no GGUF file there, `output` holds something already, or an unknown dtype.
        ImportError: the `gguf` package is missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    file = _locate(source, gguf_file)
    if find_spec("gguf") is None:
        raise ImportError("Reading GGUF files needs the gguf package: pip install gguf")

    with new_folder(output) as folder:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=DTYPES[dtype])
        unflag_quantized(model).save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return Path(output)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a GGUF file, or a folder together with --gguf-file")
    parser.add_argument("output", help="the folder to make; it must not exist, or be empty")
    parser.add_argument("--gguf-file", help="the file's name inside the source folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    return run_converter(parser, dequantize_gguf, arguments)


if __name__ == "__main__":
    main()
