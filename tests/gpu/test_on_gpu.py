"""
What needs a real GPU: kernels, precisions, allocations. `make gpu` runs these tests, and `GPU_TESTS_ON=cpu` tries them
without one.
"""

import os
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, GenerationConfig

from tests.modeling.test_tree_attention import as_rows, gradients, make_batch, make_tree_model
from tests.support.anytime import make_markers
from tests.support.tiny import make_model, make_tokenizer, tiny_trainer
from trl_anytime.method.packing import PackedRollouts
from trl_anytime.modeling.separate_rows import forward_rows
from trl_anytime.modeling.support import branching_mismatch, packing_mismatch
from trl_anytime.modeling.tree_attention import forward_packed
from trl_anytime.rollout.backend import RolloutSettings
from trl_anytime.rollout.transformers_backend import TransformersGeneration

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.hardware,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]
# Windows; attention sinks and capped scores in blocks; latent keys
FOUR_FAMILIES = ["qwen3", "gemma3_text", "gpt_oss", "deepseek_v3"]
ON_DEVICE = {"use_cpu": DEVICE == "cpu", "dataloader_pin_memory": False}
HALF = {"bf16": True}


@pytest.fixture(autouse=True)
def exact_float32():
    """Without TF32, so that float32 is float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def logprobs(model, forward):
    prompts, packed = make_batch()
    input_ids, attention_mask = (x.to(DEVICE) for x in as_rows(prompts, packed))
    packed = PackedRollouts(*(x.to(DEVICE) for x in (packed.token_ids, packed.cuts, packed.spans)))
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    output = forward(model, packed, input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    return output.log_probs


@pytest.mark.parametrize("family", FOUR_FAMILIES)
def test_packed_equals_separate_rows_in_float32(family):
    model = make_tree_model(family).to(DEVICE)
    separate = logprobs(model, forward_rows)
    expected = gradients(model, separate.cpu())
    together = logprobs(model, forward_packed)
    actual = gradients(model, together.cpu())
    # Sums in another order, in float32
    torch.testing.assert_close(together, separate, atol=5e-5, rtol=0)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert actual.keys() == expected.keys()
    assert all((actual[name] - expected[name]).abs().max() <= 5e-5 * largest for name in expected)


@pytest.mark.parametrize("family", FOUR_FAMILIES)
def test_packed_is_no_worse_than_separate_rows_in_bfloat16(family):
    """The error of bfloat16 against float32 is that of the format: as large for separate rows."""
    model = make_tree_model(family).to(DEVICE)
    exact = logprobs(model, forward_rows).detach()
    model = model.to(torch.bfloat16)
    separate, together = ((logprobs(model, f).detach() - exact).abs() for f in (forward_rows, forward_packed))
    assert together.mean() <= 1.5 * separate.mean()
    assert together.max() <= 2 * separate.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FOUR_FAMILIES)
def test_admission(family, dtype):
    """Rows and decoded branches, with their gradients, by the check that a trainer makes."""
    model = make_tree_model(family).to(DEVICE, dtype)
    assert packing_mismatch(model) is None
    assert branching_mismatch(model) is None


def backend_of(model, **sampling):
    return TransformersGeneration(lambda: nullcontext(model), GenerationConfig(**sampling), 0)


def rollout_settings():
    return RolloutSettings([4, 8, 16], 3, 8, make_markers((5,), (3,), (16, 17)), [2])


def test_sampled_generation_of_qwen3_repeats_itself():
    model = make_tree_model("qwen3").to(DEVICE).eval()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(backend_of(model, do_sample=True, top_k=0).roll_out([[7, 8, 9], [4]], rollout_settings()))
    assert drawn[0] == drawn[1] != drawn[2]


def test_greedy_generation_of_qwen3_is_that_of_the_host():
    """In float32 the largest logit is the same on both, but for ties."""
    found = []
    for device in ("cpu", DEVICE):
        model = make_tree_model("qwen3").to(device).eval()
        found.append(backend_of(model, do_sample=False).roll_out([[7, 8, 9], [4]], rollout_settings()))
    assert found[0] == found[1]


def test_broken_logits_of_qwen3_leave_the_device_usable():
    model = make_tree_model("qwen3").to(DEVICE).eval()
    model.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError):
        backend_of(model, do_sample=True).roll_out([[7, 8, 9]], rollout_settings())
    assert float(torch.ones(2, device=DEVICE).sum()) == 2


@pytest.mark.parametrize("precision", [{}, HALF], ids=["float32", "bfloat16"])
def test_training_of_qwen3_and_its_restart(tmp_path, precision):
    """A run that stops after two of four steps and goes on, as one that does not stop."""
    settings = {**ON_DEVICE, **precision, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = tiny_trainer(tmp_path / "straight", **settings)
    trainer.train()
    straight = {name: p.detach().float().cpu() for name, p in trainer.model.named_parameters()}
    again = tiny_trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert again.state.global_step == 4
    for name, p in again.model.named_parameters():
        # A GPU adds gradients of embeddings in no fixed order, and Adam's steps are of the learning rate's size
        assert (p.detach().float().cpu() - straight[name]).abs().max() <= 2e-3 * (DEVICE == "cuda"), name


def test_qlora_of_qwen3(tmp_path):
    pytest.importorskip("bitsandbytes")
    make_model(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    trainer = tiny_trainer(
        tmp_path / "run",
        model=str(tmp_path / "model"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=LoraConfig(target_modules="all-linear", init_lora_weights=False),
        **ON_DEVICE,
        **HALF,
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_vllm_in_this_process_with_sleep_of_qwen3(tmp_path):
    pytest.importorskip("vllm")
    make_model(head_dim=64, num_attention_heads=2, hidden_size=128, max_position_embeddings=1024).save_pretrained(
        tmp_path / "model"
    )
    make_tokenizer().save_pretrained(tmp_path / "model")
    trainer = tiny_trainer(
        tmp_path / "run",
        model=str(tmp_path / "model"),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=DEVICE == "cuda",
        vllm_gpu_memory_utilization=0.2,
        vllm_max_model_length=512,
        **ON_DEVICE,
        **HALF,
    )
    trainer.train()
    assert trainer.state.global_step == 2
