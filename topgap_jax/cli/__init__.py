"""The command line: `topgap train | evaluate | explain | layers | compare | report | verify | help`."""

import argparse
import sys
import traceback
import warnings

from topgap_jax import __version__
from topgap_jax.cli import endings, texts, together
from topgap_jax.cli.commands import COMMANDS
from topgap_jax.errors import UserError

PICTURES = r"PIL\."
"""Whose warnings are not shown: of odd pictures, which are read or refused in a line."""


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line."""

    def error(self, message):
        raise UserError(f"{message}; see '{self.prog} --help'")


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when done, 1 where numbers are not confirmed or some pictures not readable, 2 for a user's
    mistake and for what could not be read or written, 3 where another process of a run is gone, 129, 130 or 143 when
    stopped by SIGHUP, Ctrl-C or SIGTERM."""
    warnings.filterwarnings("ignore", module=PICTURES)
    with endings.by_signal():
        try:
            code = _main(argv)
        except SystemExit as end:  # of argparse, after --help
            raise SystemExit(endings.after_output(end.code or 0)) from None
        return endings.after_output(code)


def _main(argv):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal or pipe that cannot show a letter gets a ? in its place
            stream.reconfigure(errors="replace")
    argv = list(sys.argv[1:] if argv is None else argv)
    shows_traceback = "--traceback" in argv
    argv = [word for word in argv if word != "--traceback"]
    try:
        arguments, overrides = _parse(argv or ["--help"])
        command = lambda: COMMANDS[arguments.command].run(arguments, overrides) or 0
        return together.run(arguments, overrides, command) if together.place(arguments) else command()
    except UserError as error:
        if shows_traceback:
            traceback.print_exc()
        more = " (--traceback shows where)" if error.__cause__ is not None and not shows_traceback else ""
        print(f"topgap: {texts.line(error)}{more}", file=sys.stderr)
        return 2
    except OSError as error:
        line = endings.line(error)
        if not line or shows_traceback:
            raise
        print(f"topgap: {texts.line(line)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("topgap: stopped", file=sys.stderr)
        return 130
    except endings.Signalled as signalled:
        print(f"topgap: stopped by {signalled}", file=sys.stderr)
        return signalled.code


def _parse(argv):
    """(arguments, the --config.key=value among them as pairs)."""
    for word in argv:
        if "\0" in word:
            raise UserError(f"the argument '{word}' holds a character NUL, which no path and no text may")
    arguments, rest = _parser().parse_known_args(argv)
    if hasattr(arguments, "config"):
        _divide_configs(arguments)
    return arguments, _overrides(rest, arguments)


def _divide_configs(arguments):
    """`config`, where the values are from, and `file`, the Python file of a run's own methods, from all --config."""
    files = arguments.config or []
    run = arguments.command != "train" and arguments.workdir
    if not files and not run:
        raise UserError(f"--workdir DIR or --config FILE is required; see 'topgap {arguments.command} --help'")
    if len(files) > (1 if run else 2):
        raise UserError(
            "--config is given once; a second one is the Python file of a run's own methods, beside the config.json of "
            "the run or its --workdir"
        )
    arguments.config, arguments.file = [None, *files, None][:2] if run else [*files, None][:2]


def _parser():
    """The parser of the command line, with one of each command; `help` is given these."""
    words = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    about = "Train, attack and explain image classifiers that look at the right pixels."
    parser = Parser(prog="topgap", description=about, epilog=texts.MAIN, **words)
    parser.add_argument("--version", action="version", version=f"topgap {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        description = command.about[0].upper() + command.about[1:] + "."
        command.add(parsers.add_parser(name, help=command.about, description=description, epilog=command.more, **words))
    parsers.choices["help"].set_defaults(parsers=parsers.choices)
    return parser


def _overrides(rest, arguments):
    """`--config.key=value` and `--config.key value` among the arguments that argparse did not know."""
    pairs, words = [], iter(rest)
    for word in words:
        if not word.startswith("--config."):
            raise UserError(f"unknown argument '{word}'; see 'topgap {arguments.command} --help'")
        if not hasattr(arguments, "config"):
            raise UserError(f"{word.partition('=')[0]} has no meaning for 'topgap {arguments.command}'")
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
        pairs.append((key, value))
    return pairs
