"""Prompt sets read well, and files of any size are never in memory."""

import pickle
import tracemalloc

import pytest

from vader_nb import prompts
from vader_nb.prompts.lazy import with_article

VADERS = ["hps_custom", "nouns_activities", "simple_animals", "chatgpt_custom"] + [
    f"chatgpt_custom_{kind}"
    for kind in (
        *("instruments", "instruments_unseen", "human", "human_activity", "actpred"),
        *(
            "animal",
            "animal_sport",
            "animal_clothes",
            "animal_technology",
            "animal_housework",
            "animal_action",
        ),
        *("outdoor", "rainy", "snowy", "dog", "forest", "book_cup", "ice", "cute"),
    )
]


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
        match=r"nearest is 'chatgpt_custom_animal.*one prompt a line.*simple_animals",
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


def test_a_slice_is_a_view(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(100)))
    texts, expected = prompts.get(path), [f"prompt {i}" for i in range(100)]
    for cut in (
        slice(10),
        slice(None, None, 7),
        slice(-3, None),
        slice(None, None, -1),
        slice(50, 40),
    ):
        assert texts[cut] == expected[cut]
        assert list(texts[cut][::2]) == expected[cut][::2]
    assert (
        texts[10:20][-1] == "prompt 19" and "prompt 42" in texts and texts.index("prompt 42") == 42
    )
    with pytest.raises(IndexError, match="prompt 100 of 100"):
        texts[100]
    assert texts != expected[:99] and texts != "prompt"
    assert prompts.get(texts[:5]) == expected[:5]
    assert "prompt 0" in repr(texts) and repr(texts[:0]) == "<0 prompts>"


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


def test_a_file_that_changed_under_a_run_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    texts = prompts.get("prompts.txt")
    again = pickle.loads(pickle.dumps(texts))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert again == ["one", "two"] == texts
    path.write_text("zero\none\ntwo\n")
    for use in (lambda: texts[1], lambda: list(texts), lambda: again[0]):
        with pytest.raises(RuntimeError, match="8 bytes then, 13 now"):
            use()


def test_fifty_megabytes_stay_on_disk(tmp_path):
    path, line = (
        tmp_path / "large.txt",
        "a very long story about a red star, told for the {:07d}th time " + "and on " * 20,
    )
    with path.open("w") as file:
        for i in range(250_000):
            file.write(line.format(i) + "\n")
    assert path.stat().st_size > 50e6
    tracemalloc.start()
    try:
        texts = prompts.get(path)
        assert len(texts) == 250_000
        for i in (0, 249_999, 123_456):
            assert texts[i] == line.format(i).strip()
        assert any(text.strip() for text in texts) and len(texts[::1000]) == 250
        assert (
            tracemalloc.get_traced_memory()[1] < 8e6
        )  # 2 MB of line starts, and an array grows in leaps
    finally:
        tracemalloc.stop()


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


@pytest.mark.parametrize(
    "phrase",
    [
        *(
            "a cat",
            "an owl",
            "a horse",
            "an ibex",
            "an old dog",
            "the moon",
            "two dogs",
            "an umbrella",
            "an uncle",
        ),
        *(
            "a unicorn",
            "a European bison",
            "a ewe",
            "a ukulele",
            "a user",
            "a one-eyed dog",
            "an unimpressed cat",
        ),
        *("an hour hand", "an honest man", "an emu", "an usher"),
    ],
)
def test_articles(phrase):
    noun = phrase.removeprefix("a ").removeprefix("an ")
    assert with_article(noun) == with_article(phrase) == phrase
