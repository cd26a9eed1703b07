"""The [`ReliableGRPOTrainer`]: a [`~trl.GRPOTrainer`] whose runs restart exactly and whose faults are named."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from trl import GRPOConfig, GRPOTrainer

from ..brpo_config import check_on_nonfinite
from ..outside.host_warnings import without_host_warnings
from ..rollout.timing import PhaseTimes
from . import checkpoint
from .faults import FaultWatch, memory_advice
from .preemption import EpochEnd, Preemption
from .reward_guard import RewardGuard

logger = get_logger(__name__)


class _AtTrainBegin(TrainerCallback):
    """Call the trainer back when model, optimizer and state are ready, before the first step."""

    def __init__(self, trainer: "ReliableGRPOTrainer"):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._at_train_begin()


class ReliableGRPOTrainer(GRPOTrainer):
    """
    Train as [`~trl.GRPOTrainer`] does, with runs that restart exactly and faults that are named.

    A run that was killed at any moment resumes from its last whole checkpoint. It ends with exactly the weights of an
    uninterrupted run (docs/reliability.md). [`BRPOTrainer`] inherits this. With plain GRPO, use it as you would use
    [`~trl.GRPOTrainer`].

    These methods of [`~trl.GRPOTrainer`] change. The rest is inherited.

    - `train`: resumes from whole checkpoints with matching settings. A fault on one rank ends all. SIGTERM saves.
    - `_save_checkpoint`: checkpoints are whole or recognised as broken.
    - `_load_from_checkpoint`: adapters keep the precision that they train in.
    - `_load_rng_state`: an evaluation that was due at the step of the checkpoint comes first.
    - `_run_epoch`: a run that had finished does not train another step.
    - `_get_train_sampler`: a resumed run sees the prompts in the original order.
    - `_calculate_rewards`: the results of reward functions are checked on all ranks.
    - `_generate`, `_generate_and_score_completions`, `prediction_step`: every rollout counts once in an evaluation,
      whatever the number of ranks.
    - `_get_per_token_logps_and_entropies`, `_compute_loss`, `_get_grad_norm`: refuse values that are not finite.
    - `training_step`: measures the time of the update, and advises what to change if memory runs out.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl import GRPOConfig
    >>> from trl.rewards import accuracy_reward
    >>> from trl_anytime import ReliableGRPOTrainer

    >>> dataset = load_dataset("trl-lib/DeepMath-103K", split="train")
    >>> args = GRPOConfig("grpo", save_steps=50)
    >>> trainer = ReliableGRPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", accuracy_reward, args, dataset)
    >>> trainer.train()  # after a crash: `trainer.train(resume_from_checkpoint=True)`
    ```

    Args:
        model, reward_funcs, args, train_dataset:
            See [`~trl.GRPOTrainer`].
        on_nonfinite (`str`, *optional*, defaults to `"raise"`):
            Reaction to a loss, log-probability or gradient that is not finite. `"raise"` ends the run and names the
            prompts. `"skip"` skips the optimiser step.
        **kwargs:
            The other arguments of [`~trl.GRPOTrainer`], by keyword.

    Raises:
        `ValueError`: If `on_nonfinite` is not one of these, or is `"skip"` with DeepSpeed.
    """

    # Narrower than declared by the base class
    args: GRPOConfig
    model: PreTrainedModel
    train_dataset: Dataset | IterableDataset
    num_generations: int
    num_generations_eval: int

    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs: Any,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        *,
        on_nonfinite: str = "raise",
        **kwargs: Any,
    ):
        check_on_nonfinite(on_nonfinite, None if args is None else args.deepspeed_plugin)
        with without_host_warnings():
            super().__init__(model, reward_funcs, args, train_dataset, **kwargs)
        if not self.use_vllm and not self.use_transformers_continuous_batching:
            # Logits that are not finite would be an assertion on a GPU: log-probabilities name the prompts later
            self.generation_config.remove_invalid_values = True
        self._on_nonfinite = on_nonfinite
        self._times = PhaseTimes()
        self._num_rollouts = 0  # of this rank, in the generation batch in flight
        # What `train()` goes on from, if anything
        self._checkpoint: Path | None = None
        self._resumed: dict[str, Any] = {}  # what its manifest says
        # Logs of evaluations before `train()`
        self._evaluated: list[dict[str, Any]] = []
        self._preemption = Preemption(self.accelerator, enabled=self.args.save_strategy != "no")
        self.add_callback(EpochEnd())
        self.add_callback(self._preemption)
        self.add_callback(_AtTrainBegin(self))

    # What a subclass adds

    def _resume_settings(self) -> dict[str, dict[str, Any]]:
        """
        Return further settings that a resumed run is compared by.

        Those under `"fixed"` must not change. Those under `"reported"` may.
        """
        return {"fixed": {}, "reported": {}}

    def _add_to_checkpoint(self, folder: Path) -> None:
        """Write further files into a checkpoint before it is marked as whole. This is called on all ranks."""

    def _at_train_begin(self) -> None:
        """
        Restore what transformers does not restore. This is called on all ranks.

        At this point model, optimizer and state are ready.
        """
        if self._checkpoint is None:
            self.state.log_history[:0] = self._evaluated
            return
        finished = self.state.global_step >= self.state.max_steps
        # With other ranks than at the time there are no rollouts in use, see `compare_settings`
        if self._resumed["geometry"]["world_size"] == self.args.world_size:
            state = checkpoint.load_rank_state(self._checkpoint, self.args.process_index, self.args.device)
            self._step, self._buffered_inputs = state["step"], state["buffered_inputs"]
            self._metrics["train"].update(state["metrics"])
            if self.log_completions and state["logs"] is not None:
                self._logs.update(checkpoint.to_logs(state["logs"]))
            if not finished:
                self._tr_loss += state["loss"]
            self._globalstep_last_logged = state["last_logged"]
        if finished:
            logger.warning(
                f"{self._checkpoint} is the end of the run: {self.state.global_step} steps of {self.state.max_steps}. "
                "Nothing is trained. Raise `max_steps` or `num_train_epochs` to go on."
            )
            self._load_rng_state(str(self._checkpoint))

    # Checkpoints and restarts

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        # transformers starts a log of its own: what was evaluated before the first step is the curve before training
        self._evaluated = [] if self.state.global_step > 0 else self.state.log_history
        with FaultWatch(), self._preemption, without_host_warnings():
            self._checkpoint = self._find_checkpoint(resume_from_checkpoint)
            output = super().train(
                resume_from_checkpoint=None if self._checkpoint is None else str(self._checkpoint),
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
            )
        if self._preemption.stopped:
            # What a script does after training is meant for a trained model, and may take longer than there is time
            raise SystemExit(0)
        return output

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """
        Find the whole checkpoint with matching settings to resume from.

        The main process looks for it on behalf of all ranks.
        """
        self._resumed = {}
        if not resume_from_checkpoint:
            return None
        folder, reason = Path(), None
        saved: dict[str, Any] = {}
        warnings: list[str] = []
        if self.accelerator.is_main_process:
            try:
                if resume_from_checkpoint is True:
                    folder, warnings = checkpoint.last_whole(Path(str(self.args.output_dir)))
                else:
                    folder = Path(resume_from_checkpoint)
                saved = checkpoint.manifest(folder)["settings"]
                changed = checkpoint.compare_settings(saved, self._settings(), folder)
                if changed:
                    warnings.append(f"Settings differ from the run that saved {folder}: {'; '.join(changed)}.")
            except ValueError as error:
                reason = str(error)
        folder, saved, warnings, reason = broadcast_object_list([folder, saved, warnings, reason])
        self._resumed = saved
        if reason is not None:
            raise checkpoint.UnfitCheckpoint(reason)
        for warning in warnings:
            logger.warning(warning)
        return folder

    def _settings(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model)
        frozen = model if is_peft_model(model) else self.ref_model
        if self._is_sharded or self.args.sync_ref_model:
            frozen = None  # its weights are not at hand, or change
        return checkpoint.settings(
            self.args,
            model,
            None if frozen is None else self.accelerator.unwrap_model(frozen),
            None if isinstance(self.train_dataset, IterableDataset) else len(self.train_dataset),
            self._fingerprint_of_prompts,
            self._rollouts_in_use,
            self._resume_settings(),
            self._preemption.evaluation_due,
        )

    @cached_property
    def _fingerprint_of_prompts(self) -> str | None:
        if isinstance(self.train_dataset, IterableDataset) or "prompt" not in self.train_dataset.column_names:
            return None  # an environment may bring the prompts
        # As they are stored: a transform on the fly may be random
        return checkpoint.fingerprint_of_prompts(self.train_dataset.with_format(None)["prompt"])

    @property
    def _rollouts_in_use(self) -> bool:
        return self._step % checkpoint.generate_every(self.args) != 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args, run_dir = self.args, Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if args.should_save:
            checkpoint.begin(folder)
        self.accelerator.wait_for_everyone()
        # No older one is deleted, and nothing is pushed, before this one is whole
        save_total_limit, args.save_total_limit = args.save_total_limit, None
        push_to_hub, args.push_to_hub = args.push_to_hub, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit, args.push_to_hub = save_total_limit, push_to_hub
        self._add_to_checkpoint(folder)
        if not args.save_only_model:
            checkpoint.save_rank_state(folder, args.process_index, self._rank_state())
        self.accelerator.wait_for_everyone()
        if args.should_save:
            torch.save(args, folder / TRAINING_ARGS_NAME)  # has been saved without its limit
            checkpoint.finish(folder, self._settings())
        if push_to_hub:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            if save_total_limit is not None:
                checkpoint.remove_unfinished(run_dir)
            best = self.state.best_model_checkpoint
            checkpoint.rotate(run_dir, save_total_limit, {folder} if best is None else {folder, Path(best)})

    def _rank_state(self) -> dict[str, Any]:
        """Return what TRL and transformers do not save: rollouts in use, and sums that are not logged yet."""
        return {
            # Between generation batches the count may start anew, and must if the next ones are dealt out otherwise
            "step": self._step if self._rollouts_in_use else 0,
            "buffered_inputs": self._buffered_inputs if self._rollouts_in_use else None,
            "metrics": checkpoint.to_plain(self._metrics["train"]),
            "logs": checkpoint.to_plain(self._logs) if self.log_completions else None,
            "loss": self._tr_loss,
            "last_logged": self._globalstep_last_logged,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # PEFT loads adapters in float32, also where TRL trains them in bfloat16 (QLoRA)
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        sampler = super()._get_train_sampler(dataset)
        if self._checkpoint is not None:
            # Each epoch draws its order from the sampler's one generator: go past those of the epochs already done
            state = TrainerState.load_from_json(str(self._checkpoint / TRAINER_STATE_NAME))
            for _ in range(int(state.epoch)):
                next(iter(sampler))
        return sampler

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """
        Do an evaluation that was due when the checkpoint was saved.

        transformers calls this once in a resumed run, when all is as it was after the step of the checkpoint.
        """
        super()._load_rng_state(checkpoint)
        if self._resumed["evaluation_due"]:
            logger.warning(
                f"Evaluating at step {self.state.global_step}, because {checkpoint} was saved before this evaluation."
            )
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics, None)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # transformers would look at the limit after another step
            self.control.should_training_stop = True

    # Rollouts and rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._num_rollouts = len(inputs)
        with memory_advice("rollouts"), self._times("rollouts"):
            output = super()._generate_and_score_completions(inputs)
        if self._num_real < self._num_of_all_ranks:
            self._drop_padding_rollouts(output)
        return output

    def _generate(self, prompts: list) -> tuple:
        output = super()._generate(prompts)
        if self._num_real < self._num_of_all_ranks:
            self._count_lengths_anew(*output[1:3])
        return output

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        guard, reward_funcs = RewardGuard(self.state.global_step), self.reward_funcs
        self.reward_funcs = [
            guard.guard(func, name) for func, name in zip(reward_funcs, self.reward_func_names, strict=True)
        ]
        try:
            with self._times("grading"):
                rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = reward_funcs
        guard.raise_on_all_ranks()
        guard.check_models(reward_funcs, self.reward_func_names, rewards_per_func, prompts)
        rows_per_rollout = len(inputs) // self._num_rollouts
        rewards_per_func[self._num_real * rows_per_rollout :] = torch.nan
        return rewards_per_func

    @property
    def _num_of_all_ranks(self) -> int:
        return self._num_rollouts * self.accelerator.num_processes

    @property
    def _num_real(self) -> int:
        """
        Return the number of rollouts of all ranks that count.

        Those that fill up the last batch of an evaluation do not count. They come last.
        """
        on_all_ranks = self._num_of_all_ranks
        state = self.accelerator.gradient_state
        if self.model.training or not state.end_of_dataloader:
            return on_all_ranks
        loader = state.active_dataloader
        if not hasattr(loader.dataset, "__len__"):  # a stream does not know where it began anew
            return on_all_ranks
        return min(
            on_all_ranks, len(loader.dataset) * self.num_generations_eval % loader.total_batch_size or on_all_ranks
        )

    def _count_lengths_anew(self, completion_ids: list[list[int]], masks: list[list[int]] | None) -> None:
        """Replace the lengths that TRL has logged by those without the rollouts that fill up the batch."""
        device, real = self.accelerator.device, slice(self._num_real)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        counted = [len(ids) for ids in completion_ids] if masks is None else [sum(mask) for mask in masks]
        lengths = self.accelerator.gather(torch.tensor(counted, device=device))[real].float()
        truncated = [ids[-1] not in ends for ids in completion_ids]
        truncated = self.accelerator.gather(torch.tensor(truncated, device=device))[real]
        terminated = lengths.new_zeros(1) if truncated.all() else lengths[~truncated]
        metrics = self._metrics["eval"]
        for prefix, values in (("", lengths), ("terminated_", terminated)):
            for name, value in (("mean", values.mean()), ("min", values.min()), ("max", values.max())):
                metrics[f"completions/{name}_{prefix}length"][-1] = value.item()
        metrics["completions/clipped_ratio"][-1] = truncated.float().mean().item()

    def _drop_padding_rollouts(self, output: dict[str, Any]) -> None:
        """Remove the rollouts that fill up the last batch of an evaluation from its loss."""
        mask = output.setdefault("tool_mask", torch.ones_like(output["completion_mask"]))
        first = self.accelerator.process_index * self._num_rollouts
        mask[max(0, self._num_real - first) :] = 0
        all_to_real = self._num_of_all_ranks / self._num_real
        # Losses that divide by tokens: `prediction_step` scales all losses as if they divided by rollouts
        num_tokens = self.accelerator.gather((mask * output["completion_mask"]).sum()).sum()
        output["num_items_in_batch"] = num_tokens * all_to_real
        # Theirs was NaN, which is not zero, unless it is one deviation for the whole batch
        fractions = self._metrics["eval"]["frac_reward_zero_std"]
        fractions[-1] = min(1.0, fractions[-1] * all_to_real)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple:
        loss, *rest = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.accelerator.gradient_state.end_of_dataloader:
            # transformers keeps the first few ranks' losses of the last batch: give each the loss of all
            loss = self.accelerator.reduce(loss, reduction="sum") * (self._num_rollouts / self._num_real)
        return (loss, *rest)

    # What is not finite

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,  # a function in the place of one, too
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        output = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        self._check_logprobs(output[0], input_ids[:, :-logits_to_keep])
        return output

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        if self._on_nonfinite == "raise" and not torch.isfinite(loss):
            raise FloatingPointError(
                f"Step {self.state.global_step}: the loss of a micro-batch of {len(inputs['prompt_ids'])} rollouts is "
                f"{loss.item()}, with finite log-probabilities. Set `on_nonfinite='skip'` to skip such steps."
            )
        return loss

    def _check_logprobs(self, logprobs: torch.Tensor, prompt_ids: torch.Tensor) -> None:
        """Refuse log-probabilities that are not finite. Both arguments have one row per rollout."""
        if self._on_nonfinite == "skip" or torch.isfinite(logprobs).all():
            return
        rows = (~torch.isfinite(logprobs)).any(dim=1)
        texts = [self._prompt_text(ids) for ids in prompt_ids[rows]]
        raise FloatingPointError(
            f"Step {self.state.global_step}: log-probabilities are not finite for {len(texts)} of {len(rows)} "
            f"rollouts, with the prompts {list(dict.fromkeys(texts))}. Set `on_nonfinite='skip'` to skip such steps."
        )

    def _prompt_text(self, ids: torch.Tensor) -> str:
        text = self._tokenizer.decode(ids[ids != self._tokenizer.pad_token_id])
        return text if len(text) <= 200 else f"{text[:100]} [...] {text[-100:]}"

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # With fp16 an overflow is part of scaling the loss, which leaves the step out by itself
        if grad_norm is None or self.args.fp16:
            return grad_norm
        finite = math.isfinite(grad_norm)
        if self._on_nonfinite == "skip":
            self._metrics["train"]["nonfinite/skipped_ratio"].append(float(not finite))
            if not finite:  # the norm is the same on all ranks: all of them leave the step out
                model.zero_grad()
        elif not finite:
            raise FloatingPointError(
                f"Step {self.state.global_step}: the norm of the gradient is {float(grad_norm)}, while loss and "
                "log-probabilities were finite. Set `on_nonfinite='skip'` to skip such steps."
            )
        return grad_norm

    # The update

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        with memory_advice("update"), self._times("step"):  # less the phases inside, such as those of rollouts
            output = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            seconds = self._times.take("step") + self._times.take("updating")
            self._metrics["train"]["time/updating"].append(seconds)
        return output

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or getattr(self.args.deepspeed_plugin, "zero_stage", 0) == 3
