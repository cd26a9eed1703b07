"""Packed rollouts against their definition: one separate row per branch, and one for the thinking."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from tests.support.families import EVERY_FAMILY, FAMILIES
from tests.support.tiny import make_model
from trl_anytime.method.packing import PackedRollouts
from trl_anytime.modeling.separate_rows import forward_rows
from trl_anytime.modeling.support import packing_mismatch, unsupported_structure
from trl_anytime.modeling.tree_attention import TreeLayout, enable_tree_attention, forward_packed


def make_batch():
    """Three rollouts: cut at every budget; at 0 tokens and at its end; finished before the first, with empty parts."""
    generator = torch.Generator().manual_seed(0)

    def sample(length):
        return torch.randint(3, 20, (length,), generator=generator).tolist()

    prompts = [sample(6), sample(2), sample(4)]
    packed = PackedRollouts.pack(
        traces=[sample(9), sample(5), sample(1)],
        cuts=[[3, 6, 9], [0, 5, 5], [1, 1, 1]],
        bridges=[[sample(3), sample(3), sample(3)], [sample(3), sample(1), sample(1)], [sample(1)] * 3],
        summaries=[
            [[sample(2), sample(4)], [sample(1), sample(3)], [sample(4), sample(1)]],
            [[sample(1), sample(1)], [sample(2), sample(2)], [sample(3), sample(4)]],
            [[[], sample(1)], [sample(2), []], [sample(1), sample(1)]],
        ],
    )
    return prompts, packed


def as_rows(prompts, packed):
    """[left padding][prompt][packed rollout][right padding], as TRL builds them."""
    width = max(map(len, prompts))
    prompt_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    prompt_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    mask = (packed.indices() < packed.lengths[:, None]).long()
    return torch.cat([prompt_ids, packed.token_ids], dim=1), torch.cat([prompt_mask, mask], dim=1)


def run(forward, model, prompts, packed, **kwargs):
    input_ids, attention_mask = as_rows(prompts, packed)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return forward(
        model, packed, input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True, **kwargs
    )


def packed_logprobs(model, prompts, packed, forward=forward_packed):
    """Log-probability of each sampled token, (R, T), from one packed forward pass; 0 elsewhere."""
    return run(forward, model, prompts, packed).log_probs[:, -packed.token_ids.size(1) :]


def separate_logprobs(model, prompts, packed):
    """The same from one plain forward pass per branch and thinking."""

    def score(context, sampled):
        if not sampled:
            return torch.zeros(0)
        logits = model(torch.tensor([[*context, *sampled]]), use_cache=False).logits[0, len(context) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(sampled)[:, None])[:, 0]

    rows = []
    for i, prompt in enumerate(prompts):
        tokens = packed.token_ids[i].tolist()
        thinking = tokens[: packed.thinking_lengths[i]]
        parts = [score(prompt, thinking)]
        for j, cut in enumerate(packed.cuts[i].tolist()):
            for start, summary_start, end in packed.spans[i, j].tolist():
                context = [*prompt, *thinking[:cut], *tokens[start:summary_start]]
                parts += [torch.zeros(summary_start - start), score(context, tokens[summary_start:end])]
        parts.append(torch.zeros(len(tokens) - int(packed.lengths[i])))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def make_tree_model(family, **settings):
    model = make_model(family.split()[0], **FAMILIES[family], **settings)
    add_fused_lm_head(model)
    enable_tree_attention(model)
    return model


def gradients(model, logprobs):
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logprobs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CHECKPOINTING = {
    "plain": None,
    "checkpointing": {"use_reentrant": False},
    "reentrant checkpointing": {"use_reentrant": True},
}


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_packed_equals_separate_rows(family, lora, checkpointing):
    model = make_tree_model(family)
    if lora:
        attention = ["c_attn"] if family == "gpt2" else ["q_b_proj", "o_proj"] if "deepseek" in family else None
        attention = attention or (["qkv_proj", "o_proj"] if "phi3" in family else ["q_proj", "k_proj", "v_proj"])
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=attention))
        model.enable_input_require_grads()
    prompts, packed = make_batch()
    separate = separate_logprobs(model, prompts, packed)
    expected = gradients(model, separate)

    model.train()
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
    together = packed_logprobs(model, prompts, packed)
    actual = gradients(model, together)

    # Sums in another order, in float32
    torch.testing.assert_close(together, separate, atol=2e-5, rtol=0)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_rows_equals_separate_rows(family):
    model = make_tree_model(family)
    prompts, packed = make_batch()
    separate = separate_logprobs(model, prompts, packed)
    together = packed_logprobs(model, prompts, packed, forward_rows)
    torch.testing.assert_close(together, separate, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_half_precision_is_no_worse_than_separate_rows(family):
    """The error of bfloat16 against float32 is that of the format: as large for separate rows."""
    model = make_tree_model(family)
    prompts, packed = make_batch()
    exact = separate_logprobs(model, prompts, packed)
    model = model.to(torch.bfloat16)
    separate_error = (packed_logprobs(model, prompts, packed, forward_rows) - exact).abs()
    packed_error = (packed_logprobs(model, prompts, packed) - exact).abs()
    assert packed_error.mean() <= 1.5 * separate_error.mean()
    assert packed_error.max() <= 2 * separate_error.max()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mistral with a window"])
def test_dense_mask_agrees(family):
    """The mask that `PackedRollouts.visible` draws, given to eager attention, is what tree attention computes."""
    prompts, packed = make_batch()
    model = make_tree_model(family, attn_implementation="eager")
    window = FAMILIES[family].get("sliding_window") or 1000
    together = packed_logprobs(model, prompts, packed)
    for i, prompt in enumerate(prompts):
        length, p = int(packed.lengths[i]), len(prompt)
        positions = torch.cat([torch.arange(p), p + packed.positions()[i, :length]])
        visible = torch.ones(p + length, p + length, dtype=torch.bool).tril()
        visible[p:, p:] = packed.visible()[i, :length, :length]
        visible &= positions[:, None] - positions[None, :] < window
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        row = torch.tensor([[*prompt, *packed.token_ids[i, :length].tolist()]])
        logits = model(row, attention_mask=mask[None, None], position_ids=positions[None], use_cache=False).logits[0]
        dense = logits[p - 1 : -1].log_softmax(-1).gather(1, row[0, p:, None])[:, 0]
        dense = dense * packed.trained()[i, :length]
        torch.testing.assert_close(together[i, :length], dense, atol=2e-5, rtol=0)


def test_branches_do_not_see_each_other():
    """Changing one branch changes nothing else; a mask that leaked would."""
    model = make_tree_model("qwen3")
    prompts, packed = make_batch()
    before = packed_logprobs(model, prompts, packed)
    start, _, end = packed.spans[0, 1, 0].tolist()
    packed.token_ids[0, start:end] = (packed.token_ids[0, start:end] + 1) % 20
    after = packed_logprobs(model, prompts, packed)
    changed = before != after
    assert changed[0, start:end].any()
    changed[0, start:end] = False
    assert not changed.any()


@pytest.mark.parametrize("forward", [forward_packed, forward_rows])
def test_padding_changes_nothing(forward):
    model = make_tree_model("qwen3")
    prompts, packed = make_batch()
    together = packed_logprobs(model, prompts, packed, forward)
    for i in range(3):
        length = int(packed.lengths[i])
        alone = packed[i : i + 1]
        # As TRL splits a batch: still padded to the longest row of the whole
        torch.testing.assert_close(packed_logprobs(model, prompts[i : i + 1], alone, forward)[0], together[i])
        alone = PackedRollouts(alone.token_ids[:, :length], alone.cuts, alone.spans)
        alone = packed_logprobs(model, prompts[i : i + 1], alone, forward)[0]
        torch.testing.assert_close(alone, together[i, :length])


def test_padding_is_not_computed():
    """A short row that is padded to a long one reaches the model at its own length."""
    model = make_tree_model("qwen3")
    prompts, packed = make_batch()
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    packed_logprobs(model, prompts[2:], packed[2:])
    hook.remove()
    assert seen == [(1, len(prompts[2]) + int(packed.lengths[2]))]


def test_the_auxiliary_loss_is_that_of_a_plain_row():
    """Without branching, a packed row is a plain row, and the router's loss is what TRL takes it for."""
    model = make_tree_model("qwen3_moe")
    generator = torch.Generator().manual_seed(0)
    prompt, thinking, bridge, summary = (
        torch.randint(3, 20, (n,), generator=generator).tolist() for n in (4, 6, 2, 3)
    )
    packed = PackedRollouts.pack([thinking], [[6]], [[bridge]], [[[summary]]])
    row, mask = as_rows([prompt], packed)
    plain = model(input_ids=row, attention_mask=mask, labels=row, fused_lm_head=True, output_router_logits=True)
    together = run(forward_packed, model, [prompt], packed, output_router_logits=True)
    torch.testing.assert_close(together.aux_loss, plain.aux_loss)
    # Padding does not count
    prompts, packed = make_batch()
    length = int(packed.lengths[2])
    padded, alone = packed[2:], PackedRollouts(packed.token_ids[2:, :length], packed.cuts[2:], packed.spans[2:])
    padded_loss, alone_loss = (
        run(forward_packed, model, prompts[2:], rows, output_router_logits=True).aux_loss for rows in (padded, alone)
    )
    torch.testing.assert_close(padded_loss, alone_loss)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_plain_forward_and_generate_are_untouched(base):
    prompts = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = (prompts != 0).long()
    for family in ("qwen3", "gpt_oss"):
        if (family, base) == ("gpt_oss", "sdpa"):
            continue  # has no sdpa
        settings = FAMILIES[family]
        plain, tree = (make_model(family, **settings, attn_implementation=base) for _ in range(2))
        enable_tree_attention(tree)
        assert torch.equal(plain(prompts, attention_mask=mask).logits, tree(prompts, attention_mask=mask).logits)
        generation = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(plain.generate(prompts, **generation), tree.generate(prompts, **generation))
        documents = torch.tensor([[0, 1, 0, 1]])  # two in one row
        assert torch.equal(plain(prompts, position_ids=documents).logits, tree(prompts, position_ids=documents).logits)


