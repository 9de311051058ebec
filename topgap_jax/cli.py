"""The command line: `topgap train | evaluate | explain | layers | compare | report | help`."""

import argparse
import difflib
import inspect
import os
import sys
from pathlib import Path

from topgap_jax.errors import UserError

EXAMPLES = """\
examples:
  topgap train --config configs/shapes.py --config.pool='top_gap(fraction=.14)' --workdir runs/shapes
  topgap evaluate --workdir runs/shapes --evaluators 'accuracy(), robust(pgd(linf(2/255)))'
  topgap evaluate --config configs/cifar10.py --weights resnet20_cifar10.safetensors
  topgap explain --workdir runs/shapes --images holiday/ --methods 'cam(), grad_cam("stage3")'
  topgap report runs/shapes
  topgap help top_gap

Any key of a config can be set: --config.epochs=4 --config.eps=4/255. Strings are calls: `topgap help` lists every name,
`topgap help NAME` explains one. A mistake is answered by one line and exit code 2.
"""


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake told in one line."""

    def error(self, message):
        raise UserError(f"{message}; see '{self.prog} --help'")


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 when done, 2 for a user's mistake, 130 or 143 when stopped by a signal."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments, overrides = _parse(argv)
        return COMMANDS[arguments.command](arguments, overrides) or 0
    except UserError as error:
        print(f"topgap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("topgap: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `topgap help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv):
    parser = Parser(
        prog="topgap",
        description="Train, attack and explain image classifiers that look at the right pixels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name, text):
        sub = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        return sub

    def model(sub, needed=True):
        group = sub.add_mutually_exclusive_group(required=needed)
        group.add_argument("--config", metavar="FILE", help="a config file, e.g. configs/cifar10.py")
        group.add_argument("--workdir", metavar="DIR", help="the folder of a run")
        sub.add_argument("--weights", metavar="FILE", help="with --config: .safetensors or .npz in PyTorch naming")
        sub.add_argument(
            "--checkpoint", choices=("best", "last"), default="best", help="with --workdir (default: best)"
        )
        devices(sub)

    def devices(sub):
        sub.add_argument("--devices", type=int, default=1, metavar="N", help="virtual devices of a CPU (default: 1)")

    train = command("train", "train a classifier from a config; run again, it goes on where it was")
    train.add_argument("--config", metavar="FILE", required=True, help="a config file, e.g. configs/shapes.py")
    train.add_argument("--workdir", metavar="DIR", required=True, help="where checkpoints, metrics and results go")
    train.add_argument("--no-evaluate", action="store_true", help="leave out the evaluators of the config at the end")
    devices(train)

    evaluate = command("evaluate", "run evaluators over a split and write evaluation.json")
    model(evaluate)
    evaluate.add_argument("--split", metavar="NAMES", help="splits, separated by commas (default: the config's test)")
    evaluate.add_argument("--evaluators", metavar="CALLS", help="e.g. 'accuracy(), robust(pgd(linf(8/255)))'")
    evaluate.add_argument("--batch", type=int, metavar="N", help="examples at a time (default: the config's batch)")

    explain = command("explain", "write contact sheets of explanations for a split or a folder of pictures")
    model(explain)
    explain.add_argument("--images", metavar="DIR", help="a folder of your own pictures instead of a split")
    explain.add_argument("--split", metavar="NAME", help="(default: the first of the config's test splits)")
    explain.add_argument(
        "--methods", metavar="CALLS", help="e.g. 'cam(), grad_cam(\"stage3\")' (default: the config's)"
    )
    explain.add_argument("--count", type=int, default=12, metavar="N", help="pictures on a sheet (default: 12)")
    explain.add_argument("--out", metavar="DIR", help="(default: DIR/sheets of the workdir, or sheets/)")

    layers = command("layers", "list the layers that can be read, tapped and explained")
    model(layers)

    compare = command("compare", "print the results of several runs side by side")
    compare.add_argument("workdirs", nargs="+", metavar="DIR")

    report = command("report", "write one self-contained HTML page about one or several runs")
    report.add_argument("workdirs", nargs="+", metavar="DIR")
    report.add_argument("--out", metavar="FILE", help="(default: report.html in the first run's folder)")

    help_ = command("help", "explain a name that configs may use, or list them all")
    help_.add_argument("name", nargs="?")

    arguments, rest = parser.parse_known_args(argv)
    return arguments, _overrides(rest, arguments)


def _overrides(rest, arguments):
    """`--config.key=value` and `--config.key value` among the arguments that argparse did not know."""
    pairs, words = [], iter(rest)
    for word in words:
        if not word.startswith("--config."):
            raise UserError(f"unknown argument '{word}'; see 'topgap {arguments.command} --help'")
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            value = next(words, None)
            if value is None:
                raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
        pairs.append((key, value))
    if pairs and not hasattr(arguments, "config"):
        raise UserError(f"--config.{pairs[0][0]} has no meaning for 'topgap {arguments.command}'")
    return pairs


def _configure(arguments):
    """Before the first array: memory, compilation cache, devices."""
    from topgap_jax.run.cpu import configure_cpu

    print(configure_cpu(devices=arguments.devices), file=sys.stderr)


def _setup(arguments, overrides):
    """The run that --config or --workdir (with --weights) means."""
    from topgap_jax.run import setup

    _configure(arguments)
    if arguments.workdir:
        if arguments.weights:
            raise UserError("--weights goes with --config; with --workdir the run's own checkpoint is used")
        return setup.from_workdir(arguments.workdir, overrides, checkpoint=arguments.checkpoint)
    return setup.from_weights(arguments.config, overrides, arguments.weights)


def _train(arguments, overrides):
    from topgap_jax.run import setup
    from topgap_jax.run.fit import Stopped, fit

    _configure(arguments)
    experiment = setup.experiment(arguments.config, overrides)
    try:
        fit(experiment.config, arguments.workdir, parts=setup.parts(experiment), file=arguments.config)
    except Stopped as stopped:
        print(f"topgap: {stopped}", file=sys.stderr)
        return 143
    if not arguments.no_evaluate and experiment.config.evaluators:
        loaded = setup.from_workdir(arguments.workdir, checkpoint="best")
        _show(setup.evaluate(loaded))
    return 0


def _evaluate(arguments, overrides):
    from topgap_jax.run import setup

    loaded = _setup(arguments, overrides)
    _show(setup.evaluate(loaded, splits=arguments.split, evaluators=arguments.evaluators, batch=arguments.batch))


def _explain(arguments, overrides):
    from topgap_jax.report.sheets import sheet
    from topgap_jax.run import setup

    loaded = _setup(arguments, overrides)
    pictures = setup.explain(
        loaded, images=arguments.images, split=arguments.split, methods=arguments.methods, count=arguments.count
    )
    out = Path(arguments.out or (Path(arguments.workdir, "sheets") if arguments.workdir else "sheets"))
    out.mkdir(parents=True, exist_ok=True)
    print(sheet(out / f"{pictures.title}.png", pictures.images, names=pictures.names, maps=pictures.maps,
                boxes=pictures.boxes, regions=pictures.regions, title=pictures.heading))  # fmt: skip


def _layers(arguments, overrides):
    import jax.numpy as jnp

    from topgap_jax.models import bind
    from topgap_jax.rewrite import layers

    loaded = _setup(arguments, overrides)
    images = jnp.zeros((1, *loaded.experiment.config.image_size, 3))
    found = layers(bind(loaded.experiment.model, loaded.variables), images)
    width = max(len(layer.name) for layer in found)
    for layer in found:
        note = (
            ""
            if layer.reachable and layer.calls == 1
            else f"  met {layer.calls} times"
            if layer.calls > 1
            else "  inside a loop"
        )
        print(f"{layer.name:{width}}  {' x '.join(map(str, layer.shape[1:])):>14}{note}")


def _compare(arguments, overrides):
    from topgap_jax.report.compare import compare

    print(compare([Path(folder) for folder in arguments.workdirs]))


def _report(arguments, overrides):
    from topgap_jax.report.page import report

    folders = [Path(folder) for folder in arguments.workdirs]
    print(report(folders, Path(arguments.out) if arguments.out else folders[0] / "report.html"))


def _help(arguments, overrides):
    from topgap_jax.build import signature
    from topgap_jax.run.config import ROOMS, TABLE

    name = arguments.name
    if name is None:
        for room, table in ROOMS.items():
            print(f"\n{room}")
            for key, function in table.items():
                print(f"  {key:18} {(inspect.getdoc(function) or '').splitlines()[0]}")
        print("\n'topgap help NAME' says more; 'topgap --help' lists the commands.")
        return
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, n=1)
        raise UserError(
            f"there is nothing named '{name}'; "
            + (f"did you mean '{near[0]}'? " if near else "")
            + "'topgap help' lists all names"
        )
    print(f"{signature(name, TABLE[name])}\n\n{inspect.getdoc(TABLE[name])}")


def _show(rows):
    from topgap_jax.report.compare import table

    print(table(rows))


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "explain": _explain,
    "layers": _layers,
    "compare": _compare,
    "report": _report,
    "help": _help,
}
