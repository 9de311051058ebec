"""Every type of the library. b images of h x w x c pixels in [0, 1], k classes; keys (b,) are typed keys, one per
example.

A method with options is a function that returns one of these. Images are float32, labels int32; normalisation is inside
the model, so an epsilon means what it says. Scores, losses and maps are per example; a mean is taken once, at the end.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from topgap_jax.edges import check_examples, check_images, check_maps
from topgap_jax.errors import UserError

Array: TypeAlias = jax.Array
Keys: TypeAlias = Array  # (b,) typed keys
Variables: TypeAlias = Mapping[str, Any]  # "params", "batch_stats", in training also "ema" = {"params", "batch_stats"}
Batch: TypeAlias = Mapping[str, Array]
"""`image` (b, h, w, c), `targets` (b, k) (mixed labels are rows), `label` (b,), `id` (b,) int32 row of the split,
`mask` (b,) bool (False: padding), and what the data set offers: `box` (b, 4) as (ymin, xmin, ymax, xmax) in [0, 1],
`region` (b, h, w) uint8 (0 outside, 1 inside, 2 unsure), `group` (b,) int32."""


class Output(NamedTuple):
    """What a model returns: logits (b, k) float32, the updated batch statistics, and logged values {name: (b,)}."""

    logits: Array
    batch_stats: Any
    logs: Mapping[str, Array]


class Model(NamedTuple):
    """A network as two pure functions.

    init(key, images) -> variables
    apply(variables, images, *, train=False, keys=None, targets=None, step=None) -> Output
    has_weights                                          init returns weights learned before, whatever the key
    """

    init: Callable[..., Variables]
    apply: Callable[..., Output]
    has_weights: bool = False


class Network(NamedTuple):
    """A model with its weights, beside the one that is measured: the source of a transfer, or a twin.

    name                                                 what says where they are from, such as the folder of a run

    It is plain data: whoever runs it binds the variables inside the jitted function, as its arguments.
    """

    model: Model
    variables: Variables
    name: str


class Predict(Protocol):
    """A model with its variables bound: images (b, h, w, c) -> logits (b, k). A deterministic model ignores `keys`."""

    def __call__(self, images: Array, keys: Keys | None = None) -> Array: ...


class Score(Protocol):
    """What an attack raises: logits (b, k), labels (b,) -> (b,).

    `clean` (b, k) are the logits of the clean image, the reference of a divergence; `target` (b,) int32 are the classes
    that a targeted attack aims at, which a targeted score needs. The others ignore them.
    """

    def __call__(
        self, logits: Array, labels: Array, clean: Array | None = None, target: Array | None = None
    ) -> Array: ...


class Ball(NamedTuple):
    """The perturbations an attack may use: a norm ball, cut by the pixel box [0, 1]. eps (b,) is each example's radius.

    name, eps                                            `linf(8/255)`, and the default radius
    p                                                    which norm: 1, 2 or inf
    start(keys (b,), images, eps) -> delta               a random start inside the ball, (b, h, w, c)
    project(images, delta, eps) -> delta                 nearest allowed perturbation, (b, h, w, c) each
    ascent(gradient) -> direction                        steepest ascent of unit norm, (b, h, w, c)
    direction(images, delta, gradient) -> direction      of one step among many, unit norm: in l1 a few pixels, not one
    dual_norm(gradient) -> (b,)                          sup of <gradient, d> over unit d
    size(delta) -> (b,)                                  the ball's own norm
    hyperplane(points, w, b (b,)) -> delta               smallest step, in that norm, to where <w, point> = b in the box
    """

    name: str
    eps: float
    p: float
    start: Callable[[Keys, Array, Array], Array]
    project: Callable[[Array, Array, Array], Array]
    ascent: Callable[[Array], Array]
    direction: Callable[[Array, Array, Array], Array]
    dual_norm: Callable[[Array], Array]
    size: Callable[[Array], Array]
    hyperplane: Callable[[Array, Array, Array], Array]

    @property
    def norm(self) -> str:
        """The name without the radius: "linf"."""
        return self.name.partition("(")[0]

    def __repr__(self) -> str:
        return f"Ball({self.name})"


class Penalty(NamedTuple):
    """A cost R of a perturbation, and through it a penalty R* on the gradient: sup over delta of <g, delta> - R(delta)
    = R*(g).

    value(gradient) -> (b,)                              R*(g), the penalty that lands on the gradient map
    cost(delta) -> (b,)                                  R(delta); of a constraint 0 inside and inf outside
    maximiser(gradient) -> delta                         where the supremum is attained, (b, h, w, c) each
    prox(delta, t) -> delta                              argmin of t R(d) + |d - delta|^2 / 2, t also (b, 1, 1, 1)
    project(delta) -> delta                              nearest allowed perturbation; itself where R is finite
    scale                                                natural t of `prox`; None: R is a constraint, `prox` projects
    boxed                                                whether cutting the maximiser by the pixel box leaves it one
    """

    name: str
    value: Callable[[Array], Array]
    cost: Callable[[Array], Array]
    maximiser: Callable[[Array], Array]
    prox: Callable[[Array, Any], Array]
    project: Callable[[Array], Array]
    scale: float | None
    boxed: bool


class Pool(Protocol):
    """Class maps (b, h, w, k) -> logits (b, k), in float32. `step=None` means a schedule's end value."""

    def __call__(self, maps: Array, step: Array | None = None) -> Array: ...


