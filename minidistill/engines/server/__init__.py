"""vLLM servers that somebody else started."""
