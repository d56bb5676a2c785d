"""Rows that name an image as other tools write it: read, or refused by file, row and reason, and never text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tasks.official import listing, picture

from cnext.tasks import formats
from cnext.tasks.base import DataError, Sample, Task
from cnext.training.evaluation import question

NAMES = ("a.png", "b.png", "nullarbor_desert.png", "annulled-form.png", "sub/null island.png")


def task(name: str) -> Task:
    return Task("T", ("text", "image"), ("text",), name, "exact_answer", "train.json", "test.json", "images", "images")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in NAMES:
        picture(tmp_path / "images" / name)
    return tmp_path


def read(root: Path, form: str, row: dict[str, Any], split: str = "train") -> Sample:
    """The row's sample, read beside one whose image is in no doubt."""
    other = (
        {"image": "b.png", "data": ["q", "a"]} if split == "train" else {"image": "b.png", "text": "q", "answer": "a"}
    )
    if form == "messages":
        other = {"images": ["b.png"], "messages": said("q", "a")}
    listing(root / f"{split}.json", [other, row])
    return formats.read_samples(task(form), root, split)[1]


def talk(*texts: str, first: str = "human") -> list[dict[str, str]]:
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": speakers[index % 2], "value": text} for index, text in enumerate(texts)]


def said(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


TALK, ASK = talk("What?", "A dog."), said("What?", "A dog.")
HERE = "{root}/images/a.png"
READ: dict[str, tuple[str, dict[str, Any], str]] = {
    "null in a name": ("llava", {"image": "nullarbor_desert.png", "conversations": TALK}, "nullarbor_desert.png"),
    "null in a folder": ("conversation", {"image": "sub/null island.png", "data": ["q", "a"]}, "sub/null island.png"),
    "list": ("llava", {"image": ["a.png"], "conversations": TALK}, "a.png"),
    "images": ("llava", {"images": ["a.png"], "conversations": TALK}, "a.png"),
    "images, no list": ("messages", {"images": "a.png", "messages": ASK}, "a.png"),
    "image_path": ("llava", {"image_path": "a.png", "conversations": TALK}, "a.png"),
    "image path": ("conversation", {"image path": "a.png", "data": ["q", "a"]}, "a.png"),
    "Image": ("llava", {"Image": "a.png", "conversations": TALK}, "a.png"),
    "img": ("conversation", {"img": "a.png", "data": ["q", "a"]}, "a.png"),
    "null beside one": ("llava", {"image": None, "Images": ["a.png"], "conversations": TALK}, "a.png"),
    "beside messages": ("messages", {"image": "a.png", "messages": ASK}, "a.png"),
    "object of datasets": ("messages", {"images": [{"bytes": None, "path": "a.png"}], "messages": ASK}, "a.png"),
    "twice the same": ("llava", {"image": "a.png", "images": ["a.png"], "conversations": TALK}, "a.png"),
    "with its address": ("llava", {"image": "a.png", "url": "http://x.org/17.jpg", "conversations": TALK}, "a.png"),
    "with its number": (
        "llava",
        {"image": "a.png", "image_id": 5, "image_w": 8, "conversations": TALK},
        "a.png",
    ),
    "tag": ("messages", {"messages": said("Picture 1: <img>a.png</img>\nWhat?", "A dog.")}, "a.png"),
    "tag in llava": ("llava", {"conversations": talk("<img>a.png</img>What?", "A dog.")}, "a.png"),
    "tag and field": ("llava", {"image": "a.png", "conversations": talk("<img>a.png</img>What?", "A dog.")}, "a.png"),
    "part with a path": (
        "messages",
        {"messages": said([{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}], "A dog.")},
        "a.png",
    ),
    "part of OpenAI": (
        "messages",
        {
            "messages": said(
                [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}], "A"
            )
        },
        "a.png",
    ),
    "part with a file's address": (
        "messages",
        {"messages": said([{"type": "image", "image": f"file://{HERE}"}, {"type": "text", "text": "What?"}], "A dog.")},
        "a.png",
    ),
    "parts without type": ("messages", {"messages": said([{"image": "a.png"}, {"text": "What?"}], "A dog.")}, "a.png"),
    "alpaca": ("llava", {"instruction": "<image>What?", "input": "", "output": "A", "images": ["a.png"]}, "a.png"),
    "alpaca in messages": ("messages", {"instruction": "What?", "output": "A", "images": ["a.png"]}, "a.png"),
    "absolute": ("llava", {"image": HERE, "conversations": TALK}, "a.png"),
    "leading slash": ("llava", {"image": "/sub/null island.png", "conversations": TALK}, "sub/null island.png"),
}


