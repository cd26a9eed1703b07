"""Telling people: learning curves, figures, trackers, model cards."""