def test_saved_models_do_not_know_of_the_tree(tmp_path):
    make_tree_model("qwen3").save_pretrained(tmp_path)
    assert "tree" not in (tmp_path / "config.json").read_text()


def test_no_object_of_row_by_row_size():
    """What the layout holds grows with branches × keys, never with the square of the row."""
    thinking, cuts = list(range(400)), [100, 400]
    packed = PackedRollouts.pack([thinking], [cuts], [[[1], [1]]], [[[[2, 3]], [[4, 5]]]])
    layout = TreeLayout.from_packed(packed, torch.tensor([50]), 460)
    assert max(branches.sees.numel() for branches in layout.budgets) == 3 * (450 + 3)


def test_long_windows_and_capped_scores():
    """Rows longer than a block of queries, in which windows and capped scores are computed."""
    generator = torch.Generator().manual_seed(0)
    prompt, thinking, summary = (torch.randint(3, 20, (n,), generator=generator).tolist() for n in (30, 600, 5))
    packed = PackedRollouts.pack([thinking], [[300, 600]], [[[3], [3]]], [[[summary], [summary]]])
    for family in ("gemma2", "gpt_oss", "olmo3"):
        model = make_tree_model(family, max_position_embeddings=1024)
        together = packed_logprobs(model, [prompt], packed)
        separate = separate_logprobs(model, [prompt], packed)
        torch.testing.assert_close(together, separate, atol=2e-5, rtol=0)
        expected, actual = gradients(model, separate), gradients(model, together)
        largest = max(gradient.abs().max() for gradient in expected.values())
        assert all((actual[name] - expected[name]).abs().max() <= 1e-5 * largest for name in expected)


