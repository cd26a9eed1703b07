"""The computations of BRPO, with torch alone: budgets, advantages, the learned baseline, packed rows."""