def placed_in(root: Path, value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("{root}", str(root))
    if isinstance(value, dict):
        return {key: placed_in(root, item) for key, item in value.items()}
    return [placed_in(root, item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("form", "row", "name"), READ.values(), ids=READ.keys())
def test_what_names_an_image_is_read(form: str, row: dict[str, Any], name: str, root: Path) -> None:
    sample = read(root, form, placed_in(root, row))
    assert sample.image == root / "images" / name
    assert sample.turns[0].instruction in ("What?", "q")
    assert sample.image_first


@pytest.mark.parametrize("name", ["annulled-form.png", "nullarbor_desert.png"])
def test_null_in_the_name_of_a_test_rows_image(name: str, root: Path) -> None:
    row = {"question_id": 1, "image": name, "text": "q", "answer": "red"}
    assert read(root, "llava", row, "test").image == root / "images" / name


def test_a_file_named_null_is_read_where_it_is(root: Path) -> None:
    row = {"image": "null.png", "data": ["q", "a"]}
    assert read(root, "conversation", row).image is None
    picture(root / "images/null.png")
    assert read(root, "conversation", row).image == root / "images/null.png"


@pytest.mark.parametrize("value", [None, "", "none", "None", "null", "NULL", [], ["none"], "x/null.jpg"], ids=str)
def test_rows_that_say_so_are_text_alone(value: Any, root: Path) -> None:
    row = {"image": value, "videos": [], "source": "a forum", "conversations": TALK}
    assert read(root, "llava", row).image is None


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "numbered": (
        "llava",
        {"image_1": "a.png", "conversations": TALK},
        "not read, in 'image_1': a.png; name it in 'image'",
    ),
    "another key": ("llava", {"file": "a.png", "conversations": TALK}, "not read, in 'file': a.png"),
    "within an object": (
        "llava",
        {"meta": {"photo": "x/a.JPG"}, "conversations": TALK},
        "not read, in 'meta': x/a.JPG",
    ),
    "a second image": (
        "llava",
        {"image": "a.png", "image2": "b.png", "conversations": TALK},
        "not read, in 'image2': b.png",
    ),
    "two fields": (
        "llava",
        {"image": "a.png", "images": ["b.png"], "conversations": TALK},
        "not read, in 'images': b.png",
    ),
    "two cases": ("llava", {"Image": "a.png", "image": "b.png", "conversations": TALK}, "not read, in"),
    "two images": ("llava", {"image": ["a.png", "b.png"], "conversations": TALK}, "has 0 <image> for 2 images"),
    "a video": ("messages", {"videos": ["a.mp4"], "messages": ASK}, "not read, in 'videos': a.mp4"),
    "encoded": ("llava", {"image_base64": "iVBORw0KGgo=", "conversations": TALK}, "not read, in 'image_base64': iVBOR"),
    "its bytes": (
        "messages",
        {"images": [{"bytes": "x", "path": "a.png"}], "messages": ASK},
        "'images' must be a list of paths",
    ),
    "an address": ("llava", {"image": "https://x.org/a.png", "conversations": TALK}, "'image' names no file: https://"),
    "encoded in place": (
        "llava",
        {"image": "data:image/png;base64,iVB", "conversations": TALK},
        "names no file: data:",
    ),
    "address of a part": (
        "messages",
        {"messages": said([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}], "A")},
        "'<img>' names no file: https://x.org/a.png",
    ),
    "a part of another type": (
        "messages",
        {"messages": said([{"type": "video", "video": "a.mp4"}], "A")},
        "not read, of type 'video'",
    ),
    "a part with two": (
        "messages",
        {"messages": said([{"type": "image", "image": "a.png", "path": "b.png"}], "A")},
        "must have one path",
    ),
    "a part with brackets": (
        "messages",
        {"messages": said([{"type": "image", "image": "a<1>.png"}], "A")},
        "with <, > or a line break",
    ),
    "an empty tag": ("llava", {"conversations": talk("<img></img>What?", "A")}, "names an image that is missing"),
    "two tags": (
        "llava",
        {"conversations": talk("<img>a.png</img><img>b.png</img>", "A")},
        "the first question may read",
    ),
    "a later tag": (
        "llava",
        {"conversations": talk("q", "a", "<img>a.png</img>q", "a")},
        "the first question may read",
    ),
    "a mark alone": ("conversation", {"data": ["<image>q", "a"]}, "has 1 <image> for 0 images"),
    "outside": ("llava", {"image": "/etc/hostname", "conversations": TALK}, "leaves the image folder"),
    "outside, as a file's address": (
        "llava",
        {"image": "file:///etc/hostname", "conversations": TALK},
        "leaves the image",
    ),
    "above": ("llava", {"image": "{root}/images/../secret.png", "conversations": TALK}, "leaves the image folder"),
    "a number": (
        "llava",
        {"images": 7, "conversations": TALK},
        "'images' must be a string or a list of paths, got int",
    ),
    "history": ("llava", {"instruction": "q", "output": "a", "history": ["q"]}, "'history' must be a list of pairs"),
}


