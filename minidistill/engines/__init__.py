"""Where completions are sampled and scored."""
