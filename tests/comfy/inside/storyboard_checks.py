"""Checks of storyboards that need ComfyUI's Python objects; see checks.py."""

from bootstrap import Host
from checks import raises


def check_storyboard_gives_one_prompt_or_all(h: Host) -> None:
    node = h.nodes["AllegroStoryboard"]
    text = "# remark\nall: at dawn\na boat\na storm"
    assert node.execute(storyboard=text, clip=2).args == ("a storm, at dawn", ["a boat, at dawn", "a storm, at dawn"], 2)
    raises("TextError", "Choose one from 1 to 2", lambda: node.execute(storyboard=text, clip=3))
    assert "from 1 to 2" in node.validate_inputs(storyboard=text, clip=3)
    assert "one line per clip" in node.validate_inputs(storyboard="# nothing", clip=1)
    assert node.validate_inputs(storyboard=None, clip=3) is True  # linked: its value is not known yet
