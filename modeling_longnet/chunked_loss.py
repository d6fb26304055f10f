"""Cross-entropy over a vocabulary without the logits of a whole text: the loss and its gradients, chunk by chunk.

The logits of 131,072 tokens over 50,257 words are 25 GiB in float32, and as much again for their gradient. Here each
chunk's logits give way to the gradients that they lead to, which are made in the forward pass; the backward pass scales
them.

Letters: M tokens, C hidden size, V words of the vocabulary.
"""

import torch
from torch import nn

from .transformers_compat import has_own_loss, is_tracing


CHUNK_ELEMENTS = 2**23  # of a chunk's logits: 32 MiB in float32
FLOAT16_SUM = 2**12  # of a chunk's gradients in float16, at most: far from its end, and those of rare words from zero


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, targets, scale, ignore_index):
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        rows, factor = max(1, CHUNK_ELEMENTS // weight.shape[0]), scale
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        # In float32, as many small contributions would vanish in a sum of half precision.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(targets), rows):
            hidden, target = hidden_states[start : start + rows], targets[start : start + rows]
            product = nn.functional.linear(hidden, weight)
            # By the operators of Transformers' losses: a text that is one chunk has the very gradients it has there.
            with torch.enable_grad():
                logits = product.float().requires_grad_()
                loss = nn.functional.cross_entropy(logits, target, reduction="sum", ignore_index=ignore_index)
            total += loss.detach()
            if not (needs_hidden or needs_weight):
                continue
            if product.dtype == torch.float16:  # whose loss is scaled afterwards, so that gradients do not vanish
                factor = torch.full_like(scale, FLOAT16_SUM / rows)
            grad = torch.autograd.grad(loss, logits, factor)[0].to(product.dtype)
            if needs_hidden:
                grad_hidden[start : start + rows] = grad @ weight.to(product.dtype)
            if needs_weight:
                grad_weight += grad.mT @ hidden.to(product.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, None if factor is scale else scale / factor)
        ctx.weight_dtype = weight.dtype
        return total * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_hidden, grad_weight, rest = ctx.saved_tensors
        if rest is not None:  # infinite where nothing counts, and all gradients are zero
            grad = grad * rest.nan_to_num(posinf=0.0)
        if grad_hidden is not None:
            grad_hidden = (grad_hidden.float() * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Cross-entropy of `hidden_states @ weight.T` and `targets`, as Transformers' losses compute it.

    Args:
        hidden_states: [M, C]. weight: of the head, [V, C].
        targets: integers [M]; `ignore_index` counts for nothing.
        num_items_in_batch: what the sum is divided by; the number of counted targets by default.

    Returns:
        A float32 scalar; its gradient can be taken once.
    """
    targets = targets.to(hidden_states.device)
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    count = torch.as_tensor(count, device=hidden_states.device)
    return _ChunkedCrossEntropy.apply(hidden_states, weight, targets, 1 / count.float(), ignore_index)


def can_be_chunked(head: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether a head is its weight and no more: not wrapped by an adapter, sharded, offloaded or traced."""
    is_plain = type(head) is nn.Linear and head.bias is None and type(head.weight) is nn.Parameter
    return (
        is_plain
        and head.weight.shape == (head.out_features, head.in_features)
        and head.weight.device == hidden_states.device
        and not (head._forward_hooks or head._forward_pre_hooks)
        and not is_tracing(hidden_states)
    )


class LanguageModelHead:
    """For models with an `lm_head`: what both kinds of language model make of the last hidden states."""

    # Whether each token's target is the next one, as the loss that Transformers gives the class has it.
    shifts_labels = True

    def loss_and_logits(
        self, hidden_states: torch.Tensor, labels: torch.Tensor | None, skip_logits: bool | None, **kwargs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Loss and logits of hidden states [B, Q, C]; the logits are None where the loss did without them."""
        shifted = kwargs.get("shift_labels") if self.shifts_labels else None
        has_targets = labels is not None or shifted is not None
        able = has_own_loss(self) and can_be_chunked(self.lm_head, hidden_states)
        if skip_logits and has_targets and not able:
            raise ValueError(
                "`skip_logits=True` needs the model's own loss and a head that is its weight alone (no adapter, no "
                f"shards), got {type(self.lm_head).__name__} and {self.loss_function}."
            )
        if not has_targets or not able or not (self.training if skip_logits is None else skip_logits):
            logits = self.lm_head(hidden_states)
            if not has_targets:
                return None, logits
            return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs), logits
        ignore_index = kwargs.get("ignore_index", -100)
        targets = labels if shifted is None else shifted
        if shifted is None and self.shifts_labels:
            targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        counted = {"num_items_in_batch": kwargs.get("num_items_in_batch"), "ignore_index": ignore_index}
        return chunked_cross_entropy(
            hidden_states.flatten(0, 1), self.lm_head.weight, targets.flatten(), **counted
        ), None


__all__ = ["LanguageModelHead", "can_be_chunked", "chunked_cross_entropy"]
