"""Think, cut, summarise: markers, rollouts, and the backends that sample them."""