class Cost(NamedTuple):
    """What a method asks of the network per image: forward passes, and gradient evaluations (one forward and one
    backward each).

    Costs add up and can be multiplied by a number: `steps * attack.cost(predict, images) + Cost(1, 0)`.
    """

    forwards: float = 0
    gradients: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forwards + other.forwards, self.gradients + other.gradients)

    def __rmul__(self, times: float) -> "Cost":
        return Cost(times * self.forwards, times * self.gradients)


Costs: TypeAlias = Callable[[Predict, Any], Cost]
"""cost(predict, images (b, h, w, c), arrays or their shapes) -> Cost, from shapes alone: it may trace `predict`, never
run it."""


class Attack(NamedTuple):
    """A search for an adversarial example, as a pair like an optax optimiser.

    init(keys, predict, images, labels, logits (clean), *, run=None, eps=None) -> state
    step(predict, state) -> state                        evaluates the iterate, books it, then moves it
    steps                                                how often `step` is to be called
    cost(predict, images) -> Cost                        of one step
    aim                                                  what it changes: the "label" inside a ball, the "map" of an
                                                         explanation, or the label by the smallest "norm" that does it
    runs                                                 restarts x targets: values of `run`, below which it stays
    samples                                              passes of a model that draws at random that a verdict averages
    norm                                                 of its ball, "linf"; "" where it has none
    source                                               another network, or the text that names it, which `init`,
                                                         `step` and `cost` are given as `source=predict`; None: none is
    score                                                what it raises where it has a choice, None where it has none

    The state is `attacks.state.State`, every leaf of which has the leading axis b. `run` (b,) numbers restart and
    target of each example, 0 if not given; `eps` (b,) is its radius, the ball's own if not given. `attacks.finish`
    books the last iterate of an attack on the label.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    steps: int
    cost: Costs
    name: str
    aim: str = "label"
    runs: int = 1
    samples: int | None = None
    norm: str = ""
    source: "Network | str | None" = None
    score: "Score | None" = None

    def __repr__(self) -> str:
        return f"Attack({self.name})"


Runs: TypeAlias = tuple[Attack, ...]
"""Attacks worked through in turn on the examples that are still unbroken; one attack is one run."""


@dataclasses.dataclass(frozen=True)
class Explain:
    """Where the network looks: a hashable record that is called, explain(keys (b,), predict, images, labels (b,)) ->
    maps.

    maps(keys, predict, images, labels) -> (b, h', w')   at the method's own resolution; of a family one array a name
    cost(predict, images) -> Cost                        of one map
    pixels(keys, predict, images, labels) -> (b, h, w, c)        the values of every channel, where the method has them
    reduce((b, h, w, c)) -> (b, h, w)                    what makes the map of them
    signed                                               what a negative value means; None: no value is negative
    rules                                                the backward or forward rules it uses, as (operation, Rule)
    names                                                (): one map; else a family, whose maps come in this order

    A call checks keys, images and labels where they are not traced (UserError); `maps` does not.
    """

    maps: Callable[..., Array]
    cost: Costs
    pixels: Callable[..., Array] | None = None
    reduce: Callable[[Array], Array] | None = None
    signed: str | None = None
    rules: tuple[tuple[str, "Rule"], ...] = ()
    names: tuple[str, ...] = ()

    def __call__(self, keys: Keys, predict: Predict, images: Array, labels: Array) -> Any:
        check_examples("explain", keys, predict, images, labels, any_outputs=True)
        return self.maps(keys, predict, images, labels)

    @staticmethod
    def single(where: str, explain: Any) -> "Explain":
        """`explain`, if it is an explanation that gives one map; else a UserError of the method `where`."""
        if not isinstance(explain, Explain):
            raise UserError(f"{where}: give an explanation such as gradient(), got {explain!r}")
        if explain.names:
            raise UserError(f"{where}: the explanation is a family of {len(explain.names)} maps; give one of them")
        return explain


class Drop(NamedTuple):
    """What training hides of a layer's features, and how much of them it hid.

    apply(keys (b,), source, features (b, h, w, c), targets (b, k), step) -> (features, rate (b,))
    source = (features, head)                            what the saliency is taken from
    head(features) -> logits (b, k)                      the rest of the network in eval mode
    teacher                                              source is of variables["ema"], not of the weights in training
    granularity                                          what is dropped as one: "element", "location" or "channel"
    """

    apply: Callable[..., tuple[Array, Array]]
    teacher: bool = False
    granularity: str = "element"


class Rule(NamedTuple):
    """Another way to compute an operation of a network, such as its ReLUs, forward or backward; None leaves it as it
    is.

    forward(operation, *inputs) -> output
    backward(operation, gradient, *inputs) -> gradient of the input, a tuple where there are several

    `operation` is the function that the network computes there; of a backward rule, what the forward rule makes of it.
    """

    forward: Callable[..., Array] | None = None
    backward: Callable[..., Any] | None = None


class ByLayer(NamedTuple):
    """The rules of one operation, chosen by the layer it stands in: the first whose name fits, else `otherwise`.

    layers                                               (name, its rule) each; the name None is the first layer
    otherwise                                            anywhere else; None leaves the operation as it is
    """

    layers: tuple[tuple[str | None, Rule | None], ...]
    otherwise: Rule | None = None


Rules: TypeAlias = Mapping[str, "Rule | ByLayer"]
"""Operation ("relu", "conv", "round", ...: `rewrite.operations.OPERATIONS`) -> its rule: `with_rules(f, **rules)`."""


class Augment(Protocol):
    """A random change of a batch, on the device."""

    def __call__(self, keys: Keys, batch: Batch, predict: Predict) -> Batch: ...


class Objective(Protocol):
    """What training lowers: -> (loss (b,), metrics {name: (b,)}, batch statistics)."""

    def __call__(
        self, keys: Keys, model: Model, variables: Variables, batch: Batch, step: Array
    ) -> tuple[Array, Mapping[str, Array], Any]: ...


class Measure(NamedTuple):
    """One number of a result with all that a table needs.

    value                                                None: no image defines it, and `reason` says why
    low, high                                            its 95 % interval, None where none is known
    n                                                    how many images it is over
    better                                               "higher", "lower", or None where neither side is
    label, unit                                          in words: "worst-group accuracy", "pixels"
    main                                                 whether a short table shows it
    across                                               whether its values of different networks may be compared
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    better: str | None = None
    label: str = ""
    unit: str = ""
    main: bool = True
    reason: str = ""
    across: bool = True


