"""What exgrpo-trl costs and what it brings, measured beside TRL's GRPO; see docs/benchmarks.md."""
