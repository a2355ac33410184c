"""Prompt sets read well; files are read as editors write them."""

import time

import pytest

from vader_nb import prompts
from vader_nb.prompts import Prompt, with_article

KINDS = (
    "instruments instruments_unseen human human_activity actpred animal animal_sport animal_clothes "
    "animal_technology animal_housework animal_action outdoor rainy snowy dog forest book_cup ice cute"
)
VADERS = ["hps_custom", "nouns_activities", "simple_animals", "chatgpt_custom"]
VADERS += [f"chatgpt_custom_{kind}" for kind in KINDS.split()]


@pytest.mark.parametrize("name", [*VADERS, "animals"])
def test_a_set_is_enough_distinct_sentences_that_fit_a_text_encoder(name):
    texts = list(prompts.get(name))
    assert len(texts) >= 24 and len({text.lower() for text in texts}) == len(texts)
    for text in texts:
        assert text == " ".join(text.split()) and text.isascii() or "é" in text
        assert 2 <= len(text.split()) <= 30  # CLIP reads 77 tokens


def test_sets_do_not_overlap_where_training_and_judging_must_not():
    seen, unseen = (
        prompts.get("chatgpt_custom_instruments"),
        prompts.get("chatgpt_custom_instruments_unseen"),
    )
    assert not set(seen) & set(unseen)


def test_weather_is_left_to_the_reward():
    for name in ("rainy", "snowy"):
        words = " ".join(prompts.get(f"chatgpt_custom_{name}")).lower().replace(".", "").split()
        assert not {"rain", "rainy", "snow", "snowy", "wet", "umbrella", "ice", "puddle"} & set(
            words
        )
    assert all("cat" in text and "dog" in text for text in prompts.get("chatgpt_custom_dog"))
    assert all("book" in text and "cup" in text for text in prompts.get("chatgpt_custom_book_cup"))


def test_an_unknown_name_says_which_there_are_and_the_nearest():
    with pytest.raises(
        FileNotFoundError,
        match=r"nearest is 'chatgpt_custom_animal.*one prompt per line.*simple_animals",
    ):
        prompts.get("chatgpt_custom_animals_sport")
    with pytest.raises(FileNotFoundError, match="no prompt file at missing.txt"):
        prompts.get("missing.txt")


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_as_editors_write_them(tmp_path, end):
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        end.join(
            ["\ufeffa red star ", "", " \t ", "\u3000", "ein grüner Käfer", "猫が歩く", ""]
        ).encode()
    )
    texts = prompts.get(str(path))
    expected = ["a red star", "ein grüner Käfer", "猫が歩く"]
    assert texts == expected and list(texts) == expected and len(texts) == 3
    assert [texts[i] for i in (0, 1, 2, -1)] == [*expected, expected[-1]]
    path.write_bytes(b"first\n\nlast without an end")
    assert prompts.get(path) == ["first", "last without an end"]


def test_only_line_endings_end_a_prompt(tmp_path):
    """`str.splitlines` would also split at these, which belong to a prompt."""
    path = tmp_path / "prompts.txt"
    path.write_text("a star\x0bon\x1ca\u2028plain\u0085field\n", encoding="utf-8")
    assert prompts.get(path) == ["a star\x0bon\x1ca\u2028plain\u0085field"]


def test_a_run_keeps_its_prompts_when_their_file_changes(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    texts = prompts.get(path)
    path.write_text("zero\none\ntwo\n")
    assert texts == ["one", "two"]
    texts.append("three")  # a list of the caller's own
    assert prompts.get(path) == ["zero", "one", "two"]


def test_prompts_with_more_than_their_text():
    star = Prompt("a red star", negative_prompt="blurry")
    assert str(star) == "a red star" and (star.negative_prompt, star.image) == ("blurry", None)
    assert prompts.get(star) == [star]
    assert prompts.get([star, "a blue circle"]) == [star, "a blue circle"]
    assert star == Prompt("a red star", "blurry") != Prompt("a red star")
    with pytest.raises(AttributeError):
        star.text = "other"
    with pytest.raises(ValueError, match="no prompts given"):
        prompts.get([Prompt(" ")])


def test_what_is_not_text_is_refused_with_its_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("eins\r\nzwei\r\n\r\nfünf".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text.* in line 4"):
        prompts.get(path)
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        prompts.get(path)
    with pytest.raises(ValueError, match="no prompts given"):
        prompts.get(["", " "])


def test_a_million_prompts_are_read_quickly(tmp_path):
    path = tmp_path / "large.txt"
    path.write_text("".join(f"a star for the {i:07d}th time\n" for i in range(1_000_000)))
    began = time.perf_counter()
    texts = prompts.get(path)
    assert time.perf_counter() - began < 20
    assert len(texts) == 1_000_000 and texts[123_456] == "a star for the 0123456th time"


# ------------------------------------------------------------------------------------------- nouns × activities


def test_nouns_and_activities_from_files(tmp_path):
    nouns, activities = tmp_path / "nouns.txt", tmp_path / "activities.txt"
    nouns.write_text("cat\nowl\n")
    activities.write_text("washing the dishes\nriding a bike\nplaying chess")
    texts = prompts.nouns_activities(nouns, activities)
    assert (
        len(texts) == 6
        and texts[0] == "a cat washing the dishes"
        and texts[-1] == "an owl playing chess"
    )
    assert list(texts[::4]) == ["a cat washing the dishes", "an owl riding a bike"]
    assert len(prompts.nouns_activities(nouns_file=nouns)) == 2 * 14


PHRASES = (
    "a cat, an owl, a horse, an ibex, an old dog, the moon, two dogs, an umbrella, an uncle, a unicorn, "
    "a European bison, a ewe, a ukulele, a user, a one-eyed dog, an unimpressed cat, an hour hand, "
    "an honest man, an emu, an usher"
)


@pytest.mark.parametrize("phrase", PHRASES.split(", "))
def test_articles(phrase):
    noun = phrase.removeprefix("a ").removeprefix("an ")
    assert with_article(noun) == with_article(phrase) == phrase


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.txt", '# my prompts\na red star\n"a cat, a dog"\n#\n'),
        ("a.csv", 'id,Prompt\n1,a red star\n2,"a cat, a dog"\n3,\n'),
        ("a.csv", 'caption,id\na red star,1\n"a cat, a dog",2\n'),
        ("a.tsv", "text\tid\na red star\t1\na cat, a dog\t2\n"),
        ("a.jsonl", '"a red star"\n{"prompt": "a cat, a dog", "id": 2}\n\n'),
        ("a.JSONL", '{"caption": "a red star"}\n{"text": "a cat, a dog"}\n'),
    ],
)
def test_files_of_other_forms(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert prompts.get(tmp_path / name) == ["a red star", "a cat, a dog"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "a red star\na cat\n", "it has none of the columns prompt, caption, text"),
        ("a.jsonl", '{"id": 1}\n', "cannot be read: 'prompt'"),
        ("a.jsonl", "a red star\n", "cannot be read: Expecting value"),
        ("a.jsonl", "[1]\n", r"\[1\] is not a prompt"),
        ("a.txt", "# nothing yet\n", "holds no prompt"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        prompts.get(tmp_path / name)
