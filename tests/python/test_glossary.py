"""The glossary knows every public name and every command, and none that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import llmprune
from llmprune.cli import _parser

TEXT = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text()
NAMES, COMMANDS = TEXT.partition("## Every public name")[2].split("\nCommands (")


def test_every_public_name_has_an_entry_and_only_these() -> None:
    assert set(re.findall(r"`(\w+)`", NAMES)) == set(llmprune.__all__)


def test_every_command_has_an_entry_and_only_these() -> None:
    parser = _parser()
    (commands,) = [action for action in parser._actions if action.dest == "command"]
    assert commands.choices is not None
    assert set(re.findall(r"`(\w+)`", COMMANDS)) == set(commands.choices)
