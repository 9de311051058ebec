"""What the command line says of itself: the end of each command's help, and `topgap help`."""

import inspect
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from topgap_jax.errors import UserError, printable

CONFIG = """\
Any key of a config can be set on the command line: --config.epochs=4 --config.eps=4/255 --config.pool='top_gap(k=4)'.
`topgap help config` lists the keys, `topgap help` the names that texts may use, `topgap help NAME` explains one."""

MAIN = f"""\
examples:
  topgap train --config configs/shapes.py --config.pool='top_gap(fraction=.14)' --workdir runs/top_gap
  topgap evaluate --workdir runs/top_gap --evaluators 'robust(pgd(linf(2/255)))'
  topgap explain --workdir runs/top_gap --images holiday/
  topgap report runs/gap runs/top_gap

{CONFIG}
`topgap help COMMAND` says more. A mistake is answered by one line and exit code 2; with
--traceback, what a network of your own raised is shown in full.
"""

METHODS = """\
The Python file of a run with methods of its own is run only if it is named: --workdir runs/mine --config mine.py.
"""

TRAIN = f"""\
The folder holds the config, checkpoints, metrics.jsonl (and the same for TensorBoard) and the results. The same
command, given again, goes on where a run was stopped (SIGTERM, SIGHUP and Ctrl-C save first) and ends with the same
weights, bit for bit. --plan says what a training will need, on hosts and devices that need not be here.

examples:
  topgap train --config configs/shapes.py --workdir runs/gap
  topgap train --config configs/shapes.py --config.pool='top_gap(fraction=.14)' --config.seed=1 --workdir runs/top_gap
  topgap train --config configs/shapes.py --config.drop='sgdrop(rate=.1)' --workdir runs/sgdrop
  topgap train --config configs/sgdrop.py --arm random_matched --workdir runs/random
  topgap train --config runs/gap/config.json --workdir runs/again
  topgap train --config configs/cifar10.py --plan 4x8

{CONFIG}
"""

EVALUATE = f"""\
Of a run it takes the best checkpoint and adds to its evaluation.json; rows that are there for the same weights, split
and evaluator are kept, and measured once more with --again; those of other weights (--checkpoint last) wait in a file
beside it, evaluation-*.json, until that checkpoint is evaluated again. Of --weights (a file of PyTorch's names and
layout or of the module's own, another run, or the name of a published network) it prints the table; a config that names
them as config.init needs none. A keyword such as eps in an evaluator is a number of the config. What was stopped goes
on where it was, given the same command (of --weights only an attack with --save: its verdicts lie beside the images).

examples:
  topgap evaluate --workdir runs/gap
  topgap evaluate --workdir runs/gap --split 'test[:200]' --evaluators 'accuracy(), robust(pgd(linf(eps), steps=20))'
  topgap evaluate --workdir runs/gap --evaluators 'robust(autoattack(linf(eps))), audit(linf(eps))'
  topgap evaluate --config configs/cifar10.py --weights resnet20_cifar10.safetensors
  topgap evaluate --workdir runs/gap --evaluators 'curve(pgd(linf(eps)), eps=(1/255, 2/255, 4/255))' --save attacked/
  topgap evaluate --config configs/imagenet.py
  topgap evaluate --workdir runs/gap --split test --evaluators 'robust(autoattack(linf(eps)))' --model-info gap.json

--model-info writes RobustBench's keys; name, authors, link, venue, ... are yours to fill in, and stay when it is
written again.

{METHODS}"""

EXPLAIN = f"""\
Each picture stands beside the maps of its predicted class, or of --target; true boxes and regions are drawn where
the data set has them. Your own pictures need no training data: a run knows the names of its classes. A picture that
cannot be read is said and left out, and the exit code is 1. Twelve pictures are a page; memory is that of one page.

examples:
  topgap explain --workdir runs/gap
  topgap explain --config configs/imagenet.py --images holiday/
  topgap explain --workdir runs/gap --images holiday/ --methods 'cam(), grad_cam("stage3")' --count all
  topgap explain --workdir runs/gap --target runner_up --methods 'integrated(reduce="sum")' --save maps.npz

{METHODS}"""

LAYERS = """\
A layer is given to a method by its name or by any end of it that is unique: grad_cam("stage3"), field("stage3/block0").

example:
  topgap layers --config configs/shapes.py --config.image_size='(128, 128)'
"""

REPORT = """\
example:
  topgap report runs/gap runs/top_gap --out runs/report.html
"""


