"""What replay costs at a vLLM server."""
