"""Little stories, composed from a grammar: what the tiny checkpoints are trained on.

    python -m examples.stories 3            # three stories
    python -m examples.stories 3 --seed 7

A story has a hero, a thing, a place and a friend that stay the same from its first sentence to its last, and
a beginning, a middle and an end. The same seed always gives the same stories.
"""

import argparse
import random
import re
from collections.abc import Iterator

GIRLS = "Anna Mia Lily Rosa Emma Nora Ella Clara Ruby Zoe".split()
BOYS = "Tom Ben Max Leo Sam Finn Jack Oscar Hugo Paul".split()
ANIMALS = "fox rabbit bear mouse duck hedgehog squirrel kitten puppy owl".split()
TRAITS = "little brave shy kind curious cheerful clever gentle".split()
HOMES = [
    "in a small house by the river",
    "in a red house on the hill",
    "at the edge of a green forest",
    "near the sea",
    "in a quiet village",
    "on a farm with many hens",
]
THINGS = ["ball", "kite", "drum", "book", "boat", "lamp", "bell", "scarf", "basket", "cup"]
COLOURS = "red blue green yellow white silver".split()
HIDING = [
    "under the old bridge",
    "behind the big tree",
    "in the tall grass",
    "next to the well",
    "beside an old cart",
    "behind the garden gate",
]
SPOTS = {"park": "in", "garden": "in", "forest": "in", "meadow": "on", "market": "at", "beach": "on"}
WEATHER = [
    "The sun was shining.",
    "The wind was soft and warm.",
    "It was a cold and bright day.",
    "White clouds sailed over the sky.",
    "The birds were singing.",
]
FOODS = ["apple", "pear", "cake", "cookie", "sandwich", "carrot"]
MORALS = [
    "It is good to have a friend.",
    "Sharing makes everything better.",
    "Never give up too soon.",
    "A kind word can change a day.",
    "Even small friends can be a big help.",
    "Asking for help is brave.",
]


