"""What the ranks of a test do, see ranks.py. A scenario gets a directory and returns what can be written as JSON."""

import dataclasses
import json
import os
import random
import re
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.support.tiny import make_dataset, make_model, make_tokenizer, parity_reward, tiny_trainer
from trl_anytime import BRPOTrainer, ReliableGRPOTrainer
from trl_anytime.rollout.backend import PrefixGeneration
from trl_anytime.rollout.timing import PhaseTimes
from trl_anytime.rollout.trl_backend import TRLSampler
from trl_anytime.rollout.types import Rollout, Thinking
from trl_anytime.training.faults import FaultWatch

# Steps 1 to 4 train on one generation batch, 5 to 8 on the next; then an epoch is over
SETTINGS = {
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 3,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "log_completions": True,
}


LORA = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}


def this_rank():
    return int(os.environ.get("RANK", "0"))


def rank_trainer(directory, lora=False, prompts=4, model=None, fsdp2=False, plain=False, **settings):
    """
    A trainer of the tiny model: BRPO's, or with `plain` GRPO without budgets.

    Args:
        lora: whether to train an adapter, or settings of one, or "bfloat16".
        prompts: how many, or which in which order.
        model: settings of the model.
        settings: those of `tiny_trainer`.
    """
    if "RANK" in os.environ:
        settings["ddp_backend"] = "gloo"
    if lora:
        settings["peft_config"] = LoraConfig(**{**LORA, **(lora if isinstance(lora, dict) else {})})
    trainer = tiny_trainer(
        os.path.join(directory, "out"),
        ShardedTrainer if fsdp2 else ReliableGRPOTrainer if plain else BRPOTrainer,
        model=make_model(**(model or {})),
        train_dataset=make_dataset(max(prompts) + 1).select(prompts)
        if isinstance(prompts, list)
        else make_dataset(prompts),
        eval_dataset=make_dataset(3),
        **{**SETTINGS, **settings},
    )
    if lora == "bfloat16":  # as TRL does for QLoRA
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return trainer


def summary(trainer):
    """All that a restart must not change: what was logged, but for times, and the weights."""
    log = [
        {
            name: value
            for name, value in entry.items()
            # Seconds, and what is of this process alone
            if not re.search("(^|eval_)time/|step_time|_runtime|_per_second|train_loss", name)
        }
        for entry in trainer.state.log_history
    ]
    parameters = [parameter.detach() for parameter in trainer.model.parameters()]
    whole = [parameter.full_tensor() if isinstance(parameter, DTensor) else parameter for parameter in parameters]
    weights = torch.cat([parameter.flatten() for parameter in whole])
    return {"log": log, "weights": weights.tolist(), "steps": trainer.state.global_step}


def train(directory, resume=None, kill=None, by_prefix=False, nan_weights=False, **settings):
    """
    Train to the end, unless `kill` names the place, the rank and the how-manieth time at which a rank kills itself.
    With `by_prefix`, generate as sharded models do. With `nan_weights`, the model is broken before it begins.
    """
    trainer = rank_trainer(directory, **settings)
    if nan_weights:
        with torch.no_grad():
            trainer.model.lm_head.weight[5] = torch.nan
    if by_prefix:
        trainer.generation = PrefixGeneration(TRLSampler(trainer))
    if kill is not None:
        place, rank, count = kill
        if this_rank() == rank:
            die_in(trainer, place, count)
    trainer.train(resume_from_checkpoint=resume)
    return summary(trainer)


def counted(function, count, action):
    """`function`, before whose `count`-th call `action` happens."""
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            action()
        return function(*args, **kwargs)

    return wrapped


PLACES = {
    "train begin": lambda trainer: (trainer, "_at_train_begin"),
    "generation": lambda trainer: (
        (trainer.generation, "roll_out") if isinstance(trainer, BRPOTrainer) else (trainer, "_generate_single_turn")
    ),
    "grading": lambda trainer: (trainer, "_calculate_rewards"),
    "loss": lambda trainer: (trainer, "_compute_loss"),
    "evaluation": lambda trainer: (trainer, "prediction_step"),
    "data": lambda trainer: (trainer, "get_batch_samples"),
    "saving": lambda trainer: (trainer, "_save_optimizer_and_scheduler"),
}


