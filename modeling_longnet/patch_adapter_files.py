"""What a PEFT adapter of a patched model takes with it: the settings of the patch, and in its card how to load it."""

import functools
import importlib
import importlib.util
import json
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import AutoTokenizer, PreTrainedModel

from .memory_files import write_bases
from .model_card import TAGS
from .transformers_compat import UPLOAD, text_config_of


SETTINGS_NAME = "dilated_attention.json"
# It stands at the head of the card: most of what PEFT's template has below it is left blank.
NOTICE = """
**Dilated attention.** This adapter was trained on a base model with dilated attention, whose settings are in
`dilated_attention.json`. Loaded by PEFT or Transformers alone it runs on the dense model, for which it was not trained.
With longnet-transformers:

```python
from modeling_longnet import load_patched_model

model = load_patched_model("this folder or repository")
```
"""


def write_settings(folder: str | Path, settings: dict) -> None:
    """The settings of a patch as a file of their own, for what is saved without the model's configuration."""
    (Path(folder) / SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n")


def _rows_in_adapter(path: str, name: str, width: int) -> int | None:
    """Rows of the base model's table of token vectors, its module `name`, as an adapter's weights hold or fit it."""
    # No import statement: what those name, Transformers demands of all who load this code from the Hub.
    with importlib.import_module("safetensors").safe_open(path, "pt") as weights:
        for key in weights.keys():
            _, found, rest = key.partition(f".{name}.")
            shape = weights.get_slice(key).get_shape() if found else ()
            if len(shape) == 2 and rest.startswith("lora_embedding_A"):
                return shape[1]
            if len(shape) == 2 and rest.endswith("weight") and shape[1] == width and not rest.startswith("lora_"):
                return shape[0]
    return None


def resize_for_adapter(
    model: PreTrainedModel, path_or_repo: str, find: Callable[[str], str | None], *, trust_remote_code=None, **hub
) -> None:
    """Gives a base model the vocabulary with which an adapter was trained, where that had tokens added.

    The adapter's weights tell it where they have the token vectors, else the tokenizer beside them, as in PEFT.

    Args:
        find: gives the path of a file of the adapter, or None. hub: where to find the adapter.
    """
    table = model.get_input_embeddings()
    rows, width = table.weight.shape
    name = next(name for name, module in model.named_modules() if module is table)
    weights = find("adapter_model.safetensors")
    wanted = _rows_in_adapter(weights, name, width) if weights is not None else None
    if wanted is not None and wanted != rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)  # the adapter brings the new rows
    elif wanted is None and find("tokenizer_config.json") is not None:
        tokenizer = AutoTokenizer.from_pretrained(path_or_repo, trust_remote_code=trust_remote_code, **hub)
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer))


def _settings_of(model) -> dict | None:
    config = getattr(model.get_base_model(), "config", None)
    return getattr(text_config_of(config), "dilated_attention", None)


def _tell_in_card(path: Path, is_patched: bool) -> None:
    """Brings the notice, and the tags, into a card or takes the notice out of it; what else it says stays."""
    if not path.is_file():
        return
    card = ModelCard.load(path)
    if not is_patched and NOTICE not in card.text:
        return
    card.text = (NOTICE if is_patched else "") + card.text.replace(NOTICE, "")
    if is_patched:
        card.data.tags = sorted({*(card.data.tags or ()), *TAGS})
    card.save(path)


class AdapterRecord:
    """While one lives, PEFT writes the settings beside an adapter whose base model is patched, and the notice into its
    card. Each patched model holds one, and so does each copy of it.

    The adapter alone is saved, never the base model's configuration, and a PEFT model may be made before or after the
    patch; the methods of PEFT's class that are exchanged are what every way of saving passes, Trainer's and the Hub's
    included. With the last record they are put back.
    """

    def __init__(self):
        if importlib.util.find_spec("peft") is None:
            return
        # No import statement: what those name, Transformers demands of all who load this code from the Hub.
        PeftModel = importlib.import_module("peft").PeftModel
        weakref.finalize(self, _put_back, PeftModel).atexit = False
        with _LOCK:
            while self not in _records(PeftModel):  # a collection of garbage may put the methods back in between
                _records(PeftModel).add(self)

    def keep_with(self, model: PreTrainedModel) -> None:
        """Lives on as long as a model that holds it no more."""
        weakref.finalize(model, id, self).atexit = False  # a reference to it

    def __deepcopy__(self, memo: dict) -> "AdapterRecord":
        return AdapterRecord()

    def __reduce__(self):
        return AdapterRecord, ()


_LOCK = threading.RLock()  # a collection of garbage may come to it within itself


def _records(PeftModel: type) -> weakref.WeakSet:
    """The living records; where there are none, the methods are exchanged first."""
    save, upload = PeftModel.save_pretrained, getattr(PeftModel, UPLOAD)
    if hasattr(save, "dilated_attention_records"):
        return save.dilated_attention_records

    @functools.wraps(save)
    def save_pretrained(self, save_directory, *args, **kwargs):
        result = save(self, save_directory, *args, **kwargs)
        settings = _settings_of(self)
        for folder in (Path(save_directory), *(Path(save_directory) / name for name in self.peft_config)):
            if settings is None:
                (folder / SETTINGS_NAME).unlink(missing_ok=True)  # of a patched adapter that was saved there before
            elif (folder / "adapter_config.json").is_file():
                write_settings(folder, settings)
                write_bases(folder, self.get_base_model())
        if kwargs.get("is_main_process", True):
            _tell_in_card(Path(save_directory) / "README.md", settings is not None)
        return result

    @functools.wraps(upload)
    def upload_modified_files(self, working_dir, *args, **kwargs):
        # A push puts the repository's card, or an empty one, over that which was saved.
        _tell_in_card(Path(working_dir) / "README.md", _settings_of(self) is not None)
        return upload(self, working_dir, *args, **kwargs)

    save_pretrained.dilated_attention_records = records = weakref.WeakSet()
    exchanged = {"save_pretrained": save_pretrained, UPLOAD: upload_modified_files}
    save_pretrained.exchanged = {new: vars(PeftModel).get(name) for name, new in exchanged.items()}
    for name, new in exchanged.items():
        setattr(PeftModel, name, new)
    return records


def _put_back(PeftModel: type) -> None:
    """Gives PEFT's class its own methods again if no record lives, unless others have put theirs over ours."""
    with _LOCK:
        save, now = PeftModel.save_pretrained, {name: getattr(PeftModel, name) for name in ("save_pretrained", UPLOAD)}
        if any(getattr(save, "dilated_attention_records", (True,))) or {*now.values()} != {*save.exchanged}:
            return
        for name, new in now.items():
            if save.exchanged[new] is None:  # it was inherited
                delattr(PeftModel, name)
            else:
                setattr(PeftModel, name, save.exchanged[new])