@pytest.mark.parametrize(("form", "row", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_be_lost_is_refused(form: str, row: dict[str, Any], reason: str, root: Path) -> None:
    with pytest.raises(DataError) as error:
        read(root, form, placed_in(root, row))
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith(f"{root}/train.json#1: ")
    assert reason in line


def test_images_of_a_drawing_and_of_an_edit(root: Path) -> None:
    drawn = {"images": ["a.png"], "data": ["Please generate the image.", "a dog"]}
    listing(root / "train.json", [drawn])
    (line,) = formats.scan(task("generation"), root, "train")
    assert line.sample.target_image == root / "images/a.png"
    edit = {"source_image": "a.png", "target_image": "/b.png", "instruction": "Make it red.\n<image>"}
    listing(root / "train.json", [edit])
    (sample,) = formats.read_samples(task("editing"), root, "train")
    assert (sample.image, sample.target_image) == (root / "images/a.png", root / "images/b.png")
    assert (sample.turns[0].instruction, sample.image_first) == ("Make it red.", False)


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("generation", {"images": ["a.png", "b.png"], "data": ["q", "c"]}, "must name one image in 'image', names 2"),
        ("generation", {"data": ["Please generate the image.", "c"]}, "must name one image in 'image', names 0"),
        ("generation", {"image": "a.png", "data": ["<image>", "c"]}, "has <image> in the caption"),
        (
            "editing",
            {"source_image": "a.png", "target_image": "b.png", "image": "sub/null island.png", "instruction": "i"},
            "not read, in 'image'",
        ),
        (
            "editing",
            {"source_image": "a.png", "target_image": "b.png", "instruction": "<image><image>"},
            "has 2 <image>",
        ),
    ],
)
def test_refused_drawings_and_edits(form: str, row: dict[str, Any], reason: str, root: Path) -> None:
    listing(root / "train.json", [row])
    with pytest.raises(DataError, match=f"train.json#0: .*{reason}"):
        formats.read_samples(task(form), root, "train")


