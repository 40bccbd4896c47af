"""Fills ``docs/cli.md`` with what ``llmprune COMMAND --help`` prints, so that the page cannot grow old."""

from __future__ import annotations

import argparse
import os

os.environ["COLUMNS"] = "100"  # what argparse formats to

from llmprune.cli import _parser

MARK = "<!-- every command's help -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    """The page with its mark replaced (mkdocs calls this for every page)."""
    if MARK not in markdown:
        return markdown
    parser = _parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parts = [f"```text\n{parser.format_help()}```\n"]
    for name, command in commands.choices.items():
        parts.append(f"## llmprune {name}\n\n```text\n{command.format_help()}```\n")
    return markdown.replace(MARK, "\n".join(parts))