VERIFY = """\
The config, the weights and the evaluators are those that FILE names; paths in it are relative to it, or to TOPGAP_DATA.
256 images, evenly spaced in its split, are attacked again with the random draws that they had. Exit code 0 if what they
contribute now agrees with what FILE says of each of them, 1 if not: images that differ may lie on either side, but not
on one alone (two-sided sign test, 5 %). Nothing that FILE names is run; a Python file only by --config.

examples:
  topgap evaluate --workdir runs/gap --split test --evaluators 'robust(autoattack(linf(eps)))' --model-info gap.json
  topgap verify gap.json
  topgap verify gap.json --weights gap.safetensors --data "folder('pictures')"
"""


def about(name: str | None, commands: Sequence[str]) -> str:
    """What `topgap help NAME` says: of None all names, of "config" its keys, of a command what Python calls so."""
    from topgap_jax.build import did_you_mean, signature
    from topgap_jax.setup.tables import PYTHON, TABLE, VALUES

    functions = {**TABLE, **{key: value for table in PYTHON.values() for key, value in table.items()}}
    if name is None:
        return _everything()
    if name == "config":
        return _config()
    if name in functions or name in VALUES:
        shown = signature(name, functions[name]) if name in functions else name
        text = f"{shown}\n\n{_doc(name, functions.get(name, VALUES.get(name)))}"
        return text if name not in commands else f"\nIn Python:\n\n{text}"
    if name in commands:
        return ""
    hint = did_you_mean(name, [*functions, *VALUES, *commands], n=1)
    raise UserError(f"there is nothing named '{name}'; {hint}'topgap help' lists all names")


def _everything() -> str:
    from topgap_jax.setup.tables import NAMED, PYTHON, ROOMS

    named = {f"{room}, named without a call": table for room, table in NAMED.items()}
    python = {f"in Python, {room}": table for room, table in PYTHON.items()}
    rooms = [
        f"\n{room}\n{_listing({key: _doc(key, value) for key, value in table.items()})}"
        for room, table in {**ROOMS, **named, **python}.items()
        if table
    ]
    end = "'topgap help NAME' says more, 'topgap help config' lists the keys, 'topgap --help' the commands."
    return "\n".join([*rooms, f"\n{end}"])


def _config() -> str:
    from topgap_jax.setup.config import KEYS

    def about(key):
        default = "must be stated" if key.default is None else f"default {key.default!r}"
        return f"{key.kind}: {key.about}{f' ({key.role.room})' if key.role else ''}; {default}"

    return f"""\
A config has these keys, and any number of your own. A key is a name in the expressions of the others: a number, a tuple
or a plain text as it is, an expression as what it builds.

{_listing({key: about(value) for key, value in KEYS.items()}, whole=True)}"""


def _doc(name: str, value: Any) -> str:
    """The docstring of a function; of a dict of rules, what it is, and those of its functions that have one."""
    from topgap_jax import rules

    if not isinstance(value, Mapping):
        return inspect.getdoc(value)
    lines = [
        f"{operation} {when}: {inspect.getdoc(function)}"
        for operation, rule in value.items()
        for when, function in rule._asdict().items()
        if function and inspect.getdoc(function)
    ]
    return "\n\n".join([rules.ABOUT[name], *lines])


def _listing(about: Mapping[str, str], whole: bool = False) -> str:
    """Names and the first paragraph of their docstrings, as wide as the terminal: one line each, or all of it."""
    width, columns = max(map(len, about)), shutil.get_terminal_size((120, 24)).columns
    room = max(columns - width - 4, 40)

    def lines(text):
        text = (text or "").split("\n\n")[0]
        return textwrap.wrap(text, room) if whole else [textwrap.shorten(text, room, placeholder=" ...")]

    indent = "\n" + " " * (width + 4)
    return "\n".join(f"  {name:{width}}  {indent.join(lines(text))}" for name, text in about.items())


LONGEST, END = 500, 150


def line(error: object) -> str:
    """An error in one line of at most 500 characters, whatever a file or an argument put into it: control characters
    and halves of characters are escaped, and of what is longer the middle is left out, because a long path stands
    before what is wrong with it. A command that it ends with is printed whole.

    >>> line("a name\\n with \\x1b[31m")
    'a name with \\\\x1b[31m'
    """
    command = getattr(error, "command", "")
    text = printable(" ".join(str(error).removesuffix(command).split()))
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - END - 5]} ... {text[-END:]}"
    return f"{text} {printable(command)}" if command else text
