"""Generation as TRL is set to do it: the choice of a trainer's backend, and a sampler on top of TRL's generation."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import trl
from accelerate.logging import get_logger
from packaging.version import Version
from transformers import PreTrainedModel
from trl.models import unwrap_model_for_generation

from ..modeling.support import branching_mismatch
from ..modeling.tree_attention import plain_attention
from .backend import Generation, PrefixGeneration
from .transformers_backend import TransformersGeneration, unsupported_sampling
from .vllm_backend import ColocateGeneration
from .vllm_server import ServerSampler

logger = get_logger(__name__)


def choose_backend(trainer: Any, has_tree_attention: bool) -> Generation:
    """
    Return the fastest backend of the two phases that a trainer's settings and model allow.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, with a [`BRPOConfig`].
        has_tree_attention (`bool`):
            Whether the model has tree attention.
    """
    sampler, args = TRLSampler(trainer), trainer.args
    if trainer.use_vllm and trainer.vllm_mode == "colocate":
        return ColocateGeneration(trainer.vllm_generation, overlap=args.vllm_overlap)
    if trainer.use_vllm:
        return PrefixGeneration(ServerSampler(sampler, trainer.vllm_generation))
    if trainer.use_transformers_continuous_batching:
        return PrefixGeneration(sampler)
    reason: str | None
    zero_stage = getattr(args.deepspeed_plugin, "zero_stage", 0)
    if trainer.is_fsdp_enabled or (zero_stage == 3 and not args.ds3_gather_for_generation):
        # Every rank must run the forward pass equally often, which `generate()` takes care of itself
        reason = "the model is sharded"
    elif not has_tree_attention:
        reason = "the model has no tree attention"
    else:
        model = trainer.accelerator.unwrap_model(trainer.model)
        reason = unsupported_sampling(model, trainer.generation_config) or branching_mismatch(model)
    if reason is None:
        return TransformersGeneration(
            partial(_hold_model, trainer),
            trainer.generation_config,
            trainer.processing_class.pad_token_id,
            args.max_cached_tokens,
        )
    logger.warning(
        f"Each summary is generated from a prompt of its own, which computes the thinking again: decoding it on top "
        f"of the thinking's cache is not possible, because {reason}."
    )
    return PrefixGeneration(sampler)


@contextmanager
def _hold_model(trainer: Any) -> Iterator[PreTrainedModel]:
    """Hold the model as TRL unwraps it to generate, without dropout."""
    checkpointing = {}
    if Version(trl.__version__) >= Version("1.16"):  # 1.15 forgets how checkpointing was switched on
        checkpointing = {"gradient_checkpointing_kwargs": trainer.args.gradient_checkpointing_kwargs}
    with unwrap_model_for_generation(
        trainer.model_wrapped, trainer.accelerator, trainer.args.ds3_gather_for_generation, **cast(Any, checkpointing)
    ) as model:
        training = model.training
        model.eval()
        try:
            yield model
        finally:
            model.train(training)


class TRLSampler:
    """
    [`~trl_anytime.rollout.backend.Sampler`] that samples with the TRL backend that is set.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def __call__(
        self, prompt_ids: list[list[int]], max_new_tokens: int, stop_token_ids: list[int], num_generations: int
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """See [`~trl_anytime.rollout.backend.Sampler`]."""
        trainer = self._trainer
        with self._settings(max_new_tokens, stop_token_ids):
            if trainer.use_vllm:
                return trainer._generate_single_turn(prompt_ids, None, {}, num_generations)
            if trainer.use_transformers_continuous_batching:
                with plain_attention(trainer.accelerator.unwrap_model(trainer.model)):
                    return trainer._generate_single_turn(prompt_ids, None, {}, num_generations)
            # `generate()` holds the whole batch in memory. Pass no more rows at a time than there are rollouts.
            rows_at_once, sampled = trainer._num_rollouts, []
            for start in range(0, len(prompt_ids), rows_at_once):
                rows = prompt_ids[start : start + rows_at_once]
                sampled += trainer._generate_single_turn(rows, None, {}, num_generations)[0]
            return sampled, None

    @contextmanager
    def _settings(self, max_new_tokens: int, stop_token_ids: list[int]) -> Iterator[None]:
        """Apply the sampling settings of one phase to all of TRL's backends."""
        trainer = self._trainer
        eos_token_ids, trainer.eos_token_ids = trainer.eos_token_ids, stop_token_ids
        if trainer.use_vllm:
            engine = trainer.vllm_generation
            saved = engine.max_completion_length, engine.generation_kwargs
            engine.max_completion_length = max_new_tokens
            engine.generation_kwargs = {**engine.generation_kwargs, "stop_token_ids": stop_token_ids}
        else:
            config = trainer.generation_config
            saved = config.max_new_tokens, config.eos_token_id
            config.max_new_tokens, config.eos_token_id = max_new_tokens, stop_token_ids
        try:
            yield
        finally:
            trainer.eos_token_ids = eos_token_ids
            if trainer.use_vllm:
                engine.max_completion_length, engine.generation_kwargs = saved
            else:
                config.max_new_tokens, config.eos_token_id = saved
