"""Run by torchrun: a LongNet split over the ranks against the whole one, in logits, gradients and generated tokens."""

import sys

import torch
import torch.distributed as dist
from torch.testing import assert_close
from transformers.distributed import DistributedConfig

from modeling_longnet import LongNetForCausalLM


def main(folder: str) -> None:
    whole = LongNetForCausalLM.from_pretrained(folder)
    split = LongNetForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    assert dist.get_world_size() == 2
    assert split.model.layers[0].mlp.fc1.weight.to_local().shape[0] * 2 == whole.model.layers[0].mlp.fc1.out_features
    input_ids = torch.arange(80).view(2, 40) % 61
    expected, found = whole(input_ids, labels=input_ids), split(input_ids, labels=input_ids)
    assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    for (name, parameter), mine in zip(whole.named_parameters(), split.parameters(), strict=True):
        gradient = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
        assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5, msg=name)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(split.generate(input_ids[:, :10], **settings), whole.generate(input_ids[:, :10], **settings))
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1])
