"""Use of a model at any thinking budget."""
