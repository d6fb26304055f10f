"""A patched model under tensor parallelism: each rank holds some heads, and their offsets follow the global index."""

import os
import socket

import pytest
import torch
from torch import distributed, multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_longnet.patching import load_patched_model, patch_model, report


SCHEDULE = ([8, 16, 32], [1, 2, 4])
HEAD_OFFSETS = ("modulo", "contiguous")


def run_rank(rank: int, port: int, folder: str) -> None:
    from transformers.distributed import DistributedConfig

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    ids = torch.arange(1, 46)[None]
    for head_offsets in HEAD_OFFSETS:
        config = DistributedConfig(tp_size=2, tp_plan="auto")
        model = load_patched_model(f"{folder}/{head_offsets}", distributed_config=config)
        assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape == (16, 32)
        assert report(model).kv_bytes_per_token == 2 * 2 * 1 * 8 * 4  # a rank's own: one of two key/value heads
        with torch.no_grad():
            logits = model(ids).logits
        torch.testing.assert_close(logits, torch.load(f"{folder}/{head_offsets}.pt"), atol=1e-5, rtol=1e-5)
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_tensor_parallel_equals_one_process(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 98}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    results = []
    for head_offsets in HEAD_OFFSETS:
        torch.manual_seed(0)
        model = patch_model(
            LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval(), *SCHEDULE, head_offsets=head_offsets
        )
        model.save_pretrained(tmp_path / head_offsets)
        with torch.no_grad():
            results.append(model(torch.arange(1, 46)[None]).logits)
        torch.save(results[-1], tmp_path / f"{head_offsets}.pt")
    assert (results[0] - results[1]).abs().max() > 1e-3  # the offsets matter here
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(run_rank, args=(port, str(tmp_path)), nprocs=2)
