"""A few dimensions in which blocks are ranked, calibrated on a page of text.

With Cq and Ck the second moments of a head's queries and of its centred keys, S = Cq^(1/2) and V the eigenvectors of
S Ck S, falling, q . k = (q S^-1 V) . (k S V): of all such pairs of coordinates the first d of these keep most of what
varies in the products. Query heads that share a key/value head share its basis.

Letters: B batch, H query heads, G key/value heads, N tokens, D head dimension, d dimensions of the basis.
"""

import torch

from .dilation_schedule import DilationSchedule
from .memory_positions import rotate
from .memory_search import MemoryBasis


FLOOR = 1e-6  # of a variance, relative to the largest: directions that no query has


def product_basis(query: torch.Tensor, key: torch.Tensor, dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What takes queries and keys to `dimensions` coordinates, each [G, D, d] in float32.

    Args:
        query: [H, N, D]. key: [G, N, D].
    """
    groups = key.shape[0]
    query = query.unflatten(0, (groups, -1)).flatten(1, 2).double()
    key = key.double() - key.double().mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(query.mT @ query / query.shape[1])
    values = values.clamp(min=FLOOR * values.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))
    root, inverse = ((vectors * values[:, None] ** power) @ vectors.mT for power in (0.5, -0.5))
    _, directions = torch.linalg.eigh(root @ (key.mT @ key / key.shape[1]) @ root)
    directions = directions.flip(-1)[..., :dimensions]
    return (inverse @ directions).float(), (root @ directions).float()


def make_basis(
    query: torch.Tensor, key: torch.Tensor, schedule: DilationSchedule, inv_freq: torch.Tensor | None
) -> MemoryBasis:
    """The basis of one layer, from the queries [H, N, D] and keys [G, N, D] of a text from its beginning.

    Raises:
        ValueError: more dimensions than a head has, or than the text has tokens.
    """
    memory, (length, width) = schedule.memory, key.shape[1:]
    if memory.dimensions > min(length, width):
        raise ValueError(
            f"`memory`: `dimensions` must be at most the head's {width} and the {length} tokens of the text, got "
            f"{memory.dimensions}."
        )
    near = product_basis(query, key, memory.dimensions)
    if memory.max_distance is None:
        return MemoryBasis(*near)
    position = torch.arange(length, device=key.device)
    far_query = rotate(query, (memory.max_distance - position).expand(query.shape[:2]), inv_freq)
    start = position // memory.block_size * memory.block_size
    far_key = rotate(key, -start.expand(key.shape[:2]), inv_freq)
    return MemoryBasis(*near, *product_basis(far_query, far_key, memory.dimensions))
