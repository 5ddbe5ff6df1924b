"""Does replay learn more? GRPO and ExGRPO on a toy task."""