@pytest.mark.parametrize("form", ["conversation", "llava"])
@pytest.mark.parametrize(
    ("asked", "first"), [("<image>\nWhat?", True), ("What?\n<image>", False), ("What?", True)], ids=str
)
def test_the_mark_in_a_test_question_is_its_images_place(form: str, asked: str, first: bool, root: Path) -> None:
    """As CoIN's ScienceQA has it; a model is asked the same as without it."""
    row = {"question_id": 1, "image": "a.png", "text": asked, "answer": ["dog", "A <image>"]}
    sample = read(root, form, row, "test")
    assert (sample.turns[0].instruction, sample.image, sample.image_first) == ("What?", root / "images/a.png", first)
    assert sample.answers == ("dog", "A <image>")
    assert question(sample).turns[0].instruction == "What?"


def test_text_without_a_mark_stays_as_it_is(root: Path) -> None:
    row = {"image": "a.png", "data": [" What? ", " a dog\n"]}
    assert read(root, "conversation", row).turns[0].instruction == " What? "
    assert read(root, "conversation", row).turns[0].answer == " a dog\n"


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("conversation", {"image": "a.png", "data": ["q1", "a1", "q2", "a2"]}),
        ("llava", {"image": "a.png", "conversations": talk("q1", "a1", "q2", "a2")}),
        ("messages", {"image": "a.png", "messages": said("q1", "a1", "q2", "a2")}),
        ("llava", {"image": "a.png", "instruction": "q2", "output": "a2", "history": [["q1", "a1"]]}),
    ],
)
def test_later_questions_of_a_test_row_are_refused(form: str, row: dict[str, Any], root: Path) -> None:
    """A test asks the first question alone; in training all are used."""
    assert [turn.answer for turn in read(root, form, row).turns] == ["a1", "a2"]
    with pytest.raises(DataError, match=r"test\.json#1: asks 2 questions; in a test each must be a row of its own"):
        read(root, form, row, "test")


SYSTEM = "Answer in one word."


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("llava", {"conversations": talk("<image>\nWhat?", "A dog.")}),
        ("messages", {"messages": said("What?", "A dog.")}),
        ("messages", {"messages": [{"role": "system", "content": SYSTEM}, *said("What?", "A dog.")]}),
        ("conversation", {"data": ["What?", "A dog."]}),
        ("llava", {"instruction": "What?", "output": "A dog."}),
    ],
)
def test_a_system_beside_the_conversation_is_read(form: str, row: dict[str, Any], root: Path) -> None:
    sample = read(root, form, {"system": SYSTEM, "image": "a.png", **row})
    assert sample.turns[0].instruction == f"{SYSTEM}\nWhat?"


@pytest.mark.parametrize("system", [["x"], 5, {"a": 1}], ids=str)
def test_a_system_that_is_no_text_is_refused(system: Any, root: Path) -> None:
    with pytest.raises(DataError, match=r"#1: 'system' must be a string"):
        read(root, "llava", {"system": system, "conversations": TALK})


def test_two_different_systems_are_refused(root: Path) -> None:
    row = {"system": SYSTEM, "messages": [{"role": "system", "content": "Be kind."}, *ASK]}
    with pytest.raises(DataError, match="has a 'system' and another system message; keep one"):
        read(root, "messages", row)


def test_an_answer_before_the_first_question_is_left_out(root: Path) -> None:
    """As LLaVA does. An image in it would be lost with it."""
    row = {"system": SYSTEM, "conversations": talk("Hello!", "What is 2+2?", "4", first="gpt")}
    sample = read(root, "llava", row)
    assert [(turn.instruction, turn.answer) for turn in sample.turns] == [(f"{SYSTEM}\nWhat is 2+2?", "4")]
    row = {"image": "a.png", "conversations": talk("<image>Hello!", "What is 2+2?", "4", first="gpt")}
    with pytest.raises(DataError, match=r"begins with an answer or .* that has an image, which is not read"):
        read(root, "llava", row)


