"""Export a patched model as a folder that brings its own code: it loads patched where this package is not installed.

    patch_model(model, segment_lengths=[256, 512, 1024], dilation_rates=[1, 2, 4])
    export_patched_model(model, "my-model")
    AutoModelForCausalLM.from_pretrained("my-model", trust_remote_code=True)  # patched
    AutoModelForCausalLM.from_pretrained("my-model")                          # the original model
"""

import json
from pathlib import Path

from huggingface_hub import HfApi
from torch import nn

from .model_card import make_model_card
from .patching import is_patched
from .transformers_compat import auto_class_of, code_files, has_own_adapter, text_config_of, unwrap


MODELING_FILE = "modeling_dilated"
AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering", "AutoModel",
)  # fmt: skip
# The class keeps its name: configurations, pipelines and other tools know the architecture by it.
CODE = '''"""{name} with dilated attention, as `config.dilated_attention` describes it."""

import transformers

from .patching import patch_as_configured, unpatched_attention_of
from .transformers_compat import MadeOtherwise


class {name}(MadeOtherwise, transformers.{name}):
    """Patched whenever it is made, as its configuration says."""

    change = staticmethod(patch_as_configured)
    original_attention = staticmethod(unpatched_attention_of)
'''


def _auto_class_of(model: nn.Module) -> str:
    """The Auto class that makes models of this class, which has to be one of Transformers' own."""
    name = auto_class_of(model, AUTO_CLASSES)
    if name is not None:
        return name
    raise ValueError(
        f"`model` must be of a class that an Auto class of Transformers makes, got {type(model).__name__} of "
        f"{type(model).__module__}."
    )


def _refuse_to_export(model: nn.Module, base: nn.Module) -> None:
    if base is not model or has_own_adapter(base):
        raise ValueError("`model` has an adapter: merge it first (`model = model.merge_and_unload()`).")
    if not is_patched(base):
        raise ValueError(f"{type(base).__name__} is not patched: call `patch_model` first.")
    if text_config_of(base.config) is not base.config:
        raise ValueError(
            f"`model` must be a language model by itself, got {type(base).__name__}, a composite one: save it by "
            "`save_pretrained` (or `push_to_hub`) and load it by `load_patched_model`."
        )
    if (base.config.dilated_attention.get("memory") or {}).get("dimensions"):
        raise ValueError(
            "`model` has a memory with calibrated dimensions, which an export does not carry yet: use "
            "`save_pretrained` and `load_patched_model`, or patch without `dimensions`."
        )


def export_patched_model(
    model: nn.Module,
    folder: str | Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    **kwargs,
) -> Path:
    """Save a patched model with the code of the patch, and a model card; with `repo_id`, push that folder to the Hub.

    Args:
        model: a patched model. An adapter has to be merged first.
        folder: where to; save the tokenizer there as well.
        repo_id: "user/name" of the repository to create, if need be, and to push to.
        license, base_model: for the card: of the weights, and what they were made from.
        token, private: for the Hub.
        **kwargs: for `save_pretrained` (max_shard_size, ...).

    Returns:
        The folder.

    Raises:
        ValueError: a model that is not patched, has an adapter, or is not of one of Transformers' own classes.
    """
    base, folder = unwrap(model), Path(folder)
    _refuse_to_export(model, base)
    # What was loaded from an export carries its code along by itself.
    is_export = MODELING_FILE in type(base).__module__
    auto_class = None if is_export else _auto_class_of(base)
    base.save_pretrained(folder, **kwargs)
    if not is_export:
        patching = Path(__file__).parent / "patching.py"
        for file in [patching, *map(Path, code_files(patching))]:
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / f"{MODELING_FILE}.py").write_text(CODE.format(name=type(base).__name__))
        # Last: an export that was interrupted has no entry for code that may be missing.
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {auto_class: f"{MODELING_FILE}.{type(base).__name__}"}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    card = make_model_card(base, repo_id or folder.name, license=license, base_model=base_model, loads_patched=True)
    card.save(folder / "README.md")
    if repo_id is not None:
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload patched model")
    return folder


__all__ = ["export_patched_model"]
