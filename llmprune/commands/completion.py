"""``llmprune completion SHELL``: what a shell needs to complete commands, options and their choices."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Words:
    """What a command takes.

    Attributes:
        text: what it does.
        options: option -> its choices; None for one that takes no value, empty for any value (a file, perhaps).
    """

    text: str
    options: Mapping[str, tuple[str, ...] | None]


def add(commands: Any, parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the command; ``parser`` gives the whole command line's."""
    text = "print what a shell needs to complete llmprune"
    completion = commands.add_parser(
        "completion",
        help=text,
        description=f"{text}: source <(llmprune completion bash); llmprune completion fish | source",
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=lambda options: print(script(options.shell, words_of(parser()))))


def known_values() -> dict[str, tuple[str, ...]]:
    """What options take that have names of llmprune's own for values."""
    from llmprune.checkpoints.checkpoint import FORMS
    from llmprune.experiments.experiments import EXPERIMENTS
    from llmprune.export.gguf import TYPES
    from llmprune.pipeline.iterative import SCHEDULES
    from llmprune.pipeline.prune import REPAIRS
    from llmprune.planning.allocation import ALLOCATIONS
    from llmprune.recovery.settings import METHODS
    from llmprune.scoring.importance import known
    from llmprune.scoring.sampling import AUTO

    return {
        "--allocation": ALLOCATIONS,
        "--experiment": tuple(EXPERIMENTS),
        "--form": FORMS,
        "--importance": (AUTO, *known()),
        "--method": METHODS,
        "--repair": REPAIRS,
        "--schedule": SCHEDULES,
        "--type": TYPES,
    }


def words_of(parser: argparse.ArgumentParser) -> dict[str, Words]:
    """The commands of a command line."""
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    texts = {action.dest: action.help or "" for action in commands._choices_actions}
    values = known_values()
    found = {}
    for name, command in commands.choices.items():
        options: dict[str, tuple[str, ...] | None] = {}
        for action in command._actions:
            for option in action.option_strings:
                if option.startswith("--"):
                    taken = tuple(map(str, action.choices or values.get(option, ())))
                    options[option] = None if action.nargs == 0 else taken
        found[name] = Words(texts[name], options)
    return found


def script(shell: str, commands: Mapping[str, Words]) -> str:
    """The script for one of :data:`SHELLS`."""
    return _fish(commands) if shell == "fish" else _bash(commands, zsh=shell == "zsh")


def _bash(commands: Mapping[str, Words], zsh: bool) -> str:
    lines = ["autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    lines += [
        "_llmprune() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
        "    COMPREPLY=()",
        '    if [ "$COMP_CWORD" -eq 1 ]; then',
        f'        COMPREPLY=($(compgen -W "{" ".join(commands)}" -- "$word"))',
        "        return",
        "    fi",
        '    case "${COMP_WORDS[1]} $before" in',
    ]
    for name, words in commands.items():
        for option, choices in words.options.items():
            if choices:
                lines.append(
                    f'    "{name} {option}") COMPREPLY=($(compgen -W "{" ".join(choices)}" -- "$word")); return ;;'
                )
    lines += ["    esac", '    case "$word" in -*) ;; *) return ;; esac', '    case "${COMP_WORDS[1]}" in']
    lines += [
        f'    {name}) COMPREPLY=($(compgen -W "{" ".join(words.options)}" -- "$word")) ;;'
        for name, words in commands.items()
    ]
    return "\n".join([*lines, "    esac", "}", "complete -o default -F _llmprune llmprune"])


def _fish(commands: Mapping[str, Words]) -> str:
    none = "not __fish_seen_subcommand_from " + " ".join(commands)
    lines = []
    for name, words in commands.items():
        lines.append(f"complete -c llmprune -n '{none}' -f -a {name} -d '{words.text}'")
        for option, choices in words.options.items():
            line = f"complete -c llmprune -n '__fish_seen_subcommand_from {name}' -l {option[2:]}"
            if choices is not None:
                line += f" -x -a '{' '.join(choices)}'" if choices else " -r"
            lines.append(line)
    return "\n".join(lines)