class Cast:
    """Who and what one story is about; drawn once, so that the story keeps to it."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        girl = rng.random() < 0.5
        self.hero = rng.choice(GIRLS if girl else BOYS)
        self.she, self.her, self.whose = ("she", "her", "her") if girl else ("he", "him", "his")
        self.child = "girl" if girl else "boy"
        self.trait, self.home = rng.choice(TRAITS), rng.choice(HOMES)
        self.animal = rng.choice(ANIMALS)
        self.an_animal = f"an {self.animal}" if self.animal[0] in "aeiou" else f"a {self.animal}"
        self.colour, self.thing = rng.choice(COLOURS), rng.choice(THINGS)
        self.spot = rng.choice(list(SPOTS))
        self.at = SPOTS[self.spot]
        self.hidden, self.elsewhere = rng.sample(HIDING, 2)
        self.food, self.weather, self.moral = rng.choice(FOODS), rng.choice(WEATHER), rng.choice(MORALS)

    def pick(self, *sentences: str) -> str:
        """One of these sentences, with the cast put into it."""
        return self.rng.choice(sentences).format(**vars(self), She=self.she.capitalize())


def beginning(c: Cast) -> str:
    return (
        c.pick(
            "Once upon a time there was a {trait} {child} named {hero}. {She} lived {home}.",
            "Once upon a time a {trait} {child} named {hero} lived {home}.",
            "There once was a {child} named {hero} who lived {home}. {She} was very {trait}.",
        )
        + " "
        + c.pick(
            "{hero} had a {colour} {thing} and took it everywhere.",
            "More than anything {hero} loved {whose} {colour} {thing}.",
            "On {whose} birthday {hero} got a {colour} {thing}.",
        )
    )


def lost(c: Cast) -> str:
    return " ".join(
        [
            c.pick("One day {hero} went to the {spot}.", "One morning {hero} walked to the {spot}."),
            c.weather,
            c.pick(
                "But when {she} came home, the {thing} was gone.",
                "But suddenly the {thing} was not there any more.",
            ),
            c.pick(
                "{hero} looked {elsewhere}, but it was not there.",
                "{She} searched {elsewhere} and found nothing.",
            ),
            c.pick("{She} was so sad that {she} began to cry.", "{hero} sat down and felt very sad."),
            c.pick(
                'Then {an_animal} came by. "Why are you sad?" asked the {animal}.',
                '{an_animal} heard {her}. "What is wrong?" asked the {animal}.',
            ),
            c.pick('"I lost my {colour} {thing}," said {hero}.', '"My {thing} is gone," said {hero}.'),
            c.pick("the {animal} had good eyes and looked {hidden}.", "Together they looked {hidden}."),
            c.pick("And there it was, the {colour} {thing}!", "There lay the {colour} {thing}!"),
        ]
    )


def scared(c: Cast) -> str:
    return " ".join(
        [
            c.pick(
                "One day {hero} took the {thing} to the {spot}.", "One evening {hero} played {at} the {spot}."
            ),
            c.weather,
            c.pick("There {she} saw {an_animal} {hidden}.", "A small {animal} sat {hidden}."),
            c.pick("It was hungry and afraid.", "It was cold and all alone."),
            c.pick('"Do not be afraid," said {hero}.', '"Come here, little one," said {hero}.'),
            c.pick(
                "{She} gave it half of {whose} {food}, and the {animal} ate it all.",
                "{She} shared {whose} {food} with the {animal}.",
            ),
            c.pick(
                "Then {she} showed it the {colour} {thing}.", "Then {she} let it hold the {colour} {thing}."
            ),
            c.pick(
                "The {animal} laughed and was not afraid any more.",
                "The {animal} jumped up and down with joy.",
            ),
        ]
    )


def storm(c: Cast) -> str:
    return " ".join(
        [
            c.pick(
                "One day {hero} wanted to go to the {spot} with the {thing}.",
                "One day {hero} went to the {spot}.",
            ),
            c.pick(
                "But dark clouds came, and it began to rain.", "But a storm came up, and the rain fell hard."
            ),
            c.pick("{hero} ran and hid {hidden}.", "{She} found a dry place {hidden}."),
            c.pick("A wet {animal} was sitting there too.", "{an_animal} was hiding there as well."),
            c.pick(
                '"May I stay with you?" asked the {animal}.', '"I do not like the rain," said the {animal}.'
            ),
            c.pick('"Of course," said {hero}. "Let us wait together."', '"Then sit with me," said {hero}.'),
            c.pick(
                "They ate {whose} {food} and played with the {colour} {thing}.",
                "They shared {whose} {food} and sang a song until the rain stopped.",
            ),
            c.pick("At last the sun came back.", "Soon the sky was blue again."),
        ]
    )


def stuck(c: Cast) -> str:
    return " ".join(
        [
            c.pick(
                "One day {hero} played with the {thing} {at} the {spot}.",
                "One morning {hero} went to the {spot}.",
            ),
            c.weather,
            c.pick(
                "A strong wind came and carried the {thing} up into a tree.",
                "The {thing} flew up and got stuck in a tree.",
            ),
            c.pick(
                "{hero} jumped and jumped, but the branch was too high.",
                "{She} tried to climb, but {she} slipped.",
            ),
            c.pick(
                '"Can you help me?" {she} asked {an_animal}.', '"Please help me," {she} said to {an_animal}.'
            ),
            c.pick('"Yes, I can," said the {animal}.', '"Let me try," said the {animal}.'),
            c.pick(
                "The {animal} climbed up and pushed the {thing} down.",
                "The {animal} shook the branch with all its strength.",
            ),
            c.pick("Down came the {colour} {thing}!", "The {colour} {thing} fell right into {whose} arms."),
        ]
    )


def ending(c: Cast) -> str:
    return (
        c.pick(
            '"Thank you," said {hero}. From that day on {hero} and the {animal} were best friends.',
            "{hero} hugged the {animal}, and they went home together.",
            "That night {hero} told {whose} mother about the {animal} and fell asleep with a smile.",
            "{hero} and the {animal} played until the stars came out.",
        )
        + " "
        + c.moral
    )


def story(rng: random.Random) -> tuple[str, str]:
    """A request and the story that answers it."""
    return told(Cast(rng))


def told(cast: Cast) -> tuple[str, str]:
    rng = cast.rng
    middle = rng.choice([lost, scared, storm, stuck])
    text = " ".join([beginning(cast), middle(cast), ending(cast)])
    text = re.sub(r"[.!] [a-z]", lambda found: found[0].upper(), text)
    return f"Tell me a story about {cast.hero} and {cast.an_animal}.", text


def stories(seed: int) -> Iterator[str]:
    """Stories without end."""
    rng = random.Random(seed)
    while True:
        yield story(rng)[1]


def requests(seed: int) -> Iterator[tuple[str, str]]:
    """Requests and the stories that answer them, without end."""
    rng = random.Random(seed)
    while True:
        yield story(rng)


def questions(c: Cast) -> list[tuple[str, str]]:
    """What can be asked about every story, and the answers."""
    return [
        (f"What colour was the {c.thing}?", f"The {c.thing} was {c.colour}."),
        (f"What did {c.hero} take everywhere?", f"It was a {c.colour} {c.thing}."),
        (f"Who was the friend of {c.hero}?", f"The {c.animal}."),
        (f"Where did {c.hero} live?", f"{c.she.capitalize()} lived {c.home}."),
    ]


def conversations(seed: int) -> Iterator[list[tuple[str, str]]]:
    """Requests with their stories, each followed by up to two questions and answers, without end."""
    rng = random.Random(seed)
    while True:
        cast = Cast(rng)
        yield [told(cast), *rng.sample(questions(cast), rng.randint(0, 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print stories from the grammar.")
    parser.add_argument("count", type=int, nargs="?", default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for _, text in zip(range(args.count), stories(args.seed), strict=False):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