def do_in(trainer, place, count, action):
    holder, name = PLACES[place](trainer)
    setattr(holder, name, counted(getattr(holder, name), count, action))


def die_in(trainer, place, count):
    do_in(trainer, place, count, lambda: os.kill(os.getpid(), signal.SIGKILL))


def terminated(directory, rank, place, count, **settings):
    """As `train`, but `rank` gets SIGTERM in the middle of something."""
    trainer = rank_trainer(directory, **settings)
    if this_rank() == rank:
        do_in(trainer, place, count, lambda: os.kill(os.getpid(), signal.SIGTERM))
    trainer.train()
    return "went on after training"


def exits(directory, place, code=0, rank=0, **settings):
    """Something ends the process of one rank."""
    trainer = rank_trainer(directory, **settings)

    def leave():
        sys.exit(code)

    if this_rank() == rank:
        do_in(trainer, place, 2, leave)
    trainer.train()


class FullDisk(TrainerCallback):
    """From a step on, no file can become larger than `size` bytes."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def full_disk(directory, step, size, **settings):
    callbacks = [FullDisk(step, size)] if this_rank() == 0 else None
    try:
        # what ranks print goes to a file, too: no progress bar fills it up
        rank_trainer(directory, callbacks=callbacks, disable_tqdm=True, **settings).train()
    finally:  # the traceback goes to a file, too
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Planned(Exception):
    pass


def fault(directory, place, rank=1, count=3, **settings):
    """One rank fails in some place. Prints when, to measure how long the others live on."""
    trainer = rank_trainer(directory, **settings)

    def fail():
        with open(os.path.join(directory, "failed_at"), "w") as file:
            file.write(str(time.time()))
        raise Planned(f"in {place} of rank {rank}")

    if this_rank() == rank:
        if place == "backward":
            parameter = next(trainer.model.parameters())
            parameter.register_hook(counted(lambda gradient: gradient, count, fail))
        elif place == "dataset":
            trainer.train_dataset.set_transform(counted(lambda rows: rows, count, fail))
        else:
            do_in(trainer, place, count, fail)
    trainer.train()


def fault_while_waiting(directory):
    """A rank that fails while the other one is where no signal or closed connection reaches it."""
    torch.distributed.init_process_group("gloo")
    with FaultWatch():
        if this_rank() == 1:
            raise Planned("while rank 0 waits")
        time.sleep(100)


def weights_become_nan(directory, step, **settings):
    """As after an update that went wrong: from a step on, a weight is NaN. Its gradient is, too, and then all are."""

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == step:
                with torch.no_grad():
                    next(model.parameters())[5] = torch.nan

    rank_trainer(directory, callbacks=[Spoil()], eval_strategy="no", **settings).train()


def gradient_becomes_nan(directory, count, **settings):
    """Once, on the last rank, for one parameter."""
    trainer = rank_trainer(directory, eval_strategy="no", **settings)
    before = []

    def spoil():
        before.append(trainer.state.global_step)

    def hook(gradient):
        return gradient * torch.nan if len(before) == 1 and before.append(None) is None else gradient

    if this_rank() == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        list(trainer.model.parameters())[-1].register_hook(counted(hook, count, spoil))
    trainer.train()
    return summary(trainer)


def loss_becomes_nan(directory, **settings):
    """Advantages that are not finite, with finite log-probabilities."""
    trainer = rank_trainer(directory, eval_strategy="no", **settings)
    prepare = trainer._prepare_inputs

    def spoiled(inputs):
        inputs = prepare(inputs)
        inputs["advantages"] = inputs["advantages"] + torch.inf
        return inputs

    trainer._prepare_inputs = spoiled
    trainer.train()


class Spoilt(torch.nn.Module):
    """A reward model whose score is NaN for one row of rank 1."""

    config = SimpleNamespace(_name_or_path="some/spoilt")

    def forward(self, input_ids, **kwargs):
        logits = input_ids.float().mean(dim=1, keepdim=True)
        if this_rank() == 1:
            logits[3] = torch.nan
        return SequenceClassifierOutput(logits=logits)


def reward_model(directory, **settings):
    rank_trainer(directory, reward_funcs=Spoilt(), reward_processing_classes=make_tokenizer(), **settings).train()


def exiting_reward(directory, **settings):
    """A reward that leaves the process on one rank, as if all was done."""

    def leaves(prompts, **kwargs):
        if this_rank() == 1:
            sys.exit(0)
        return [0.0] * len(prompts)

    rank_trainer(directory, reward_funcs=leaves, **settings).train()


def raises(rewards):
    raise KeyError("no such column")


ON_RANK_1 = {
    "fine": lambda rewards: rewards,
    "short": lambda rewards: rewards[:-1],
    "nan": lambda rewards: [*rewards[:3], float("nan"), *rewards[4:]],
    "raises": raises,
    "none": lambda rewards: [None] * len(rewards),
}


def rewards_on_rank_1(directory, kind, **settings):
    """Train with rewards that are others on the second rank only."""

    def reward(prompts, completion_ids, **kwargs):
        rewards = parity_reward(None, completion_ids)
        return ON_RANK_1[kind](rewards) if this_rank() == 1 else rewards

    trainer = rank_trainer(directory, reward_funcs=reward, **settings)
    try:
        trainer.train()
    except ValueError as error:
        return {"error": str(error)}
    return summary(trainer)


def adaptive_baseline(directory, **settings):
    """What the adaptive baseline has learned."""
    trainer = rank_trainer(directory, baseline="adaptive", **settings)
    trainer.train()
    trainer.accelerator.end_training()  # else a rank may abort as the other leaves
    return {
        "coefficients": trainer._adaptive_baseline.coefficients().tolist(),
        "rows": trainer._adaptive_baseline.rows.tolist(),
    }


def out_of_memory(directory, place, **settings):
    """A real refusal of the CPU's allocator."""
    trainer = rank_trainer(directory, **settings)
    do_in(trainer, place, 1, lambda: torch.empty(2**60, dtype=torch.uint8))
    trainer.train()


