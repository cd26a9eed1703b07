"""What `GRPOTrainer` lacks, with budgets or without: checkpoints, faults, preemption, alarms."""