class Curve(NamedTuple):
    """A line of a result: x and y (n,), what its axes are in words, and `label`, what it shows."""

    x: Sequence[float]
    y: Sequence[float | None] = ()
    axes: tuple[str, str] = ("", "")
    label: str = ""


class Gallery(NamedTuple):
    """Pictures of a result, in lines of `columns`, and `label`, what they show.

    tiles                                                NumPy uint8 each: an image (h, w, 3), or a map (h, w), which is
                                                         drawn in colours from 0 to 255
    captions                                             a few words for each tile
    """

    tiles: Sequence[Any]
    captions: Sequence[str]
    columns: int
    label: str = ""


class Metric(NamedTuple):
    """A measure of maps that is called: metric(keys, predict, maps (b, h', w'), batch) -> {name: (b, ...)}.

    NaN where a measure is undefined; an image whose map is not finite has none.

    measures                                             what each name is: a Measure, or a Curve for rows (b, x)
    cost(predict, images) -> Cost
    """

    rows: Callable[..., Mapping[str, Array]]
    measures: Mapping[str, "Measure | Curve"]
    cost: Costs

    def __call__(self, keys: Keys, predict: Predict, maps: Array, batch: Batch) -> Mapping[str, Array]:
        check_maps("metric", maps, batch.get("image"))
        if "image" in batch:
            check_images("metric", batch["image"])
            if "label" in batch:
                check_examples("metric", keys, predict, batch["image"], batch["label"])
        defined = jnp.isfinite(maps).all(tuple(range(1, maps.ndim)))
        rows = self.rows(keys, predict, maps, batch)
        return {
            name: jnp.where(jnp.expand_dims(defined, range(1, row.ndim)), row, jnp.nan) for name, row in rows.items()
        }


