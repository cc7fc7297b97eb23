"""Models: those that ship with the package, and loading configurations and tokenizers."""
