"""Tasks: what is asked, in both views, and what a completion earns."""
