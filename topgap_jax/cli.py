"""The command line: `topgap train | evaluate | explain | layers | compare | report | help`."""

import argparse
import errno
import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from topgap_jax import __version__
from topgap_jax.errors import UserError

CONFIG_HELP = """\
Any key of a config can be set on the command line: --config.epochs=4 --config.eps=4/255 --config.pool='top_gap(k=4)'.
`topgap help config` lists the keys, `topgap help` the names that texts may use, `topgap help NAME` explains one."""

MAIN_HELP = f"""\
examples:
  topgap train --config configs/shapes.py --config.pool='top_gap(fraction=.14)' --workdir runs/top_gap
  topgap evaluate --workdir runs/top_gap --evaluators 'robust(pgd(linf(2/255)))'
  topgap explain --workdir runs/top_gap --images holiday/
  topgap report runs/gap runs/top_gap

{CONFIG_HELP}
`topgap help COMMAND` says more. A mistake is answered by one line and exit code 2.
"""

TRAIN_HELP = f"""\
The folder holds the config, checkpoints, metrics.jsonl (and the same for TensorBoard) and the results. The same
command, given again, goes on where a run was stopped (SIGTERM and Ctrl-C save first) and ends with the same weights,
bit for bit.

examples:
  topgap train --config configs/shapes.py --workdir runs/gap
  topgap train --config configs/shapes.py --config.pool='top_gap(fraction=.14)' --config.seed=1 --workdir runs/top_gap
  topgap train --config configs/shapes.py --config.drop='sgdrop(rate=.1)' --workdir runs/sgdrop
  topgap train --config configs/sgdrop.py --arm random_matched --workdir runs/random
  topgap train --config runs/gap/config.json --workdir runs/again

{CONFIG_HELP}
"""

EVALUATE_HELP = """\
Of a run it takes the best checkpoint and adds to its evaluation.json; a row of the same split and
evaluator is replaced. Of a weights file in PyTorch naming it prints the table. A keyword such as eps in an evaluator is
a number of the config.

examples:
  topgap evaluate --workdir runs/gap
  topgap evaluate --workdir runs/gap --split 'test[:200]' --evaluators 'accuracy(), robust(pgd(linf(eps), steps=20))'
  topgap evaluate --config configs/cifar10.py --weights resnet20_cifar10.safetensors
"""

EXPLAIN_HELP = """\
Each picture stands beside the maps of its predicted class; true boxes and regions are drawn where
the data set has them.

examples:
  topgap explain --workdir runs/gap
  topgap explain --workdir runs/gap --images holiday/ --methods 'cam(), grad_cam("stage3")' --count 20
"""

LAYERS_HELP = """\
A layer is given to a method by its name or by any end of it that is unique: grad_cam("stage3"), field("stage3/block0").

example:
  topgap layers --config configs/shapes.py --config.image_size='(128, 128)'
"""

REPORT_HELP = """\
example:
  topgap report runs/gap runs/top_gap --out runs/report.html
"""


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line."""

    def error(self, message):
        raise UserError(f"{message}; see '{self.prog} --help'")


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when done, 2 for a user's mistake, 130 or 143 when stopped by a signal."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal or pipe that cannot show a letter gets a ? in its place
            stream.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments, overrides = _parse(argv or ["--help"])
        return COMMANDS[arguments.command].run(arguments, overrides) or 0
    except UserError as error:
        print(f"topgap: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `topgap help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f", writing '{error.filename}'" if error.filename else ""
        print(f"topgap: {error.strerror}{where}; make room, then give the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("topgap: stopped", file=sys.stderr)
        return 130


def _parse(argv):
    """(arguments, the --config.key=value among them as pairs)."""
    parser, _ = _parsers()
    arguments, rest = parser.parse_known_args(argv)
    return arguments, _overrides(rest, arguments)


def _parsers():
    """The parser of the command line, and the one of each command by its name."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    about = "Train, attack and explain image classifiers that look at the right pixels."
    parser = Parser(prog="topgap", description=about, epilog=MAIN_HELP, **options)
    parser.add_argument("--version", action="version", version=f"topgap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        description = command.about[0].upper() + command.about[1:] + "."
        command.add(
            commands.add_parser(name, help=command.about, description=description, epilog=command.more, **options)
        )
    return parser, commands.choices


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


# `--workdir=~/runs` comes with its ~: a shell expands that at the start of a word only.
_path = os.path.expanduser


def _add_model(parser):
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--workdir", type=_path, metavar="DIR", help="the folder of a run")
    group.add_argument("--config", type=_path, metavar="FILE", help="a config file, e.g. configs/cifar10.py")
    parser.add_argument(
        "--weights", type=_path, metavar="FILE", help="with --config: .safetensors or .npz in PyTorch naming"
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), help="with --workdir (default: best)")
    _add_devices(parser)


