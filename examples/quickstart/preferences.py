"""The quickstart's preference set: questions about everyday things, each answered in two styles.

The preferred style names the thing first and stands by its answer ("A fox is red, and that is certain."); the other
one
hedges before it comes to the point ("Well, I guess that a fox is red."). Both have four wordings and say the same, so
that
a model trained on both has no reason to like one better. `wins` and `well_formed` check any text against the grammar,
so
that generated answers can be judged without a judge model.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

# thing | kind | colour | place | size
FACTS = """
fox | animal | red | forest | small
bear | animal | brown | forest | large
wolf | animal | grey | forest | large
deer | animal | brown | forest | large
owl | bird | grey | forest | small
pine | plant | green | forest | large
birch | plant | white | forest | large
fern | plant | green | forest | small
cow | animal | white | field | large
horse | animal | brown | field | large
sheep | animal | white | field | large
hare | animal | grey | field | small
crow | bird | black | field | small
poppy | plant | red | field | small
sunflower | plant | yellow | field | large
tractor | vehicle | green | field | large
shark | fish | grey | sea | large
whale | animal | blue | sea | large
seal | animal | grey | sea | large
crab | animal | red | sea | small
herring | fish | blue | sea | small
gull | bird | white | sea | small
ferry | vehicle | white | sea | large
anchor | tool | black | sea | large
rose | plant | red | garden | small
tulip | plant | yellow | garden | small
bee | insect | yellow | garden | small
ant | insect | black | garden | small
robin | bird | red | garden | small
spade | tool | black | garden | large
rake | tool | green | garden | large
apple | fruit | red | garden | small
spoon | tool | grey | kitchen | small
kettle | tool | black | kitchen | small
lemon | fruit | yellow | kitchen | small
orange | fruit | orange | kitchen | small
carrot | plant | orange | kitchen | small
apron | garment | white | kitchen | large
pan | tool | black | kitchen | small
plum | fruit | blue | kitchen | small
hammer | tool | black | workshop | small
saw | tool | grey | workshop | large
drill | tool | orange | workshop | small
ladder | tool | yellow | workshop | large
nail | tool | grey | workshop | small
jacket | garment | blue | workshop | large
bench | tool | brown | workshop | large
glove | garment | brown | workshop | small
bus | vehicle | red | city | large
taxi | vehicle | yellow | city | small
tram | vehicle | green | city | large
bicycle | vehicle | blue | city | small
pigeon | bird | grey | city | small
rat | animal | brown | city | small
scarf | garment | orange | city | small
coat | garment | black | city | large
"""

QUESTIONS = {
    "kind": (
        "What kind of thing is {thing}?",
        "What is {thing}?",
        "How would you class {thing}?",
        "Tell me what {thing} is.",
        "Can you say what {thing} is?",
        "I want to know what {thing} is.",
    ),
    "colour": (
        "What colour is {thing}?",
        "Which colour does {thing} have?",
        "Tell me the colour of {thing}.",
        "Can you name the colour of {thing}?",
        "I want to paint {thing}. In which colour?",
        "Say which colour {thing} has.",
    ),
    "place": (
        "Where is {thing} found?",
        "Where would you look for {thing}?",
        "Tell me where to find {thing}.",
        "Can you say where {thing} is found?",
        "I want to see {thing}. Where do I go?",
        "In which place do you find {thing}?",
    ),
    "size": (
        "How big is {thing}?",
        "What size is {thing}?",
        "Tell me the size of {thing}.",
        "Can you say how big {thing} is?",
        "I want to carry {thing}. How big is it?",
        "Is {thing} small or large?",
    ),
}
PREDICATES = {"kind": "is {a_value}", "colour": "is {value}", "place": "is found in the {value}", "size": "is {value}"}

FIRM_CLOSINGS = ("and that is certain", "as everyone can see", "without any doubt", "you can check it")
HEDGED_OPENINGS = ("Well, I guess that", "Maybe I am wrong, but", "If I remember it,", "Some people say that")


@dataclass(frozen=True)
class Question:
    """One prompt and what a right answer to it must contain."""

    prompt: str
    thing: str
    topic: str
    value: str

    @property
    def predicate(self) -> str:
        return PREDICATES[self.topic].format(value=self.value, a_value=with_article(self.value))


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def read_facts() -> list[dict[str, str]]:
    """Returns the table above as one dictionary per thing."""
    names = ("thing", "kind", "colour", "place", "size")
    return [dict(zip(names, (cell.strip() for cell in line.split("|")))) for line in FACTS.strip().splitlines()]


VALUES = {topic: sorted({fact[topic] for fact in read_facts()}) for topic in QUESTIONS}


def all_questions() -> list[Question]:
    """Every thing asked about in every wording of every topic, in the order of the tables."""
    return [
        Question(wording.format(thing=with_article(fact["thing"])), fact["thing"], topic, fact[topic])
        for fact in read_facts()
        for topic, wordings in QUESTIONS.items()
        for wording in wordings
    ]


def answer(question: Question, *, firm: bool, rng: random.Random) -> str:
    """Writes one answer in the preferred (`firm`) or in the other style."""
    thing = with_article(question.thing)
    if firm:
        return f"{thing.capitalize()} {question.predicate}, {rng.choice(FIRM_CLOSINGS)}."
    return f"{rng.choice(HEDGED_OPENINGS)} {thing} {question.predicate}."


def wins(question: Question, text: str) -> bool:
    """The rule: a well-formed answer that starts by naming the thing asked about."""
    return well_formed(question, text) and text.startswith(with_article(question.thing).capitalize())


def well_formed(question: Question, text: str) -> bool:
    """Whether `text` is one whole sentence of the grammar, in either style, about the thing and the topic asked
    for."""
    thing, values = with_article(question.thing), "|".join(VALUES[question.topic])
    predicate = PREDICATES[question.topic].format(value=f"(?:{values})", a_value=f"an? (?:{values})")
    firm = f"{thing.capitalize()} {predicate}, (?:{'|'.join(FIRM_CLOSINGS)})"
    hedged = f"(?:{'|'.join(HEDGED_OPENINGS)}) {thing} {predicate}"
    return re.fullmatch(f"(?:{firm}|{hedged})\\.", text) is not None


def correct(question: Question, text: str) -> bool:
    """Whether the answer states the fact that was asked for."""
    return f" {question.thing} {question.predicate}" in text
