"""Whether a training run makes sense: checked by `trl-anytime doctor` before it, and by the trainer when it starts."""
