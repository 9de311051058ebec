"""What each command takes on the command line."""

import argparse
import os

from topgap_jax.cli import together

# `--workdir=~/runs` comes with its ~: a shell expands that at the start of a word only.
_path = os.path.expanduser


def add_model(parser):
    parser.add_argument("--workdir", type=_path, metavar="DIR", help="the folder of a run")
    add_config(
        parser, "a config file, e.g. configs/cifar10.py; with --workdir the Python file of the run's own methods"
    )
    parser.add_argument(
        "--weights",
        type=_path,
        metavar="FILE",
        help="with --config: a file of weights (.safetensors, .npz, .pth), or whatever config.init may be",
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), help="with --workdir (default: best)")
    add_devices(parser)


def add_config(parser, about, **options):
    parser.add_argument("--config", type=_path, metavar="FILE", action="append", help=about, **options)


def add_devices(parser):
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="virtual devices of a CPU (default: 1)")


def add_train(parser):
    about = "a config file, e.g. configs/shapes.py; after the config.json of a run the Python file of its own methods"
    add_config(parser, about, required=True)
    parser.add_argument("--workdir", type=_path, metavar="DIR", help="the folder of the run")
    parser.add_argument(
        "--arm", default="", metavar="NAME", help="one of the config's arms(): overrides that belong together"
    )
    parser.add_argument(
        "--plan",
        nargs="?",
        const="1x1",
        metavar="HOSTSxDEVICES",
        help="say what the training will need, by default on one device, and train nothing",
    )
    parser.add_argument("--no-evaluate", action="store_true", help="leave out the config's evaluators at the end")
    add_devices(parser)
    together.add_arguments(parser)


def add_evaluate(parser):
    add_model(parser)
    parser.add_argument("--split", metavar="NAMES", help="splits, separated by commas (default: config.test)")
    parser.add_argument("--evaluators", metavar="CALLS", help="separated by commas (default: config.evaluators)")
    parser.add_argument("--batch", type=int, metavar="N", help="examples at a time (default: config.batch)")
    parser.add_argument(
        "--save", type=_path, metavar="PATH", help="a folder for the adversarial images, or of one attack the .npz file"
    )
    parser.add_argument("--again", action="store_true", help="measure what evaluation.json has for these weights too")
    parser.add_argument(
        "--model-info",
        type=_path,
        metavar="FILE",
        help="write the model's JSON in RobustBench's form, for topgap verify",
    )
    together.add_arguments(parser)


def add_explain(parser):
    add_model(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--images", type=_path, metavar="PATH", help="a folder of your own pictures, or one picture")
    group.add_argument("--split", metavar="NAME", help="(default: the first of config.test)")
    parser.add_argument("--methods", metavar="CALLS", help="separated by commas (default: config.explain)")
    parser.add_argument(
        "--count", type=_number_or_all, default=12, metavar="N", help="pictures, evenly spaced, or all (default: 12)"
    )
    parser.add_argument(
        "--target",
        metavar="CLASS",
        help="the class to explain, by number or name, or runner_up (default: the prediction)",
    )
    parser.add_argument(
        "--out", type=_path, metavar="PATH", help="a folder or a .png file (default: sheets/, of a run in its folder)"
    )
    parser.add_argument("--overlays", type=_path, metavar="DIR", help="write every map over its picture as a file too")
    parser.add_argument("--save", type=_path, metavar="FILE", help="keep the maps in an .npz file")
    parser.add_argument("--channels", action="store_true", help="with --save: the values of every channel too")


def _number_or_all(text):
    """None stands for all."""
    try:
        return None if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"give a number or all, got '{text}'") from None


def add_runs(parser):
    parser.add_argument("workdirs", nargs="+", type=_path, metavar="DIR", help="the folder of a run")


def add_report(parser):
    add_runs(parser)
    parser.add_argument("--out", type=_path, metavar="FILE", help="(default: report.html in the first folder)")


def add_verify(parser):
    parser.add_argument("path", type=_path, metavar="FILE", help="a model's JSON, by topgap evaluate --model-info")
    parser.add_argument("--weights", type=_path, metavar="FILE", help="the weights (default: those that FILE names)")
    parser.add_argument("--data", metavar="CALL", help="the data set, such as folder('ROOT') (default: FILE's source)")
    # Not "config": that would take --config.key=value, and what is measured is the file's.
    parser.add_argument(
        "--config", type=_path, metavar="FILE", dest="file", help="the Python file of the methods that the config names"
    )
    add_devices(parser)


def add_help(parser):
    parser.add_argument(
        "name", nargs="?", help="a name that texts of a config may use, a command, or 'config' for the keys of a config"
    )
