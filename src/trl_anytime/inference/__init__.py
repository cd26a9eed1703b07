"""Using a model at any thinking budget."""
