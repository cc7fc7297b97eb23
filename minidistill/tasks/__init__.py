"""Tasks: drawing them, their prompts in both views, and the rewards of completions."""
