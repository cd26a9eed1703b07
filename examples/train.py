"""
Train a reasoning model by Budget Relative Policy Optimization on problems with verifiable answers.

    accelerate launch examples/train.py --config examples/configs/8k_anytime_uniform.yaml

or on one device, with a local file and LoRA, everything on the command line:

    python examples/train.py \
        --model_name_or_path deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \
        --dataset_name problems.jsonl \
        --budgets 1000 2000 4000 \
        --use_peft \
        --output_dir outputs/anytime

Every setting of BRPOConfig (and so of TRL's GRPOConfig) and of TRL's ModelConfig is an option; `--help` lists them.
`--resume_from_checkpoint outputs/anytime/checkpoint-100` goes on, `--push_to_hub` uploads the model with its card.
"""

from accelerate import PartialState
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_anytime import BRPOConfig, BRPOTrainer
from trl_anytime.data import DataArguments, load_problems, model_init_kwargs, name_in_card
from trl_anytime.rewards import MathReward


def main(data_args: DataArguments, training_args: BRPOConfig, model_args: ModelConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)

    # What the card cannot find out
    training_args.card_dataset = training_args.card_dataset or name_in_card(data_args.dataset_name)
    if data_args.eval_dataset_name:
        training_args.card_eval_dataset = training_args.card_eval_dataset or name_in_card(data_args.eval_dataset_name)
    training_args.card_question = training_args.card_question or f"What is 2 + 2? {data_args.instruction}".strip()

    reward = MathReward(on_bad_gold=data_args.on_bad_answer)
    shared = {"data_args": data_args, "tokenizer": tokenizer, "reward": reward}
    # One process prepares the data, the others read its cache
    with PartialState().local_main_process_first():
        train_dataset = load_problems(
            data_args.dataset_name, data_args.dataset_config, data_args.dataset_train_split, **shared
        )
        eval_dataset = None
        if data_args.eval_dataset_name:
            eval_dataset = load_problems(data_args.eval_dataset_name, None, data_args.eval_dataset_split, **shared)

    trainer = BRPOTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset,
        reward_funcs=reward,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if eval_dataset is not None and not training_args.resume_from_checkpoint:
        trainer.evaluate()  # for the card: the curve before training
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
        trainer.create_model_card()  # once more, with this evaluation
    if training_args.push_to_hub:
        trainer.push_to_hub()
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    parser = TrlParser((DataArguments, BRPOConfig, ModelConfig))
    main(*parser.parse_args_and_config())