# Admission


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_passes(family):
    model = make_tree_model(family).train()
    assert unsupported_structure(model) is None
    assert packing_mismatch(model) is None
    assert model.training and all(p.grad is None for p in model.parameters())


def test_the_check_passes_on_frozen_and_adapted_models():
    model = make_tree_model("qwen3").requires_grad_(False)
    assert packing_mismatch(model) is None
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert packing_mismatch(model) is None


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_oss"])
@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("positions", PackedRollouts.indices),  # branches do not restart at their cut
        ("branches", lambda packed: (packed.indices() >= packed.thinking_lengths[:, None]).long() - 1),  # see all
    ],
)
def test_the_check_finds_wrong_layouts(monkeypatch, family, method, wrong):
    model = make_tree_model(family)
    monkeypatch.setattr(PackedRollouts, method, wrong)
    assert "differ" in (packing_mismatch(model) or "")


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, "type conv"),
        (
            "qwen3_next",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 24,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
            },
            "type linear_attention",
        ),
        ("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}, "type hybrid"),
        ("mamba", {"state_size": 4}, "it has layers of type"),  # whose name depends on the version
        ("bloom", {"n_layer": 1, "n_head": 4}, "attention function"),
    ],
)
def test_other_models_take_separate_rows(family, settings, reason):
    model = make_model(family, **settings)
    assert reason in unsupported_structure(model)
    add_fused_lm_head(model)
    prompts, packed = make_batch()
    separate = separate_logprobs(model, prompts, packed)
    together = packed_logprobs(model, prompts, packed, forward_rows)
    torch.testing.assert_close(together, separate, atol=2e-5, rtol=0)


def test_arguments_that_a_tree_does_not_honour_are_errors():
    model = make_tree_model("qwen3")
    prompts, packed = make_batch()
    with pytest.raises(ValueError, match="position_bias="):
        run(forward_packed, model, prompts, packed, position_bias=torch.zeros(1))


def test_a_lost_layout_is_an_error():
    model = make_tree_model("qwen3")
    prompts, packed = make_batch()

    def drops_it(tree, **kwargs):
        return model(**kwargs)

    with pytest.raises(RuntimeError, match="`tree`"):
        run(forward_packed, drops_it, prompts, packed)
