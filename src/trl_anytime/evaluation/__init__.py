"""Evaluation of a model: problems, accuracy-versus-budget curves, statistics."""
