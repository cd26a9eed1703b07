"""Run by `test_adaptive_baseline.py` under torchrun: the adaptive baseline, each group split across two ranks."""

import json
import os
import sys
from pathlib import Path

from tests.support.tiny import make_config, make_dataset, make_model, make_tokenizer, parity_reward
from trl_anytime import BRPOTrainer

if __name__ == "__main__":
    output_dir = Path(sys.argv[1])
    config = make_config(
        output_dir,
        baseline="adaptive",
        num_generations=8,
        per_device_train_batch_size=16,  # 32 traces in a batch: enough to predict the third
        max_steps=3,
        ddp_backend="gloo",
    )
    trainer = BRPOTrainer(
        make_model(), config, make_dataset(16), reward_funcs=parity_reward, processing_class=make_tokenizer()
    )
    trainer.train()
    learned = {
        "coefficients": trainer._adaptive_baseline.coefficients().tolist(),
        "rows": trainer._adaptive_baseline.rows.tolist(),
    }
    (output_dir / f"rank{os.environ['RANK']}.json").write_text(json.dumps(learned))
    trainer.accelerator.end_training()  # else a rank may abort as the other leaves
