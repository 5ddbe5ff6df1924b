"""What rollouts of several turns and images cost to record, save and load."""
