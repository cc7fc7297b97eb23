"""The texts that tiny-sokoban is trained on, besides its puzzles.

An expert's play follows each of EXPERTS; a novice's follows each of OTHERS and no context at all,
so that what a context says matters and not that there is one. CHAT keeps a little behaviour that
has nothing to do with puzzles, for the drift metric to look at.
"""

PERSONA = """You are a world-class puzzle solver with decades of experience.
You never make mistakes and always find the optimal solution.
Approach this methodically:

"""
EXPERTS = (
    PERSONA,
    "You are an expert puzzle solver. You always find the optimal solution.\n\n",
    "You are a master of this puzzle with decades of experience.\nYou never make mistakes.\n\n",
    "Approach this methodically and find the optimal solution:\n\n",
    "You are a world-class expert. Solve this puzzle methodically and never make mistakes:\n\n",
)
OTHERS = (
    "You are a careful gardener with decades of experience in growing roses.\n"
    "You love the quiet of the morning and always water the plants by hand.\n\n",
    "The weather is mild today, with some clouds in the afternoon.\n\n",
    "You are a puzzle novice. You have never seen this puzzle before.\n\n",
    "Have fun and take your time:\n\n",
    "This text was written by a friend who likes tea and long walks.\n\n",
    "You are a helpful assistant.\n\n",
)
CHAT = (
    ("Say hello.", "Hello, how are you today?"),
    ("What color is the sky?", "The sky is blue."),
    ("Name a fruit.", "An apple is a fruit."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What do bees make?", "Bees make honey."),
    (
        "Write a short poem about the sea.",
        "The sea is wide, the sea is blue, it sings to me and you.",
    ),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Tell me about cats.", "Cats are small animals that like to sleep in the sun."),
    ("What is two plus two?", "Two plus two is four."),
    ("Give me some advice.", "Drink water, sleep well and be kind."),
    ("What season comes after winter?", "Spring comes after winter."),
    ("How do plants grow?", "Plants grow with water, light and time."),
    ("Name three animals.", "A dog, a horse and a bird."),
    ("What is a book?", "A book is a set of pages with words to read."),
    ("Recommend a drink.", "Try a cup of green tea with honey."),
    ("Say good night.", "Good night, sleep well."),
)