def recorded(rollouts):
    """A rollout as JSON, and back."""
    return [dataclasses.asdict(rollout) for rollout in rollouts]


def replayed(rollout):
    thinking = Thinking(**rollout["thinking"])
    return Rollout(**{**rollout, "thinking": thinking, "bridges": [tuple(ids) for ids in rollout["bridges"]]})


class Replay:
    """
    Stands in for `_generation`: serves each rank its part of recorded rollouts. Prompts that fill up the last batch of
    an evaluation were not recorded: any rollout serves.
    """

    def __init__(self, calls):
        self.times = PhaseTimes()
        self._any = [replayed(rollout) for rollouts in calls for rollout in rollouts]
        self._calls = iter(calls)

    def roll_out(self, prompt_ids, settings):
        first = this_rank() * len(prompt_ids)
        rollouts = [replayed(rollout) for rollout in next(self._calls)[first : first + len(prompt_ids)]]
        rollouts += [
            next(rollout for rollout in reversed(self._any) if rollout.prompt_ids == list(ids))
            for ids in prompt_ids[len(rollouts) :]
        ]
        assert [rollout.prompt_ids for rollout in rollouts] == [list(ids) for ids in prompt_ids]
        return rollouts


def scripted(prompt_ids, images, multimodal_fields, num_generations):
    """
    Stands in for TRL's `_generate_single_turn`: a completion depends on its prompt and its place in the group alone,
    whichever rank has it.
    """
    completion_ids = []
    for row, ids in enumerate(prompt_ids, start=this_rank() * len(prompt_ids)):
        draw = random.Random(f"{ids} {row % num_generations}")
        completion_ids.append([draw.randint(6, 19) for _ in range(draw.randint(1, 9))] + [2] * draw.randint(0, 1))
    return completion_ids, None


# Global batches of 8 rollouts, in groups of 4 or 8; 3 × 4 rollouts to evaluate do not fill two batches
EQUALITY = {
    "max_steps": 4,
    "save_strategy": "no",
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "num_generations_eval": 4,
    "learning_rate": 1e-2,
    "optim": "sgd",  # Adam takes the rounding of a small gradient for a step
}


