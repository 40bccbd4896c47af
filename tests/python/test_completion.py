"""The words that shells complete are those that the command line takes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from llmprune.cli import EXAMPLES, _parser, main
from llmprune.commands.completion import script, words_of


def completed(words: list[str], place: Path) -> list[str]:
    """What bash offers for the last of some words."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    file = place / "completion.sh"
    file.write_text(script("bash", words_of(_parser())))
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"source {file}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _llmprune; "
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run([bash, "--norc", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_options_and_choices(tmp_path: Path) -> None:
    assert completed(["llmprune", "re"], tmp_path) == ["recover", "report", "reproduce"]
    assert completed(["llmprune", "prune", "m", "--repair-"], tmp_path) == ["--repair-calibration"]
    assert "--memory-budget" in completed(["llmprune", "score", "m", "--mem"], tmp_path)
    assert completed(["llmprune", "completion", ""], tmp_path) == []
    kinds = completed(["llmprune", "prune", "m", "--schedule", ""], tmp_path)
    assert kinds == ["linear", "cubic"]
    assert completed(["llmprune", "score", "m", "--importance", "ele"], tmp_path) == ["element1", "element2"]
    assert completed(["llmprune", "prune", "demo"], tmp_path) == []  # files are the shell's own


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_option_of_every_command_is_there(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for name, words in words_of(_parser()).items():
        assert name in text
        for option in words.options:
            assert (option[2:] if shell == "fish" else option) in text, (name, option)
    if shell != "fish" and shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_the_help_fits_on_a_screen_and_every_command_has_an_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 80
    commands = words_of(_parser())
    assert set(EXAMPLES) == set(commands)
    for name, example in EXAMPLES.items():
        for option in (word for word in example.split() if word.startswith("--")):
            assert option in commands[name].options, (name, option)