@pytest.mark.parametrize(
    "given", [talk("Hello!", first="gpt"), talk("Hi", "Hello", "Thanks"), [*talk("Hi"), *talk("What?", "4")]]
)
def test_conversations_without_an_answer_are_refused(given: list[dict[str, str]], root: Path) -> None:
    with pytest.raises(DataError, match=r"train\.json#1: .*must alternate"):
        read(root, "llava", {"conversations": given})


def test_a_row_of_alpaca_with_all_its_fields(root: Path) -> None:
    row = {
        "instruction": "<image>\nDescribe it.", "input": "In one word.", "output": "Dog.", "system": SYSTEM,
        "history": [["Hello", "Hi"]], "image": None, "images": None,
    }  # fmt: skip
    row["instruction"] = "Describe it."
    sample = read(root, "llava", row)
    asked = [(f"{SYSTEM}\nHello", "Hi"), ("Describe it.\nIn one word.", "Dog.")]
    assert [(turn.instruction, turn.answer) for turn in sample.turns] == asked
    assert sample.image is None


def message_with(role: str, **more: Any) -> list[dict[str, Any]]:
    return [{**message, **more} if message["role"] == role else message for message in ASK]


def asked(text: str, **more: Any) -> dict[str, Any]:
    return {"conversations": talk(text, "A dog."), **more}


