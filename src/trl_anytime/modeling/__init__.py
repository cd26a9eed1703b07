"""How a model sees packed rows: tree attention, separate rows, branches on top of a cache."""
