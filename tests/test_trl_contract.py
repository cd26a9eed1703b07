"""Every private member of TRL that the trainer overrides, calls or sets, held to what it relies on."""

import ast
import inspect
import re

import pytest
import trl
from transformers import Trainer
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import RepeatSampler

import tools.trl_members
import trl_anytime.brpo_trainer
import trl_anytime.rollout.trl_backend
import trl_anytime.rollout.vllm_backend
import trl_anytime.rollout.vllm_server
import trl_anytime.training.reliable_trainer
from tools.trl_members import ATTRIBUTES, CALLED, CLASS_ATTRIBUTES, OVERRIDDEN, moved
from trl_anytime import BRPOTrainer
from trl_anytime.checks.arguments import _REWARD_ARGUMENTS
from trl_anytime.rollout.trl_backend import TRLSampler
from trl_anytime.rollout.types import SUMMARY_FACTS
from trl_anytime.training.metrics import TABLE_COLUMNS
from trl_anytime.training.reliable_trainer import ReliableGRPOTrainer

# Attributes that transformers sets when training begins: the loss since the last log, and when that was
TRAINING_ATTRIBUTES = {"_globalstep_last_logged", "_tr_loss"}
# Our modules that reach into a trainer
SOURCES = [trl_anytime.brpo_trainer, trl_anytime.training.reliable_trainer, trl_anytime.rollout.trl_backend]
TRAINERS = [BRPOTrainer, ReliableGRPOTrainer]


def test_private_members_are_all_listed():
    """A private member of the hosts that is used but not listed here fails the test."""
    nodes = [node for module in SOURCES for node in ast.walk(ast.parse(inspect.getsource(module)))]
    used = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and re.fullmatch("_[a-z].*", node.attr)
        and ast.unparse(node.value) in ("self", "super()", "trainer", "self._trainer")
    }
    hosts = inspect.getsource(GRPOTrainer) + inspect.getsource(Trainer)
    own = {name for trainer in [*TRAINERS, TRLSampler] for name in vars(trainer) if not hasattr(GRPOTrainer, name)}
    own |= {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and f"self.{node.attr} = " not in hosts
    }
    overridden = {name for name in OVERRIDDEN if name[0] == "_"} | {
        "_get_per_token_logps_and_entropies",  # its parameters have a test of their own
        "_run_epoch",  # its arguments are passed on as they come
    }
    assert used - own - CLASS_ATTRIBUTES == ATTRIBUTES | TRAINING_ATTRIBUTES | set(CALLED) | overridden


def test_no_member_has_moved():
    assert moved() == []


def test_moved_members_are_named(monkeypatch):
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    monkeypatch.delattr("trl.trainer.utils.is_async_callable")
    monkeypatch.setattr(GRPOTrainer, "_prepare_inputs", lambda self, batch: None)
    monkeypatch.setattr("trl.trainer.utils.add_fused_lm_head", lambda lm_head: None)
    monkeypatch.setattr(tools.trl_members, "ATTRIBUTES", {"_step", "_no_such_attribute"})
    found = moved()
    names = "_calculate_rewards|is_async_callable|_prepare_inputs|add_fused_lm_head|_no_such_attribute"
    lines = {re.search(names, line)[0]: line for line in found}
    assert len(lines) == len(found) == 5
    assert "trl/trainer/utils.py" in lines["is_async_callable"]  # where the name is defined
    assert "trl_anytime/training/reward_guard.py" in lines["is_async_callable"]  # where it is imported
    assert re.search(r"self, batch\b.*self, generation_batch\b", lines["_prepare_inputs"])


def test_scoring_method():
    # It hands the model exactly these arguments, which `forward_packed` understands
    source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    assert 'model_inputs = {"input_ids": input_ids_batch, "attention_mask": attention_mask_batch}' in source
    assert "outputs = model(**model_inputs, labels=labels, fused_lm_head=True)" in source
    assert "outputs.log_probs[:, -logits_to_keep:]" in source


def test_vllm_generation():
    """What our vLLM backends use of TRL's."""
    source = inspect.getsource(VLLMGeneration)
    assert "stop_token_ids" not in inspect.getsource(VLLMGeneration)  # nothing that ours would overwrite

    # Sleep, as there: weights that it has discarded are sent anew, the cache is woken for each generation
    assert 'if self.mode == "colocate" and self.enable_sleep_mode and self._llm_weights_sleeping:' in source
    assert 'self.llm.wake_up(tags=["weights"])' in inspect.getsource(VLLMGeneration.sync_weights)
    assert 'self.llm.wake_up(tags=["kv_cache"])' in inspect.getsource(VLLMGeneration.generate)
    assert "self.llm.sleep(level=2)" in inspect.getsource(VLLMGeneration.generate)
    # The sampling parameters, and `n` besides
    parameters_of_trl = source.split("generation_kwargs = {")[1].split("}")[0]
    named = [line.split(":")[0].strip(' "') for line in parameters_of_trl.strip().splitlines()]
    ours = inspect.getsource(trl_anytime.rollout.vllm_backend.ColocateGeneration._sampling)
    assert {name for name in named if f'"{name}"' not in ours} == {"n"}
    # Weights are sent before the roll-out
    generate = inspect.getsource(GRPOTrainer._generate)
    assert generate.index("self.vllm_generation.sync_weights()") < generate.index("self.rollout_func(prompts, self)")


