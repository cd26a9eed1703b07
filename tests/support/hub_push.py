"""Trains and pushes to the server in HF_ENDPOINT. Run by test_hub_push.py: these settings are read at import."""

import sys
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import TrainerCallback

from tests.support.tiny import graded_trainer
from trl_anytime import AnytimeConfig

output_dir = Path(sys.argv[1])
settings = {
    "push_to_hub": True,
    "hub_strategy": "checkpoint",
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_budgets": [2, 4, 6],
    "card_base_model": "tiny/base",
    "card_dataset": "some/problems",
    "card_eval_dataset": "some/benchmark:math",
}
trainer = graded_trainer(output_dir, **settings)


class Wait(TrainerCallback):
    """Pushes run in the background, from a folder that the next checkpoint changes."""

    def on_save(self, args, state, control, **kwargs):
        trainer.push_in_progress.wait_until_done()


trainer.add_callback(Wait())
trainer.evaluate()
trainer.train()
trainer.evaluate()
trainer.push_to_hub(model_name="Tiny: trained #1", tags=["a tag"])

# As anyone would see it
card = ModelCard.load(trainer.hub_model_id)
assert card.data["base_model"] == "tiny/base"
assert AnytimeConfig.from_pretrained(trainer.hub_model_id).budgets == [3, 6, 9]
