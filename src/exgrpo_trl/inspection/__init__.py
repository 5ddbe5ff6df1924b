"""What commands, reports and notebooks share to look into a saved buffer. No torch is imported."""
