"""``llmprune export``: a checkpoint folder for other runtimes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from llmprune.commands.common import path_argument, print_json


def register(commands: Any) -> None:
    """Add the command."""
    text = "write a model for another runtime: GGUF for llama.cpp"
    parser: argparse.ArgumentParser = commands.add_parser("export", help=text, description=text)
    parser.add_argument(
        "model", type=path_argument, metavar="MODEL_DIR", help="folder of a model, pruned or not"
    )
    parser.add_argument("--gguf", type=path_argument, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--type", default="f16", help="of the matrices: f32, f16 or q8_0 (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Do what the options say."""
    from llmprune.export.gguf import export_gguf

    done = export_gguf(options.model, options.gguf, options.type, options.overwrite)
    if options.json:
        print_json(asdict(done))
    else:
        print(done)
