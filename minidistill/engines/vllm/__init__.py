"""vLLM in a process of its own, and the weights it is sent."""
