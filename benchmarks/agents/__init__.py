"""Does replay help an agent? GRPO and ExGRPO in an environment."""