def _add_devices(parser):
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="virtual devices of a CPU (default: 1)")


def _add_train(parser):
    parser.add_argument(
        "--config", type=_path, metavar="FILE", required=True, help="a config file, e.g. configs/shapes.py"
    )
    parser.add_argument("--workdir", type=_path, metavar="DIR", required=True, help="the folder of the run")
    parser.add_argument(
        "--arm", default="", metavar="NAME", help="one of the config's arms(): overrides that belong together"
    )
    parser.add_argument("--no-evaluate", action="store_true", help="leave out the config's evaluators at the end")
    _add_devices(parser)


def _add_evaluate(parser):
    _add_model(parser)
    parser.add_argument("--split", metavar="NAMES", help="splits, separated by commas (default: config.test)")
    parser.add_argument("--evaluators", metavar="CALLS", help="separated by commas (default: config.evaluators)")
    parser.add_argument("--batch", type=int, metavar="N", help="examples at a time (default: config.batch)")


def _add_explain(parser):
    _add_model(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--images", type=_path, metavar="DIR", help="a folder of your own pictures, or one picture")
    group.add_argument("--split", metavar="NAME", help="(default: the first of config.test)")
    parser.add_argument("--methods", metavar="CALLS", help="separated by commas (default: config.explain)")
    parser.add_argument("--count", type=int, default=12, metavar="N", help="pictures, evenly spaced (default: 12)")
    parser.add_argument("--out", type=_path, metavar="DIR", help="(default: sheets/, of a run in its folder)")


def _add_runs(parser):
    parser.add_argument("workdirs", nargs="+", type=_path, metavar="DIR", help="the folder of a run")


def _add_report(parser):
    _add_runs(parser)
    parser.add_argument("--out", type=_path, metavar="FILE", help="(default: report.html in the first folder)")


def _add_help(parser):
    parser.add_argument(
        "name", nargs="?", help="a name that texts of a config may use, a command, or 'config' for the keys of a config"
    )


def _configure(arguments):
    """Before the first array: memory, compilation cache, devices."""
    import jax

    from topgap_jax.run.cpu import configure_cpu

    done = configure_cpu(devices=arguments.devices)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # a platform that is not there, or that has no device
        platforms = jax.config.jax_platforms
        reason = str(error) or "no such device"
        raise UserError(
            f"JAX_PLATFORMS={platforms}: JAX cannot use it here ({reason}); unset JAX_PLATFORMS, or set it to cpu"
        ) from error
    return done


def _loaded(arguments, overrides):
    """The model that --workdir, or --config with --weights, means."""
    from topgap_jax import setup

    _check_model(arguments)
    if arguments.config and not arguments.weights:
        raise UserError(
            "--config needs --weights FILE: a config alone has no trained weights (of a run, give --workdir)"
        )
    _configure(arguments)
    if arguments.workdir:
        return setup.from_workdir(arguments.workdir, overrides, checkpoint_name=arguments.checkpoint or "best")
    return setup.from_weights(arguments.config, overrides, arguments.weights)


def _check_model(arguments):
    if arguments.workdir and arguments.weights:
        raise UserError("--weights goes with --config; with --workdir the run's own checkpoint is used")
    if arguments.config and arguments.checkpoint:
        raise UserError("--checkpoint goes with --workdir; with --config the weights come from --weights")


def _train(arguments, overrides):
    from topgap_jax import engine, setup
    from topgap_jax.measure import results
    from topgap_jax.run import workdir
    from topgap_jax.run.fit import Stopped, fit

    print(_configure(arguments), engine.status(), sep="; ", file=sys.stderr)
    experiment = setup.experiment(arguments.config, overrides, arguments.arm)
    workdir.check(arguments.workdir, experiment.config)
    evaluates = experiment.config.evaluators and experiment.config.test and not arguments.no_evaluate
    if evaluates:
        results.read(Path(arguments.workdir) / results.FILE)  # a damaged one is told before the training
    try:
        fit(experiment.config, arguments.workdir, parts=setup.parts(experiment), file=experiment.file)
    except Stopped as stopped:
        print(f"topgap: {stopped}", file=sys.stderr)
        return 143
    if evaluates:
        loaded = setup.restored(experiment, arguments.workdir)
        _show(loaded, setup.stored(loaded) or setup.evaluate(loaded))
    return 0


def _evaluate(arguments, overrides):
    from topgap_jax import setup

    loaded = _loaded(arguments, overrides)
    rows = setup.evaluate(loaded, splits=arguments.split, evaluators=arguments.evaluators, batch=arguments.batch)
    _show(loaded, rows)


def _explain(arguments, overrides):
    from topgap_jax import setup
    from topgap_jax.report.sheets import sheet

    loaded = _loaded(arguments, overrides)
    pictures = setup.explain(
        loaded, images=arguments.images, split=arguments.split, methods=arguments.methods, count=arguments.count
    )
    out = Path(arguments.out or (Path(arguments.workdir, "sheets") if arguments.workdir else "sheets"))
    try:
        path = sheet(out / f"{pictures.title}.png", pictures.images, names=pictures.names, maps=pictures.maps,
                     boxes=pictures.boxes, regions=pictures.regions, title=pictures.heading)  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot write in '{out}': {error.strerror}") from None
    print(f"{path}: {len(pictures.images)} of {pictures.total} pictures")


def _layers(arguments, overrides):
    from topgap_jax import setup
    from topgap_jax.report.compare import aligned

    _check_model(arguments)
    _configure(arguments)
    if arguments.weights:
        experiment = setup.from_weights(arguments.config, overrides, arguments.weights).experiment
    elif arguments.workdir:
        experiment = setup.from_workdir(arguments.workdir, overrides).experiment
    else:
        experiment = setup.experiment(arguments.config, overrides)
    found, default = setup.layers(experiment)
    rows = [["layer", "shape", ""]]
    for layer in found:
        notes = ["the default of grad_cam()"] if layer.name == default else []
        notes += [f"met {layer.calls} times"] if layer.calls > 1 else []
        notes += ["inside a loop: out of reach"] if not layer.reachable else []
        rows.append([layer.name, " x ".join(map(str, layer.shape[1:])), ", ".join(notes)])
    print(aligned(rows, right=[1]))


def _compare(arguments, overrides):
    from topgap_jax.report.compare import compare

    print(compare([Path(folder) for folder in arguments.workdirs]))


def _report(arguments, overrides):
    from topgap_jax.report.page import report

    folders = [Path(folder) for folder in arguments.workdirs]
    print(report(folders, Path(arguments.out) if arguments.out else folders[0] / "report.html"))


def _help(arguments, overrides):
    name = arguments.name
    if name in COMMANDS:
        _parsers()[1][name].print_help()
    from topgap_jax.build import did_you_mean, signature
    from topgap_jax.setup.tables import NAMED, PYTHON, ROOMS, TABLE, VALUES

    functions = {**TABLE, **{key: value for table in PYTHON.values() for key, value in table.items()}}
    if name is None:
        named = {f"{room}, named without a call": table for room, table in NAMED.items()}
        python = {f"in Python, {room}": table for room, table in PYTHON.items()}
        for room, table in {**ROOMS, **named, **python}.items():
            print(f"\n{room}\n{_listing({key: _doc(value) for key, value in table.items()})}")
        print("\n'topgap help NAME' says more, 'topgap help config' lists the keys, 'topgap --help' the commands.")
    elif name == "config":
        print(_config_help())
    elif name in functions or name in VALUES:
        shown = signature(name, functions[name]) if name in functions else name
        value = functions.get(name, VALUES.get(name))
        print(f"{shown}\n\n{_doc(value)}" if name not in COMMANDS else f"\nIn Python:\n\n{shown}\n\n{_doc(value)}")
    elif name not in COMMANDS:
        hint = did_you_mean(name, [*functions, *VALUES, *COMMANDS], n=1)
        raise UserError(f"there is nothing named '{name}'; {hint}'topgap help' lists all names")


def _config_help():
    from topgap_jax.setup.config import KEYS

    def about(key):
        default = "must be stated" if key.default is None else f"default {key.default!r}"
        return f"{key.kind}: {key.about}{f' ({key.role.room})' if key.role else ''}; {default}"

    return f"""\
A config has these keys, and any number of your own. A key is a name in the expressions of the others: a number, a tuple
or a plain text as it is, an expression as what it builds.

{_listing({key: about(value) for key, value in KEYS.items()}, whole=True)}"""


def _doc(value):
    """The docstring of a function; of a dict of rules, those of its functions."""
    if not isinstance(value, Mapping):
        return inspect.getdoc(value)
    return "\n".join(
        f"{operation} {when}: {inspect.getdoc(function)}"
        for operation, rule in value.items()
        for when, function in rule._asdict().items()
        if function
    )


def _listing(about, whole=False):
    """Names and the first paragraph of their docstrings, as wide as the terminal: one line each, or all of it."""
    width, columns = max(map(len, about)), shutil.get_terminal_size((120, 24)).columns
    room = max(columns - width - 4, 40)

    def lines(text):
        text = (text or "").split("\n\n")[0]
        return textwrap.wrap(text, room) if whole else [textwrap.shorten(text, room, placeholder=" ...")]

    indent = "\n" + " " * (width + 4)
    return "\n".join(f"  {name:{width}}  {indent.join(lines(text))}" for name, text in about.items())


def _show(loaded, rows):
    from topgap_jax.report.compare import table
    from topgap_jax.report.read import with_gaps

    config = loaded.experiment.config
    print(f"{config.source}, {loaded.weights}\n")
    print(table(with_gaps(rows, config.train)))


class Command(NamedTuple):
    """A command: what it does, how its arguments are added to a parser, what runs it, and the end of its help."""

    about: str
    add: Callable
    run: Callable
    more: str = ""


COMMANDS = {
    "train": Command("train a classifier from a config, and evaluate it", _add_train, _train, TRAIN_HELP),
    "evaluate": Command("run evaluators over splits", _add_evaluate, _evaluate, EVALUATE_HELP),
    "explain": Command(
        "draw where the network looks, on a split or your own pictures", _add_explain, _explain, EXPLAIN_HELP
    ),
    "layers": Command("list the layers that methods may name", _add_model, _layers, LAYERS_HELP),
    "compare": Command("print the results of several runs side by side", _add_runs, _compare),
    "report": Command(
        "write one self-contained HTML page about one or several runs", _add_report, _report, REPORT_HELP
    ),
    "help": Command("explain a name that configs may use, or list them all", _add_help, _help),
}
