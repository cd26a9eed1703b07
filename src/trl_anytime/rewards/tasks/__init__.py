"""Tasks of reasoning-gym: their problems, and workers that run their scorers. Importing this does not import it."""
