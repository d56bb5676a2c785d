"""Writes cnext/judging/labelled/edited.json: right answers to questions about photographs, edited until they are wrong.

The type follows from the edit, and the edits from lists of words that the rules of `cnext.scoring.errors` do not have:
synonyms, broader terms, refusals. `PYTHONPATH=tests python -m judging.edited_errors` in a checkout writes the file
again; a test compares.
"""

from __future__ import annotations

from random import Random
from typing import Any

from judging.made_errors import LABELS, as_text, folder

FILE = folder() / "edited.json"
END = " Answer the question using a single word or phrase."
QUESTIONS = {
    "animal": [
        ("What animal is on the bed?", "cat"), ("What animal is in the picture?", "giraffe"),
        ("What is standing in the field?", "horse"), ("What is the man walking?", "dog"),
        ("What animals are by the water?", "elephants"), ("What is sitting on the fence?", "bird"),
        ("What is eating the grass?", "sheep"), ("What is on the bench?", "cat"),
    ],
    "thing": [
        ("What is the boy holding?", "baseball bat"), ("What is on the table?", "laptop"),
        ("What is hanging on the wall?", "clock"), ("What is parked by the curb?", "motorcycle"),
        ("What is the woman carrying?", "umbrella"), ("What is in the vase?", "flowers"),
        ("What is the man sitting on?", "sofa"), ("What is next to the keyboard?", "mouse"),
        ("What is the child riding?", "skateboard"), ("What is flying in the sky?", "kite"),
        ("What is the man looking at?", "cell phone"), ("What is in the background?", "stop sign"),
    ],
    "food": [
        ("What is on the plate?", "pepperoni pizza"), ("What fruit is in the bowl?", "bananas"),
        ("What is in the glass?", "red wine"), ("What is the woman eating?", "hot dog"),
        ("What vegetable is shown?", "broccoli"), ("What dessert is this?", "chocolate cake"),
        ("What is the man drinking?", "coffee"), ("What is on top of the cake?", "raspberries"),
    ],
    "color": [
        ("What color is the bus?", "red"), ("What color is the man's shirt?", "blue"),
        ("What color are the walls?", "white"), ("What color is the cat?", "gray"),
        ("What color is the umbrella?", "yellow"), ("What color is the car on the left?", "black"),
        ("What color is the grass?", "green"), ("What color is the sign?", "orange"),
    ],
    "count": [
        ("How many people are there?", "2"), ("How many zebras are shown?", "4"),
        ("How many chairs are at the table?", "6"), ("How many cars can be seen?", "3"),
        ("How many pillows are on the couch?", "5"), ("How many wheels does the cart have?", "8"),
    ],
    "yes or no": [
        ("Is it raining?", "no"), ("Is the man wearing a hat?", "yes"), ("Are the lights on?", "yes"),
        ("Is this a kitchen?", "no"), ("Does the dog look happy?", "yes"), ("Is the door open?", "no"),
    ],
    "place": [
        ("Where is the cat?", "on the bed"), ("Where was this taken?", "beach"), ("What room is this?", "kitchen"),
        ("Where are the people?", "park"), ("Where is the lamp?", "corner"),
        ("Where is the boat?", "on the lake"),
    ],
    "sport": [
        ("What sport is this?", "tennis"), ("What game are they playing?", "baseball"),
        ("What are the people doing?", "skiing"), ("What is the man doing?", "surfing"),
        ("What is the boy doing?", "skateboarding"), ("What are the children playing?", "soccer"),
    ],
}  # fmt: skip
"""(question, answer) by what is asked for."""
SAME = {
    "cat": "kitten", "dog": "puppy", "horse": "pony", "sheep": "lamb", "laptop": "notebook computer", "sofa": "couch",
    "motorcycle": "motorbike", "cell phone": "mobile phone", "clock": "wall clock", "skateboard": "longboard",
    "flowers": "bouquet", "red wine": "wine", "hot dog": "hotdog", "chocolate cake": "chocolatecake", "gray": "grey",
    "beach": "seashore", "soccer": "football", "skiing": "going skiing", "tennis": "lawn tennis", "park": "city park",
    "stop sign": "stopsign", "coffee": "black coffee", "kitchen": "kitchenette", "baseball bat": "bat",
    "pepperoni pizza": "pizza", "on the bed": "bed", "on the lake": "lake",
}  # fmt: skip
BROADER = {
    "giraffe": "mammal", "bird": "small animal", "umbrella": "accessory", "broccoli": "green vegetable",
    "kite": "toy", "mouse": "computer mouse", "surfing": "water sport", "baseball": "ball game",
    "corner": "corner of room",
    "skateboarding": "riding a skateboard",
}  # fmt: skip
SINGULAR = {"elephants": "elephant", "bananas": "banana", "raspberries": "raspberry"}
SHADES = ("dark", "light", "bright", "pale")
LETTERS = {"2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "8": "eight"}
REFUSALS = (
    "I am sorry, but I cannot see any image here",
    "As a language model I have no access to pictures",
    "It depends on what you mean by the question",
    "Please provide more context so that I can help you",
)


def wrong(sort: str, question: str, right: str, draw: Random) -> tuple[str, str]:
    """The answer to another question of the same sort."""
    if sort == "yes or no":
        return {"yes": "no", "no": "yes"}[right], "the opposite"
    others = {answer for _, answer in QUESTIONS[sort]} - {right}
    return draw.choice(sorted(others)), "the answer to another question of its sort"


def broken(sort: str, question: str, right: str, draw: Random) -> tuple[str, str]:
    """Not of the form asked for."""
    other = draw.choice([each for each in QUESTIONS if each not in (sort, "place")])
    asked, answer = draw.choice(QUESTIONS[other])
    forms = [
        (f"{right} {asked.split()[0].lower()} {answer}", "the next question begins after the answer"),
        (f"{right}, {answer}", "the answers to two questions"),
        (draw.choice(REFUSALS), "a refusal"),
        (f"{right} {right} {right} {right}", "a loop"),
        (question, "the question"),
        ("...", "marks alone"),
        ("<image>", "a placeholder of the prompt"),
        ("".join(c for c in right.replace(" ", "") if c not in "aeiouy")[:4] or "n", "the answer's consonants"),
    ]
    if sort in ("color", "count", "yes or no"):
        thing = draw.choice(QUESTIONS["animal"])[1]
        forms += [(thing, "an animal where another kind is asked for")] * 2
    elif question.startswith("W"):
        forms += [("yes", "yes where something is asked for")] * 2
    return draw.choice(forms)


def near(sort: str, question: str, right: str, draw: Random) -> tuple[str, str]:
    """Right in other words, or in part."""
    if sort == "yes or no":
        return {"yes": "yes it is", "no": "no it is not"}[right], "the right answer with words around it"
    if sort == "count":
        return draw.choice([(LETTERS[right], "the number in letters"), (f"about {right}", "the number, qualified")])
    if sort == "color" and right != "gray":
        return f"{draw.choice(SHADES)} {right}", "a shade of the color"
    if right in SAME:
        return SAME[right], "the same in other words"
    if right in BROADER:
        return BROADER[right], "a broader term, or a narrower one"
    return (SINGULAR[right], "the singular") if right in SINGULAR else (f"{right}s", "the plural")


MAKERS = dict(zip(LABELS, (wrong, broken, near), strict=True))


def edited_errors() -> list[dict[str, Any]]:
    """Each question with each type of error."""
    draw, found = Random("edited answers"), []
    for sort, pairs in QUESTIONS.items():
        for question, right in pairs:
            for label in LABELS:
                answer, made = MAKERS[label](sort, question, right, draw)
                row = {"task": sort, "instruction": question + END, "expected": right, "answer": answer}
                found.append({**row, "error": label, "made": made})
    return found


def content() -> str:
    """The file's text."""
    return as_text(edited_errors())


if __name__ == "__main__":
    FILE.write_text(content(), encoding="utf-8")
