"""From texts to blocks of tokens, packed without padding."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase


def encode_bytes(text: str) -> torch.Tensor:
    """What ByT5Tokenizer gives without its closing token, a thousand times as fast: each byte plus 3."""
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3)


def encode(text: str, tokenizer: PreTrainedTokenizerBase, piece_size: int = 1 << 20) -> torch.Tensor:
    """Token ids [N], int32, without special tokens. Long texts are tokenized piece by piece, cut at line ends."""
    if isinstance(tokenizer, ByT5Tokenizer):
        return encode_bytes(text)
    ids, start = [], 0
    with tqdm(total=len(text), desc="tokenizing", unit="char", unit_scale=True, disable=len(text) < piece_size) as bar:
        while start < len(text):
            end = text.find("\n", start + piece_size) + 1 or len(text)
            ids += tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
            bar.update(end - start)
            start = end
    return torch.tensor(ids, dtype=torch.int32)


@dataclass
class Blocks:
    """Documents one after the other, each closed by the end token, cut into blocks of N tokens; the rest is dropped."""

    train: torch.Tensor  # [blocks, N], int32
    evaluation: torch.Tensor  # [blocks, N], int32: the end of the text
    bytes_per_token: float
    fingerprint: str  # of all blocks


def pack(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int, eval_fraction: float, eval_blocks: int
) -> Blocks:
    """Keeps the last `eval_fraction` of the blocks, at least one, out of training, and returns `eval_blocks` of them.

    Raises:
        ValueError: when the text is too short for one block to train on and one to evaluate.
    """
    end = torch.tensor([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [], dtype=torch.int32)
    tokens = torch.cat([part for document in documents for part in (encode(document, tokenizer), end)])
    blocks = tokens[: len(tokens) // block_size * block_size].view(-1, block_size)
    if len(blocks) < 2:
        raise ValueError(
            "`block_size` must leave at least two blocks, one to train and one to evaluate, got "
            f"{block_size} for a text of {len(tokens)} tokens."
        )
    held_out = min(len(blocks) - 1, max(1, round(len(blocks) * eval_fraction)))
    return Blocks(
        train=blocks[:-held_out],
        evaluation=blocks[-held_out:][:eval_blocks],
        bytes_per_token=sum(len(document.encode()) for document in documents) / len(tokens),
        fingerprint=hashlib.sha256(blocks.numpy().tobytes()).hexdigest()[:16],
    )
