"""Sentences of four topics to train on, put together from words. The held-out ones are by hand."""

from __future__ import annotations

import random

TOPICS = ("food", "sports", "weather", "money")
PER_TOPIC = 96
FRAMES = {
    "food": (
        "{name} made {dish} {day}.",
        "{name} ordered {dish} with {side}.",
        "The {taste} {dish} came with {side}.",
        "Is there any {dish} left for {name}?",
    ),
    "sports": (
        "{name} played {sport} {day}.",
        "The {sport} club {result} {day}.",
        "{name} watched the {sport} tournament {place}.",
        "The {sport} squad {result} {place}.",
    ),
    "weather": (
        "It was {sky} {place} {day}.",
        "{event} came {day}.",
        "The outlook {place} is {sky}.",
        "{event} were seen {place}.",
    ),
    "money": (
        "{name} borrowed {sum} from {lender}.",
        "{name} earned {sum} {day}.",
        "{lender} wants {sum} back.",
        "The {cost} was {sum} {day}.",
    ),
}
WORDS = {
    "name": "Anna, Mr. Lee, my aunt, Tom, the girl next door, Nina, Paul, a friend",
    "day": "on Monday, last Sunday, yesterday, today, in May, at noon",
    "place": "in Oslo, near Lyon, in the north, by the lake, in Texas, on the island",
    "dish": "spaghetti, banana loaf, tomato pie, hummus, sausages, goulash, pancakes, popcorn",
    "side": "mashed potatoes, cream, gravy, spinach, yoghurt, peas",
    "taste": "spicy, crispy, creamy, juicy, tasty, salty",
    "sport": "football, hockey, cricket, rugby, handball, baseball, basketball, ice hockey",
    "result": "was three to one up, was beaten, drew, reached the semi-final, did badly",
    "sky": "sunny, stormy, windy, overcast, chilly, wet and cool, dry and bright, icy",
    "event": "showers, gales, snowflakes, heavy downpours, tornadoes, sunny spells, icicles",
    "sum": "90 crowns, 300 francs, a thousand rupees, a lot of cash, 50 yen",
    "lender": "the lender, the fund, the broker, the treasurer, the landlord",
    "cost": "debt, fine, invoice, deposit, wage, profit",
}


def sentences(topic: str) -> list[str]:
    """Different sentences of a topic, the same ones each time."""
    draws = random.Random(topic)
    found: dict[str, None] = {}
    while len(found) < PER_TOPIC:
        frame = draws.choice(FRAMES[topic])
        words = {name: draws.choice(of.split(", ")) for name, of in WORDS.items()}
        text = frame.format_map(words)
        found[text[0].upper() + text[1:]] = None
    return list(found)
