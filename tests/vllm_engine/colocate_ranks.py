"""Run by `test_colocate_ranks.py` under torchrun: trains in colocate mode, with an engine per rank or one for both."""

import json
import os
import sys

import torch

import tests.vllm_engine.conftest  # noqa: F401  the engine
from tests.support.tiny import make_model, make_tokenizer, tiny_trainer

RANK = int(os.environ["RANK"])

if __name__ == "__main__":
    tensor_parallel_size, folder = int(sys.argv[1]), sys.argv[2]
    model_dir = os.path.join(folder, f"model{RANK}")
    make_model(head_dim=32, num_attention_heads=2).save_pretrained(model_dir)
    make_tokenizer().save_pretrained(model_dir)
    # 4 rollouts per rank and groups of 8: each group is split across both ranks
    trainer = tiny_trainer(
        folder,
        model=model_dir,
        num_generations=8,
        per_device_train_batch_size=4,
        ddp_backend="gloo",
        use_vllm=True,
        vllm_mode="colocate",
        vllm_tensor_parallel_size=tensor_parallel_size,
        vllm_max_model_length=64,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer.train()
    result = {
        "log": [log for log in trainer.state.log_history if "loss" in log],
        "weights": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist(),
        "requested": trainer.generation.num_context_tokens,
    }
    with open(os.path.join(folder, f"rank{RANK}.json"), "w") as file:
        json.dump(result, file)