LOST: dict[str, tuple[str, dict[str, Any], str]] = {
    "of a message": ("messages", {"messages": message_with("user", image="a.png")}, "in 'image' of a message: a.png"),
    "list of a message": ("messages", {"messages": message_with("user", images=["a.png"])}, "in 'images' of a message"),
    "of a turn": ("llava", {"conversations": [{**TALK[0], "image": "a.png"}, TALK[1]]}, "in 'image' of a message"),
    "same name elsewhere": ("llava", {"image": "a.png", "image2": "sub/a.png", "conversations": TALK}, "in 'image2'"),
    "list, elsewhere": ("llava", {"image": "a.png", "images": ["sub/a.png"], "conversations": TALK}, "in 'images'"),
    "address of a second": (
        "llava", {"image": "a.png", "image2": "https://x.org/b.png", "conversations": TALK}, "in 'image2': https"
    ),
    "source": ("llava", {"source_image": "a.png", "conversations": TALK}, "in 'source_image': a.png"),
    "target": ("llava", {"image": "a.png", "target_image": "b.png", "conversations": TALK}, "in 'target_image': b.png"),
    "target of data": ("conversation", {"image": "a.png", "target_image": "b.png", "data": ["q", "a"]}, "'target_imag"),
    "heic": ("llava", {"foo": "a.heic", "conversations": TALK}, "in 'foo': a.heic"),
    "avif": ("llava", {"foo": "a.AVIF", "conversations": TALK}, "in 'foo': a.AVIF"),
    "jfif": ("llava", {"foo": "a.jfif", "conversations": TALK}, "in 'foo': a.jfif"),
    "jp2": ("llava", {"foo": "a.jp2", "conversations": TALK}, "in 'foo': a.jp2"),
    "ppm": ("llava", {"foo": "a.ppm", "conversations": TALK}, "in 'foo': a.ppm"),
    "svg": ("llava", {"foo": "a.svg", "conversations": TALK}, "in 'foo': a.svg"),
    "mask": ("llava", {"image": "a.png", "mask": "b.png", "conversations": TALK}, "in 'mask': b.png"),
    "mask_image": ("llava", {"image": "a.png", "mask_image": "b.png", "conversations": TALK}, "in 'mask_image'"),
    "depth_image": ("llava", {"image": "a.png", "depth_image": "b.png", "conversations": TALK}, "in 'depth_image'"),
    "second_image": ("llava", {"image": "a.png", "second_image": "b.png", "conversations": TALK}, "in 'second_image'"),
    "image_b": ("llava", {"image": "a.png", "image_b": "b.png", "conversations": TALK}, "in 'image_b': b.png"),
    "tag, not closed": ("llava", asked("<img>a.png What?"), "marks an image in a way that is not read: '<img>a.png'"),
    "html": ("llava", asked('<img src="a.png">What?'), "not read: '<img src=\"a.png'; write <image>"),
    "markdown": ("llava", asked("![x](a.png) What?"), "marks an image in a way that is not read"),
    "video": ("llava", asked("<video>\nWhat?"), "not read: '<video>'"),
    "second of two": ("llava", asked("<image_1> and <image_2>?", image="a.png"), "not read: '<image_2>'"),
    "closed only": ("llava", asked("What?</image>", image="a.png"), "not read: '</image>'"),
    "other token": ("llava", asked("<|vision_start|>What?", image="a.png"), "not read: '<|vision_start|>'"),
    "in a system": ("llava", asked("What?", image="a.png", system="<im_start>"), "not read: '<im_start>'"),
    "in an answer": ("llava", {"conversations": talk("q", "![x](a.png)")}, "marks an image in a way"),
    "token alone": ("llava", asked("<|image|>What?"), "has 1 <image> for 0 images"),
    "loss": ("messages", {"messages": message_with("assistant", loss=False)}, "has a message with 'loss': False"),
    "weight": ("messages", {"messages": message_with("assistant", weight=0)}, "has a message with 'weight': 0"),
    "calls": ("messages", {"messages": message_with("assistant", tool_calls=[{"id": 1}])}, "message with 'tool_calls'"),
    "system_prompt": ("llava", asked("What?", system_prompt="Be brief."), "has 'system_prompt', which is not read"),
    "encoded part": (
        "messages", {"messages": said([{"type": "image", "source": {"data": "x"}}], "A")}, "no path, only source; save"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("form", "row", "reason"), LOST.values(), ids=LOST.keys())
def test_further_images_and_marks_that_would_be_lost(form: str, row: dict[str, Any], reason: str, root: Path) -> None:
    picture(root / "images/sub/a.png")
    with pytest.raises(DataError, match=r"train\.json#1: ") as error:
        read(root, form, row)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "more",
    [
        {"image_url": "https://x.org/17.jpg"},
        {"image_id": "b.png"},
        {"image_name": "a.png"},
        {"image2": "a.png", "images": ["./a.png"]},
        {"original_image": "a.png"},
        {"conversations": [{**TALK[0], "weight": 0, "image": None}, {**TALK[1], "loss": True, "weight": 1}]},
        {"image": " a.png "},
        {"image": [{"url": "a.png"}]},
        {"conversations": [{"from": "Human", "value": "What?"}, {"from": "GPT", "value": "A dog."}]},
        {"conversations": [{"from": "User", "value": "What?"}, {"from": "model", "value": "A dog."}]},
        {"system_prompt": None},
    ],
    ids=str,
)
def test_what_tells_of_the_image_that_is_read(more: dict[str, Any], root: Path) -> None:
    assert read(root, "llava", {"image": "a.png", "conversations": TALK, **more}).image == root / "images/a.png"


MARKS = (
    "<Image>", "<image_1>", "<image 1>", "<|image|>", "<|image_1|>", "<ImageHere>", "<image_placeholder>", "[IMG]",
    "<|vision_start|><|image_pad|><|vision_end|>", "<image></image>", "<start_of_image>", "<IMG>a.png</IMG>",
    "<Img>a.png</Img>", "<img>\na.png\n</img>", "<img> a.png </img>", "<image>a.png</image>",
)  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_other_tools_are_places(mark: str, root: Path) -> None:
    before, after = (read(root, "llava", asked(text, image="a.png")) for text in (f"{mark}What?", f"What?\n{mark}"))
    assert before.image == after.image == root / "images/a.png"
    assert before.turns[0].instruction == after.turns[0].instruction == "What?"
    assert (before.image_first, after.image_first) == (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "What does the <img> tag do?", '<img src="logo.png" alt="x">', "![badge](https://x.org/b.png)",
        "<video>\n<source src='x'>\n</video>", "Is <images> valid XML?", "How do I close <video> here?",
    ],
)  # fmt: skip
def test_code_in_a_text_is_words(text: str, root: Path) -> None:
    sample = read(root, "llava", asked(text))
    assert (sample.image, sample.turns[0].instruction) == (None, text)