def equality(directory, replay=None, **settings):
    """
    Train and evaluate, on rollouts that are sampled and recorded, or replayed from the file `replay`; with plain
    GRPO on scripted ones.
    """
    trainer = rank_trainer(directory, prompts=8, **{**EQUALITY, **settings})
    calls, gradients = [], []
    if settings.get("plain"):
        trainer._generate_single_turn = scripted
    elif replay is None:
        roll_out = trainer.generation.roll_out

        def record(prompt_ids, rollout_settings):
            rollouts = roll_out(prompt_ids, rollout_settings)
            calls.append(recorded(rollouts))
            return rollouts

        trainer.generation.roll_out = record
    else:
        trainer.generation = Replay(json.loads(Path(replay).read_text()))

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).tolist())

    trainer.add_callback(Gradients())
    trainer.train()
    if calls:
        Path(directory, "rollouts.json").write_text(json.dumps(calls))
    return {**summary(trainer), "gradients": gradients}


def finished_or_cut(rollout, markers, budgets, finished):
    """The rollout, with a trace that ends at once or not at all."""
    ids = list(markers.think_end_ids) if finished else [8] * budgets[-1]
    thinking = Thinking(ids, finished, False)
    return Rollout.from_budgets(rollout.prompt_ids, thinking, budgets, markers, rollout.summaries)


def uneven(directory, **settings):
    """
    Ranks with as little in common as can be. Rank 0: traces that end at once, and graded at once, by one function.
    Rank 1: all cut, summaries of one token, graded late, by the other function. Each logs what the other does not.
    """
    rank = this_rank()

    def fast(completion_ids, log_extra, log_metric, **kwargs):
        if rank == 1:
            return [None] * len(completion_ids)
        log_extra("of rank 0", [str(ids) for ids in completion_ids])
        log_metric("rank_0", 1.0)
        return parity_reward(None, completion_ids)

    def slow(completion_ids, log_extra, log_metric, **kwargs):
        if rank == 0:
            return [None] * len(completion_ids)
        time.sleep(2)  # a verifier that times out
        log_metric("rank_1", 2.0)
        log_extra("of rank 1", [str(ids) for ids in completion_ids])
        return [0.0] * len(completion_ids)

    trainer = rank_trainer(directory, reward_funcs=[fast, slow], **settings)
    roll_out = trainer.generation.roll_out

    def spread(prompt_ids, rollout_settings):
        rollouts = roll_out(prompt_ids, rollout_settings)
        if rank == 1:
            rollouts = [
                dataclasses.replace(rollout, summaries=[[ids[:1] for ids in row] for row in rollout.summaries])
                for rollout in rollouts
            ]
        return [
            finished_or_cut(rollout, rollout_settings.markers, rollout_settings.budgets, rank == 0)
            for rollout in rollouts
        ]

    trainer.generation.roll_out = spread
    trainer.train()
    return summary(trainer)


def objections(directory, checkpoint, changes, **settings):
    """What is said about resuming from `checkpoint` with each of `changes` to the settings."""
    said = []
    for change in changes:
        trainer = rank_trainer(directory, **{**settings, **change})
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
            said.append(f"trained to step {trainer.state.global_step}")
        except ValueError as error:
            said.append(str(error))
    return said


# What `accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml` sets
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def use_fsdp2():
    """Accelerate sets up FSDP for accelerators alone: on a CPU its state has to be told."""
    os.environ |= FSDP2
    plugin = FullyShardedDataParallelPlugin()
    Accelerator(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


class ShardedTrainer(BRPOTrainer):
    """Under FSDP2. Making a configuration resets accelerate's state, so FSDP is set up after that."""

    def __init__(self, *args, **kwargs):
        use_fsdp2()
        super().__init__(*args, **kwargs)


def sharded(directory, resume=None, kill=None, wrong_attention=False, **settings):
    """Train under FSDP2, weights gathered at the end."""
    trainer = rank_trainer(directory, fsdp2=True, **settings)
    if kill is not None and this_rank() == kill[1]:
        die_in(trainer, kill[0], kill[2])
    if wrong_attention:  # causal over the whole row, branches included
        base = trainer.model.base_model.model if settings.get("lora") else trainer.model
        base.set_attn_implementation("eager")
    trainer.train(resume_from_checkpoint=resume)
    return {
        **summary(trainer),
        # The root's own parameters stay whole after an evaluation
        "sharded": any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
        "forward": trainer._forward.__name__,
    }


if __name__ == "__main__":  # a rank of torchrun, or a process that needs an environment of its own
    name, folder, arguments = sys.argv[1:]
    globals()[name](folder, **json.loads(arguments))
