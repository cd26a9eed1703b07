"""Checks of a training run. `trl-anytime doctor` makes them beforehand, and the trainer when it starts."""
