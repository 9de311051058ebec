"""What README shows is run as it stands there."""

import re
import shlex
from pathlib import Path

from topgap_jax import cli
from topgap_jax.setup.tables import TABLE

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs(capsys):
    example = next(code for language, code in BLOCKS if language == "python" and "import topgap_jax as tg" in code)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "(2, 16, 16)" in printed and "backbone/stem/conv" in printed and "convolution" in printed


def test_every_command_line_parses():
    commands = [
        line
        for language, code in BLOCKS
        if language == "bash"
        for line in code.splitlines()
        if line.startswith("topgap")
    ]
    assert len(commands) >= 7
    for line in commands:
        assert len(line) <= 120
        arguments, _ = cli._parse(shlex.split(line)[1:])
        assert arguments.command in cli.COMMANDS


def test_every_named_method_exists():
    named = set(re.findall(r"`topgap help (\w+)`", README)) | set(re.findall(r"topgap help\s+(\w+)", README))
    assert named - {"NAME"} <= set(TABLE), named
