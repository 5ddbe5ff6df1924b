"""What replay costs on several processes."""