def test_vllm_client():
    """The methods by which TRL talks to a server in training; our client stands in for them."""
    calls = set(re.findall(r"self\.vllm_client\.(\w+)\(", inspect.getsource(VLLMGeneration)))
    calls -= {"init_communicator", "image_features"}  # at the start, and for images
    ours = {name for name in vars(trl_anytime.rollout.vllm_server._PatientClient) if name[0] != "_"}
    assert calls == ours


def test_what_a_restart_relies_on():
    loop = inspect.getsource(Trainer._inner_training_loop)
    for name in TRAINING_ATTRIBUTES:
        before, after = loop.split("self.callback_handler.on_train_begin(")
        assert f"self.{name} = " in before and f"self.{name} = " not in after  # so that a callback may set it
    assert "self._init_training_state(" in before and "self._prepare_for_training(" in before
    # The state of random numbers is loaded last, once the first batch has been fetched, and once in a run
    epoch = inspect.getsource(Trainer._run_epoch)
    assert "self._load_rng_state(resume_from_checkpoint)" in epoch
    assert "_load_rng_state" not in loop
    # An epoch that is left out ends training
    assert "if self.control.should_training_stop:" in loop.split("self._run_epoch(")[1]
    # `EpochEnd`: the end of an epoch is behind its last step's checkpoint, and a step is logged once
    assert epoch.index("on_step_end(") < epoch.index("_maybe_log_save_evaluate(") < epoch.index("on_epoch_end(")
    finish = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert "self.state.global_step > self._globalstep_last_logged" in finish
    assert finish.index("self._evaluate(") < finish.index("self._save_checkpoint(")
    # Rollouts are generated anew between generation batches alone
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "if self._step % generate_every == 0 or self._buffered_inputs is None:" in source
    # The order of each epoch is drawn from one generator, which begins with the seed
    source = inspect.getsource(RepeatSampler)
    assert "self.generator.manual_seed(seed)" in source.split("def __iter__")[0]
    assert source.count("generator=self.generator") == 1


def test_what_saving_relies_on():
    source = inspect.getsource(Trainer._save_checkpoint)
    assert 'f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"' in source
    assert "run_dir = self._get_output_dir(trial=trial)" in source
    assert "save_total_limit=self.args.save_total_limit" in source


def test_arguments_of_reward_functions():
    """Columns of these names would be lost, or be passed twice."""
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    set_by_trl = set(re.findall(r'(?<!_)reward_kwargs\["(\w+)"\] = ', source)) - {"environments"}  # which are refused
    passed = set(re.findall(r"(\w+)=", source.split("output_reward_func = reward_func(")[1].split("**")[0]))
    assert set_by_trl | passed | set(SUMMARY_FACTS) == set(_REWARD_ARGUMENTS)


def test_columns_of_the_table_of_completions():
    table = inspect.getsource(GRPOTrainer.log).split("table = {")[1].split("}\n")[0]
    assert set(re.findall(r'"(\w+)": ', table)) | {"budget", "thinking", "thinking_advantage"} == set(TABLE_COLUMNS)


def test_what_skipping_a_step_relies_on():
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("self._get_grad_norm(") < source.index("self.optimizer.step()")


def test_rollout_hook():
    source = inspect.getsource(GRPOTrainer._generate)
    assert "output = self.rollout_func(prompts, self)" in source
    assert 'required_keys = {"prompt_ids", "completion_ids", "logprobs"}' in source
    assert 'tool_mask = extra_fields.pop("env_mask", None)' in source


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_docstring_names_every_override(trainer):
    overridden = {name for name, member in vars(trainer).items() if inspect.isfunction(member)}
    overridden &= {name for parent in trainer.__mro__[1:] for name in vars(parent)}
    documented = trainer.__doc__.split("Example:")[0].split("Args:")[0]
    assert {name for name in overridden if f"`{name}`" not in documented} <= {"__init__"}
    named = set(re.findall(r"`(_?[a-z]\w+)`", documented))
    assert {name for name in named if hasattr(GRPOTrainer, name)} <= overridden


def test_supported_versions():
    assert trl.__version__.split(".")[:2] in (["1", "15"], ["1", "16"])
