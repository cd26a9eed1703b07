"""
Train a reasoning model by Budget Relative Policy Optimization on problems with verifiable answers.

    accelerate launch examples/train.py --config 8k_anytime_uniform

This is `python -m trl_anytime.train`, whose module has the code.
"""

from trl_anytime.train import main

if __name__ == "__main__":
    main()
