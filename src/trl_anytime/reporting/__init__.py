"""Reports for people: learning curves, figures, trackers, model cards."""
