"""
A real vLLM engine without a GPU, for the tests of this folder: `make test-vllm`.

Starting an engine takes most of a minute, so tests share them.
"""

import os
from functools import partial

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as in colocate mode on GPUs
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

import pytest
import torch  # after the environment variables
import trl.generation.vllm_generation
import vllm.model_executor.layers.utils
from transformers import AutoTokenizer

from trl_anytime import AnytimeConfig


def plain_gemm(layer, *args, **kwargs):
    layer.cpu_linear = torch.nn.functional.linear


# vLLM's CPU backend packs the weights of linear layers when a model is loaded, and cannot load new ones afterwards.
# Nothing has imported the function from there yet.
vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm = plain_gemm

# vLLM serves float32 models in bfloat16 unless told otherwise, which TRL has no setting for. Blocks of 32 tokens, the
# least for the CPU backend, so that short contexts have some to share. Eager, which starts sooner.
trl.generation.vllm_generation.LLM = partial(
    trl.generation.vllm_generation.LLM, dtype="float32", block_size=32, enforce_eager=True
)


# For the modules that have a fixture `folder`, with a model and its anytime config


@pytest.fixture(scope="module")
def config(folder):
    return AnytimeConfig.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)
