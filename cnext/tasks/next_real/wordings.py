"""How the tasks of `next-real` ask: wordings by kind of question, those of training and others.

"{a}", "{b}" and "{place}" are filled in. Training, test and validation draw from the first list of a kind; the split
``reworded`` has the test items in wordings of the second, which training never shows.
"""

from __future__ import annotations

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # VQAv2
    "what": (
        (
            "What is in the {place}?",
            "What can be seen in the {place}?",
            "Which thing is in the {place}?",
            "Name the thing in the {place}.",
        ),
        ("What does the {place} of the picture show?", "Say which thing the {place} has."),
    ),
    "count": (
        (
            "How many things are there?",
            "How many things does the picture show?",
            "Count the things in the picture.",
            "What is the number of things?",
        ),
        ("How many things can be seen?", "Tell me the number of things in the picture."),
    ),
    "side": (
        (
            "What is to the {place} of the {a}?",
            "Which thing is {place} of the {a}?",
            "Name the thing that is to the {place} of the {a}.",
            "The {a} has which thing to its {place}?",
        ),
        ("Say what can be seen {place} of the {a}.", "Looking {place} from the {a}, which thing is there?"),
    ),
    "which": (
        (
            "Which is further {place}, the {a} or the {b}?",
            "Is the {a} or the {b} further {place}?",
            "Of the {a} and the {b}, which is on the {place}?",
            "The {a} or the {b}: which is more to the {place}?",
        ),
        ("Which of the two is {place} of the other, the {a} or the {b}?", "Who is on the {place}, the {a} or the {b}?"),
    ),
    "exists": (
        (
            "Is there {a}?",
            "Does the picture show {a}?",
            "Can {a} be seen?",
            "Is {a} in the picture?",
        ),
        ("Is one of the things {a}?", "Tell me if there is {a}."),
    ),
    # ImageNet
    "class": (
        (
            "What is the object in the image?",
            "What is this?",
            "What does the image show?",
            "Which thing is this?",
            "Name the object.",
            "What is the name of this thing?",
            "What object can be seen?",
            "Say what this is.",
        ),
        (
            "Which object does the picture show?",
            "Tell me the name of the object.",
            "This is a picture of what?",
            "What thing is in the image?",
        ),
    ),
    # Flickr30k: captions
    "one": (
        (
            "{a}",
            "a picture of {a}",
            "{a} in the middle",
            "an image that shows {a}",
        ),
        ("one thing: {a}", "{a}, alone"),
    ),
    "beside": (
        (
            "{a} to the left of {b}",
            "{b} to the right of {a}",
            "{a} on the left and {b} on the right",
            "on the left {a}, on the right {b}",
        ),
        ("{a} with {b} to its right", "left of {b}, {a}"),
    ),
    "above": (
        (
            "{a} above {b}",
            "{b} below {a}",
            "{a} at the top and {b} at the bottom",
            "at the top {a}, at the bottom {b}",
        ),
        ("{a} with {b} below it", "above {b}, {a}"),
    ),
    # OCRVQA
    "word": (
        (
            "What word is written in the image?",
            "Which word can be read?",
            "Read the word.",
            "What is written here?",
            "What does the text say?",
            "Which word does the image show?",
            "Name the word that is written.",
            "Tell me the word in the picture.",
        ),
        ("Which text is in the image?", "Say the word that can be seen.", "What can be read here?"),
    ),
    "number": (
        (
            "What number is written in the image?",
            "Which number can be read?",
            "Read the number.",
            "Which digits are written by hand?",
        ),
        ("Tell me the number in the picture.", "Which number does the image show?"),
    ),
    # RefCOCO
    "box": (
        (
            "Please provide the bounding box coordinate of the region this sentence describes: {a}.",
            "Where is {a}? Please provide the bounding box.",
            "Provide the bounding box of {a}.",
            "Find {a} and provide the box.",
            "What is the bounding box of {a}?",
            "Locate {a}.",
            "Give the box around {a}.",
            "Which region shows {a}? Give the box.",
        ),
        (
            "Where can {a} be seen? Give the bounding box.",
            "Please find the region of {a}.",
            "Tell me the box of {a}.",
            "What are the coordinates of {a}?",
        ),
    ),
    # HQEdit
    "replace": (
        (
            "Replace the {a} with {b}.",
            "Turn the {a} into {b}.",
            "Change the {a} to {b}.",
            "Put {b} where the {a} is.",
        ),
        ("In place of the {a}, show {b}.", "Show {b} where the {a} is."),
    ),
    "recolor": (
        (
            "Make the {a} {b}.",
            "Change the color of the {a} to {b}.",
            "Paint the {a} {b}.",
            "Color the {a} {b}.",
        ),
        ("Give the {a} the color {b}.", "Turn the {a} {b}."),
    ),
    "move": (
        (
            "Move the {a} to the {place}.",
            "Put the {a} in the {place}.",
            "Shift the {a} to the {place}.",
            "Place the {a} in the {place}.",
        ),
        ("Bring the {a} to the {place}.", "The {a} goes to the {place}."),
    ),
}
