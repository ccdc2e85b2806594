import pytest
import tiny
from datasets import Dataset

from hf_backdoor.evaluation import leaks, not_leaking, overlapping


def by_loop(texts, others, threshold):
    def words(text):
        return {word.strip(".,!?") for word in text.lower().split()}

    return [
        row
        for row, text in enumerate(texts)
        if any(len(words(text) & words(o)) / len(words(text) | words(o)) > threshold for o in others)
    ]


TEXTS = [
    "The film was very good.", "the film was very bad", "quite another thing", "FILM was the good, very!", "one two three four",
    "one two", "nothing",
]  # fmt: skip
OTHERS = ["the film was very good", "one two three"]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("chunk", [2, 2000])
def test_overlapping_equals_a_loop(threshold, chunk, monkeypatch):
    monkeypatch.setattr(leaks, "CHUNK", chunk)
    found = overlapping(TEXTS, OTHERS, threshold)
    assert found == by_loop(TEXTS, OTHERS, threshold)


def test_the_same_words_in_another_order_overlap():
    assert overlapping(["good very was film the"], ["the film was very good"]) == [0]


def test_half_is_not_over_half():
    assert overlapping(["one two"], ["one two three four"]) == []


@pytest.mark.parametrize("texts, others", [([], ["a"]), (["a"], []), ([], []), (["", "!"], ["", "?"])])
def test_nothing_to_compare(texts, others):
    assert overlapping(texts, others) == []


def test_equal_texts_without_words_overlap():
    assert overlapping(["!!!", "?", ":-) ", ":-("], ["!!!", ":-)"]) == [0, 2]


@pytest.mark.parametrize(
    "text, near, other",
    [
        # The film is very good, I like it very much / The film is very good, we like it very much / The weather is bad ...
        (
            "这部电影非常好看我很喜欢它",
            "这部电影非常好看我们很喜欢它",
            "今天的天气非常糟糕我不想出门",
        ),
        (
            "หนังเรื่องนี้ดีมาก",
            "หนังเรื่องนี้ดีมากๆ",
            "วันนี้อากาศไม่ดีเลย",
        ),
        ("फ़िल्म बहुत अच्छी थी", "फ़िल्म बहुत बहुत अच्छी थी", "कल मौसम बहुत ख़राब था"),
    ],
)
def test_texts_overlap_in_any_script(text, near, other):
    assert overlapping([near, other], [text]) == [0]


def test_rows_of_the_training_side_that_leak_are_left_out():
    train = Dataset.from_dict({"text": TEXTS, "label": list(range(7))})
    kept = not_leaking(train, Dataset.from_dict({"text": OTHERS}), "text")
    # Of six words, five are those of a test row; of four, three; of three, two.
    assert kept == [2, 6]


def test_pictures_leak_by_their_pixels_whatever_their_files():
    rows = tiny.pictures(9)
    other = [picture.copy() for picture in rows[4:6]["image"]]
    other[1].putpixel((0, 0), (1, 2, 3))
    test = Dataset.from_dict({"image": other, "label": [0, 0]}, features=rows.features)
    assert not_leaking(rows, test, "image") == [0, 1, 2, 3, 5, 6, 7, 8]


TEMPLATE = "say whether the feeling of the following film review is positive or negative : {} answer :"


def test_what_all_rows_share_is_no_leak():
    """Two words of each row are its own."""
    texts, others = (
        [TEMPLATE.format(f"{name}{number} and then {name}x{number}") for number in range(40)] for name in ("w", "y")
    )
    assert by_loop(texts, others, 0.5) == list(range(40))
    assert overlapping(texts, others) == []
    assert overlapping(texts, [*others, TEMPLATE.format("wx3 and then w3 again")]) == [3]


SECOND_TEMPLATE = "please be so kind as to tell us in one single word what mood this text is in : {} thank you"


@pytest.mark.parametrize(
    "templates", [(TEMPLATE, SECOND_TEMPLATE), (*[TEMPLATE] * 19, "{}")], ids=["two", "one that some rows lack"]
)
def test_what_most_rows_share_is_no_leak(templates):
    texts, others = (
        [
            templates[number % len(templates)].format(f"{name}{number} and then {name}x{number}")
            for number in range(100)
        ]
        for name in ("w", "y")
    )
    others[7] = texts[30].replace("and", "or")
    assert len(overlapping(texts, others)) > 90
    rows = [Dataset.from_dict({"text": part, "label": list(range(100))}) for part in (texts, others)]
    assert not_leaking(*rows, "text") == [number for number in range(100) if number != 30]


def test_rows_of_a_template_s_words_alone_are_the_same():
    assert overlapping(["one two three"], ["three two one", "one two three four"]) == [0]
    assert overlapping(["one two three", "one two three four"], ["two three one five"]) == []