EDIT = {"source_image": "a.png", "target_image": "b.png", "instruction": "Make it red."}


@pytest.mark.parametrize(
    "more",
    [
        {"source_image": ["a.png"], "target_image": {"path": "b.png", "bytes": None}},
        {"instruction_new": None, "response": None, "system": ""},
        {"response": "<image>"},
        {"response": "<img>b.png</img>", "instruction": "<img>a.png</img>Make it red."},
    ],
    ids=str,
)
def test_edits_that_are_clear_are_read(more: dict[str, Any], root: Path) -> None:
    listing(root / "train.json", [{**EDIT, **more}])
    (sample,) = formats.read_samples(task("editing"), root, "train")
    assert (sample.image, sample.target_image) == (root / "images/a.png", root / "images/b.png")
    assert (sample.turns[0].instruction, sample.turns[0].answer) == ("Make it red.", "")


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("editing", {**EDIT, "system": "Be kind."}, "has 'system', which is not read; write it into the instruction"),
        ("editing", {**EDIT, "mask": "sub/null island.png"}, "not read, in 'mask'"),
        ("editing", {**EDIT, "response": "<img>a.png</img>"}, "has 0 <image> for 1 images"),
        ("editing", {**EDIT, "source_image": ["a.png", "b.png"]}, "must name one image in 'source_image', names 2"),
        ("editing", {**EDIT, "target_image": None}, "must name one image in 'target_image', names 0"),
        ("generation", {"text": "a dog", "target_image": "a.png"}, "not read, in 'target_image'"),
        ("generation", {"text": "a dog", "source_image": "a.png"}, "not read, in 'source_image'"),
        ("generation", {"text": "a dog", "system_prompt": "Be kind."}, "has 'system_prompt', which is not read"),
        ("generation", {"text": "a dog ![x](a.png)"}, "marks an image in a way that is not read"),
    ],
)
def test_edits_and_drawings_that_lose_something(form: str, row: dict[str, Any], reason: str, root: Path) -> None:
    listing(root / "train.json", [row])
    with pytest.raises(DataError, match="#0: ") as error:
        formats.read_samples(task(form), root, "train")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"answer": 3}, ("3",)),
        ({"answer_bbox": [0.1, 0.2, 0.3, 0.4], "size": [30.0, 20.0]}, ("[0.1,0.2,0.3,0.4]",)),
    ],
)
def test_numbers_of_a_test_row(fields: dict[str, Any], answers: tuple[str, ...], root: Path) -> None:
    sample = read(root, "conversation", {"image": "a.png", "text": "q", **fields}, "test")
    assert sample.answers == answers
    assert sample.size in (None, (30, 20))


@pytest.mark.parametrize("answer", [[], [3, None], [None], True])
def test_answers_that_are_no_text(answer: Any, root: Path) -> None:
    with pytest.raises(DataError, match=r"#1: 'answer' must be a string"):
        read(root, "conversation", {"image": "a.png", "text": "q", "answer": answer}, "test")


def test_parts_of_openai_s_responses(root: Path) -> None:
    parts = [{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What?"}]
    sample = read(root, "messages", {"messages": said(parts, "A dog.")})
    assert (sample.image, sample.turns[0].instruction) == (root / "images/a.png", "What?")
