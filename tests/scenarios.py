"""What the ranks of a test do, see ranks.py. A scenario gets a directory and returns what can be written as JSON."""

import os
import resource
import signal
import time

import torch
from peft import LoraConfig
from tiny import make_config, make_dataset, make_model, make_tokenizer, parity_reward
from transformers import TrainerCallback

from trl_anytime import BRPOTrainer
from trl_anytime.faults import FaultWatch

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


def this_rank():
    return int(os.environ.get("RANK", "0"))


def make_trainer(directory, reward=parity_reward, lora=False, num_prompts=4, callbacks=None, **settings):
    if "RANK" in os.environ:
        settings["ddp_backend"] = "gloo"
    return BRPOTrainer(
        make_model(),
        make_config(os.path.join(directory, "out"), **{**SETTINGS, **settings}),
        make_dataset(num_prompts),
        reward_funcs=reward,
        processing_class=make_tokenizer(),
        eval_dataset=make_dataset(3),
        peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear") if lora else None,
        callbacks=callbacks,
    )


def summary(trainer):
    """All that a restart must not change: what was logged, but for times, and the weights."""
    log = [
        {
            name: value
            for name, value in entry.items()
            if "time" not in name and "per_second" not in name and name != "train_loss"  # of this process alone
        }
        for entry in trainer.state.log_history
    ]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {"log": log, "weights": weights.tolist(), "steps": trainer.state.global_step}


def train(directory, resume=None, kill=None, **settings):
    """
    Train to the end, unless `kill` names the place, the rank and the how-manieth time at which a rank kills itself.
    """
    trainer = make_trainer(directory, **settings)
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
    "generation": lambda trainer: (trainer._generation, "roll_out"),
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
    trainer = make_trainer(directory, **settings)
    if this_rank() == rank:
        do_in(trainer, place, count, lambda: os.kill(os.getpid(), signal.SIGTERM))
    trainer.train()
    return "went on after training"


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
        make_trainer(directory, callbacks=callbacks, **settings).train()
    finally:  # the traceback goes to a file, too
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Planned(Exception):
    pass


def fault(directory, place, rank=1, count=3, **settings):
    """One rank fails in some place. Prints when, to measure how long the others live on."""
    trainer = make_trainer(directory, **settings)

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

    make_trainer(directory, callbacks=[Spoil()], eval_strategy="no", **settings).train()


def gradient_becomes_nan(directory, count, **settings):
    """Once, on the last rank, for one parameter."""
    trainer = make_trainer(directory, eval_strategy="no", **settings)
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
    trainer = make_trainer(directory, eval_strategy="no", **settings)
    prepare = trainer._prepare_inputs

    def spoiled(inputs):
        inputs = prepare(inputs)
        inputs["advantages"] = inputs["advantages"] + torch.inf
        return inputs

    trainer._prepare_inputs = spoiled
    trainer.train()


def out_of_memory(directory, place, **settings):
    """A real refusal of the CPU's allocator."""
    trainer = make_trainer(directory, **settings)
    do_in(trainer, place, 1, lambda: torch.empty(2**60, dtype=torch.uint8))
    trainer.train()
