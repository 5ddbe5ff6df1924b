"""What replay costs: seconds per step and peak memory, beside TRL's GRPO."""