class Evaluator(NamedTuple):
    """A measure of a model over a split.

    rows(keys, model, variables, batch, prepared) -> {name: (b, ...)}          pure, on the device
    summary({name: (n, ...)} of the whole split, NumPy) -> {name: Measure, Curve, Gallery or Check}
    cost(predict, images) -> Cost
    host({name: (b, ...)}, NumPy) -> {name: (b, ...)}    optional, work that is not arithmetic on arrays
    prepare(training, classes) -> prepared               optional: what the rows need of the training split

    training: {"image" (m, h, w, c) uint8, "label", "box"?, "region"?}, NumPy, or None where there is none to be had:
    then rows that need one are absent, and the summary says why. `prepared` is a tree of arrays ({} without `prepare`),
    an argument of the jitted rows and no constant in them.
    """

    rows: Callable[..., Mapping[str, Array]]
    summary: Callable[[Mapping[str, Any]], Mapping[str, "Measure | Curve | Gallery | Check"]]
    cost: Costs
    host: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    prepare: Callable[..., Any] | None = None


class Robustness(NamedTuple):
    """Plain data that `measure.robust` executes: the attacks, one after the other on what is still unbroken.

    eps                                                  radii from the smallest to the largest, at each of which the
                                                         attacks are made; (): at the attacks' own
    """

    runs: Runs
    eps: tuple[float, ...] = ()


class Audit(NamedTuple):
    """Plain data that `measure.audit` executes: is what attacks in this ball leave to be believed?

    white_box                                            the attacks with gradients whose result is in question
    twin                                                 another network, or the text that names it, whose adversarial
                                                         examples are tried too; None: there is none
    points                                               images that are looked at, at most
    """

    ball: Ball
    white_box: Runs
    twin: "Network | str | None" = None
    points: int = 512


class Check(NamedTuple):
    """One check of an audit, or of an evaluator that concludes something.

    id                                                   "A1" to "A18", as `measure.criteria` numbers them, or "T1" to
                                                         "T6" of `evaluators.trust`
    status                                               "pass", "warn", "fail", or "skipped"
    statistic, threshold                                 what decided, and the bound that it crossed or, where the check
                                                         passes, that it would have to cross; None where skipped
    n                                                    of how many images
    sentence                                             the evidence in words, and what it means
    """

    id: str
    status: str
    statistic: float | None
    threshold: float | None
    n: int
    sentence: str


Schedule: TypeAlias = Callable[[Any], Any]
"""An optax schedule: step -> number."""

Table: TypeAlias = Mapping[str, Callable[..., Any]]
"""Names that a config may use, and the functions they stand for."""
