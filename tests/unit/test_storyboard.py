"""Storyboards: one line, one clip."""

import pytest

from allegro_model.errors import TextError
from allegro_model.text import read_storyboard
from allegro_model.text.storyboard import MAX_CLIPS


def test_each_line_is_a_clip_and_all_is_added_to_each() -> None:
    text = "\ufeff# a remark\nALL: watercolour\n\n  a boat leaves, \r\nthe boat sails on\nall\uff1asoft light\n#all: nothing\n"
    assert read_storyboard(text) == ["a boat leaves, watercolour, soft light", "the boat sails on, watercolour, soft light"]


def test_words_that_only_look_like_all_are_a_prompt() -> None:
    assert read_storyboard("all the birds fly up") == ["all the birds fly up"]
    assert read_storyboard("all:\na bird") == ["a bird"]


@pytest.mark.parametrize("text", ["", "\n \n", "# only\nall: remarks"])
def test_a_storyboard_without_a_prompt_is_refused(text: str) -> None:
    with pytest.raises(TextError, match="one line per clip"):
        read_storyboard(text)


def test_there_is_a_limit() -> None:
    assert len(read_storyboard("a\n" * MAX_CLIPS)) == MAX_CLIPS
    with pytest.raises(TextError, match="Split it"):
        read_storyboard("a\n" * (MAX_CLIPS + 1))
