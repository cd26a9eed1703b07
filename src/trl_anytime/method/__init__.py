"""What BRPO computes, with torch alone: budgets, advantages, the learned baseline, packed rows."""
