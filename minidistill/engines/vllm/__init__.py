"""vLLM in a separate process, and how weights get there."""
