"""What each command of the command line does with its arguments."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from topgap_jax.cli import options, texts
from topgap_jax.errors import UserError


def configure(arguments):
    """Memory, compilation cache and devices, as the arguments say, before the first array; what was done, in words."""
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
    configure(arguments)
    if arguments.workdir:
        which = arguments.checkpoint or "best"
        return setup.from_workdir(arguments.workdir, overrides, checkpoint_name=which, file=arguments.file)
    pictures = getattr(arguments, "images", None) is not None
    return setup.from_config(arguments.config, _with_weights(arguments, overrides), arguments.file, pictures)


def _with_weights(arguments, overrides):
    """The overrides, --weights among them: it is another way to write --config.init."""
    return [*overrides, *([("init", arguments.weights)] if arguments.weights else [])]


def _check_model(arguments):
    if arguments.workdir and arguments.weights:
        raise UserError("--weights goes with --config; with --workdir the run's own checkpoint is used")
    if arguments.config and arguments.checkpoint:
        raise UserError("--checkpoint goes with --workdir; with --config the weights come from --weights")


def _train(arguments, overrides):
    from topgap_jax import engine, setup
    from topgap_jax.measure import results
    from topgap_jax.progress import is_writer
    from topgap_jax.run import workdir
    from topgap_jax.run.fit import Stopped, fit

    if arguments.plan is None and not arguments.workdir:
        raise UserError("the following arguments are required: --workdir; see 'topgap train --help'")
    about = configure(arguments)
    if is_writer():
        print(about, engine.status(), sep="; ", file=sys.stderr)
    if arguments.plan is not None:
        return _plan(arguments, overrides)
    experiment = setup.experiment(arguments.config, overrides, arguments.arm, arguments.file)
    setup.agree(experiment)
    workdir.check(arguments.workdir, experiment.config, experiment.classes)
    evaluates = experiment.config.evaluators and experiment.config.test and not arguments.no_evaluate
    if evaluates:
        results.read(Path(arguments.workdir) / results.FILE)  # a damaged one is told before the training
    parts = setup.parts(experiment, arguments.workdir)
    if parts.initial is not None:
        setup.agree(experiment, (), parts.initial)
    try:
        fit(experiment.config, arguments.workdir, parts, file=experiment.file)
    except Stopped as stopped:
        if is_writer():
            print(f"topgap: {stopped}", file=sys.stderr)
        return stopped.code
    if evaluates:
        loaded = setup.restored(experiment, arguments.workdir)
        _show(loaded, setup.stored(loaded) or setup.evaluate(loaded))
    return 0


def _plan(arguments, overrides):
    import jax

    from topgap_jax import setup
    from topgap_jax.run.plan import check_batch, plan, table
    from topgap_jax.setup.assembly import is_resident

    hosts, x, devices = arguments.plan.partition("x")
    if not (hosts.isdecimal() and (devices.isdecimal() or not x) and int(hosts) > 0 and (not x or int(devices) > 0)):
        raise UserError(f"--plan: HOSTSxDEVICES are two numbers such as 4x8, or one of devices, got '{arguments.plan}'")
    hosts, devices = (int(hosts), int(devices)) if x else (1, int(hosts))
    experiment = setup.experiment(arguments.config, overrides, arguments.arm, arguments.file)
    check_batch(experiment.config.batch, hosts, devices)
    config, resident = experiment.config, is_resident(experiment)
    parts = setup.parts(experiment, reads=False)
    made = plan(parts, experiment.plain, resident=resident, hosts=hosts, devices=devices)
    how = "held on every device" if resident else "streamed"
    size = " x ".join(map(str, config.image_size))
    about = {
        "network": config.network if config.model == "network" else config.model,
        "data": f"{config.source} {config.train}, {len(experiment.source(config.train)):,} images, {how} as {size}",
        "devices": f"{hosts} x {devices}, a batch of {config.batch // (hosts * devices)} each; compiled for this "
        f"{jax.devices()[0].platform}",
    }
    print(table(about, made))
    return 0


def _evaluate(arguments, overrides):
    from topgap_jax import setup
    from topgap_jax.setup import expressions

    loaded = _loaded(arguments, overrides)
    config = loaded.experiment.config
    splits = expressions.split_list(config.test if arguments.split is None else arguments.split)
    setup.agree(loaded.experiment, splits, loaded.variables)
    options = {"splits": arguments.split, "evaluators": arguments.evaluators, "batch": arguments.batch}
    rows = setup.evaluate(
        loaded, **options, save=arguments.save, model_info=arguments.model_info, again=arguments.again
    )
    _show(loaded, rows)


def _explain(arguments, overrides):
    from topgap_jax import setup
    from topgap_jax.report import index
    from topgap_jax.report.sheets import draw

    if arguments.channels and not arguments.save:
        raise UserError("--channels goes with --save FILE")
    loaded = _loaded(arguments, overrides)
    explained = setup.explain(
        loaded,
        images=arguments.images,
        split=arguments.split,
        methods=arguments.methods,
        count=arguments.count,
        target=arguments.target,
        channels=arguments.channels,
    )
    of_run = bool(arguments.workdir and not arguments.out)
    out = Path(arguments.workdir, index.FOLDER) if of_run else Path(arguments.out or index.FOLDER)
    pages = setup.saved(arguments.save, explained) if arguments.save else explained.pages
    number = 0
    for path, page in draw(out, explained, pages, overlays=arguments.overlays):
        number += len(page.ids)
        if of_run:
            index.note(path)
        print(f"{path}: {len(page.ids)} of {explained.total} pictures")
    if arguments.save:
        print(f"{arguments.save}: the maps of {number} pictures")
    return 1 if explained.unreadable else 0


def _layers(arguments, overrides):
    from topgap_jax import setup
    from topgap_jax.report.compare import aligned

    _check_model(arguments)
    configure(arguments)
    if arguments.weights:
        overrides = _with_weights(arguments, overrides)
        experiment = setup.from_config(arguments.config, overrides, arguments.file).experiment
    elif arguments.workdir:
        experiment = setup.from_workdir(arguments.workdir, overrides, file=arguments.file).experiment
    else:
        experiment = setup.experiment(arguments.config, overrides, file=arguments.file)
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


def _verify(arguments, overrides):
    from topgap_jax.report.verified import doubts, table
    from topgap_jax.setup.verify import verify

    configure(arguments)
    compared, faults = verify(arguments.path, weights_text=arguments.weights, data=arguments.data, file=arguments.file)
    print(table(compared))
    line = doubts(compared, faults)
    if line:
        print(f"topgap: {arguments.path} is not confirmed: {line}", file=sys.stderr)
    return 1 if line else 0


def _help(arguments, overrides):
    if arguments.name in COMMANDS:
        arguments.parsers[arguments.name].print_help()
    print(texts.about(arguments.name, tuple(COMMANDS)))


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
    "train": Command("train a classifier from a config, and evaluate it", options.add_train, _train, texts.TRAIN),
    "evaluate": Command("run evaluators over splits", options.add_evaluate, _evaluate, texts.EVALUATE),
    "explain": Command(
        "draw where the network looks, on a split or your own pictures", options.add_explain, _explain, texts.EXPLAIN
    ),
    "layers": Command("list the layers that methods may name", options.add_model, _layers, texts.LAYERS),
    "compare": Command("print the results of several runs side by side", options.add_runs, _compare),
    "report": Command(
        "write one self-contained HTML page about one or several runs", options.add_report, _report, texts.REPORT
    ),
    "verify": Command("measure a model's JSON again on 256 of its images", options.add_verify, _verify, texts.VERIFY),
    "help": Command("explain a name that configs may use, or list them all", options.add_help, _help),
}
