"""Questions that have nothing to do with a run's tasks, for measuring drift."""

UNRELATED = (
    "Say hello.",
    "What color is the sky?",
    "Name a fruit.",
    "How many days are in a week?",
    "What do bees make?",
    "Write a short poem about the sea.",
    "What is the opposite of hot?",
    "Tell me about cats.",
    "What is two plus two?",
    "Give me some advice.",
    "What season comes after winter?",
    "How do plants grow?",
    "Name three animals.",
    "What is a book?",
    "Recommend a drink.",
    "Say good night.",
)
