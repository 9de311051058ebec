"""Every type of the library. b images of h x w x c pixels in [0, 1], k classes; keys (b,) are typed keys, one per example.

A method with options is a function that returns one of these. Images are float32, labels int32; normalisation is inside
the model, so an epsilon means what it says. Scores, losses and maps are per example; a mean is taken once, at the end.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

Array: TypeAlias = jax.Array
Keys: TypeAlias = Array  # (b,) typed keys
Variables: TypeAlias = Mapping[str, Any]  # "params", "batch_stats", in training also "ema" = {"params", "batch_stats"}
Batch: TypeAlias = Mapping[str, Array]
"""`image` (b, h, w, c), `targets` (b, k) (mixed labels are rows), `label` (b,), `id` (b,) int32 row of the split, `mask` (b,) bool
(False: padding), and what the data set offers: `box` (b, 4) as (ymin, xmin, ymax, xmax) in [0, 1], `region` (b, h, w) uint8
(0 outside, 1 inside, 2 unsure), `group` (b,) int32."""


class Output(NamedTuple):
    """What a model returns: logits (b, k) float32, the updated batch statistics, and logged values {name: (b,)}."""

    logits: Array
    batch_stats: Any
    logs: Mapping[str, Array]


class Model(NamedTuple):
    """A network as two pure functions.

    init(key, images) -> variables
    apply(variables, images, *, train=False, keys=None, targets=None, step=None) -> Output
    """

    init: Callable[..., Variables]
    apply: Callable[..., Output]


class Predict(Protocol):
    """A model with its variables bound: images (b, h, w, c) -> logits (b, k). A deterministic model ignores `keys`."""

    def __call__(self, images: Array, keys: Keys | None = None) -> Array: ...


class Score(Protocol):
    """What an attack raises: logits (b, k), labels (b,) -> (b,). `targets` (b,) is a class fixed from the clean logits."""

    def __call__(self, logits: Array, labels: Array, targets: Array | None = None) -> Array: ...


class Ball(NamedTuple):
    """The perturbations an attack may use: a norm ball of radius `eps`, cut by the pixel box [0, 1].

    start(key, image (h, w, c)) -> delta (h, w, c)               a random start inside the ball
    project(images, delta) -> delta                              nearest allowed perturbation, (b, h, w, c) each
    ascent(gradient) -> direction                                steepest ascent of unit norm, (b, h, w, c)
    dual_norm(gradient) -> (b,)                                  sup of <gradient, d> over unit d
    size(delta) -> (b,)                                          the ball's own norm
    scaled(factor) -> Ball                                       the same ball with radius factor * eps
    """

    name: str
    eps: float
    start: Callable[[Array, Array], Array]
    project: Callable[[Array, Array], Array]
    ascent: Callable[[Array], Array]
    dual_norm: Callable[[Array], Array]
    size: Callable[[Array], Array]
    scaled: Callable[[float], "Ball"]


class Penalty(NamedTuple):
    """A cost R of a perturbation, and through it a penalty R* on the gradient: sup over delta of <g, delta> - R(delta) = R*(g).

    value(gradient) -> (b,)                                      R*(g), the penalty that lands on the gradient map
    cost(delta) -> (b,)                                          R(delta); of a constraint 0 inside and inf outside
    maximiser(gradient) -> delta                                 where the supremum is attained, (b, h, w, c) each
    prox(delta, t) -> delta                                      argmin over d of t R(d) + |d - delta|^2 / 2
    project(delta) -> delta                                      nearest allowed perturbation: itself where R is finite everywhere
    scale                                                        natural t of `prox`; None: R is a constraint, `prox` projects
    boxed                                                        whether cutting the maximiser by the pixel box leaves it one
    """

    name: str
    value: Callable[[Array], Array]
    cost: Callable[[Array], Array]
    maximiser: Callable[[Array], Array]
    prox: Callable[[Array, float], Array]
    project: Callable[[Array], Array]
    scale: float | None
    boxed: bool


class Pool(Protocol):
    """Class maps (b, h, w, k) -> logits (b, k), in float32. `step=None` means a schedule's end value."""

    def __call__(self, maps: Array, step: Array | None = None) -> Array: ...


class Cost(NamedTuple):
    """What a method asks of the network per image: forward passes, and gradient evaluations (one forward and one backward each)."""

    forwards: float
    gradients: float


class Attack(NamedTuple):
    """A search for an adversarial example, as a pair like an optax optimiser.

    init(keys, predict, images, labels, logits (clean)) -> state
    step(predict, state) -> state                                evaluates the iterate, books it, then moves it
    steps                                                        how often `step` is to be called
    cost                                                         of one step
    aim                                                          what it changes: the "label", or the "map" of an explanation

    Every leaf of `state` has the leading axis b. `attacks.finish` books the last iterate of an attack on the label.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    steps: int
    cost: Cost
    name: str
    aim: str = "label"


Runs: TypeAlias = tuple[Attack, ...]
"""Attacks worked through in turn on the examples that are still unbroken; one attack is one run."""


class Explain(Protocol):
    """Where the network looks: -> maps (b, h', w') at the method's own resolution. Its attribute `cost` is a `Cost`."""

    def __call__(
        self, keys: Keys, predict: Predict, images: Array, labels: Array, segments: Array | None = None
    ) -> Array: ...


class Drop(NamedTuple):
    """What training hides of a layer's features, and how much of them it hid.

    apply(keys (b,), source, features (b, h, w, c), targets (b, k), step) -> (features, rate (b,))
    source = (features, head)                                    what the saliency is taken from
    head(features) -> logits (b, k)                              the rest of the network in eval mode
    teacher                                                      source is of variables["ema"], not of the weights in training
    granularity                                                  what is dropped as one: "element", "location" or "channel"
    """

    apply: Callable[..., tuple[Array, Array]]
    teacher: bool = False
    granularity: str = "element"


class Rule(NamedTuple):
    """Another way to compute an operation of a network, such as its ReLUs, forward or backward; None leaves it as it is.

    forward(operation, *inputs) -> output
    backward(operation, gradient, *inputs) -> gradient of the input, a tuple where there are several

    `operation` is the function that the network computes there; of a backward rule, what the forward rule makes of it.
    """

    forward: Callable[..., Array] | None = None
    backward: Callable[..., Any] | None = None


Rules: TypeAlias = Mapping[str, Rule]
"""Operation ("relu", "max_pool") -> its rule: `rewrite.with_rules(f, **rules)`."""


class Augment(Protocol):
    """A random change of a batch, on the device."""

    def __call__(self, keys: Keys, batch: Batch, predict: Predict) -> Batch: ...


class Objective(Protocol):
    """What training lowers: -> (loss (b,), metrics {name: (b,)}, batch statistics)."""

    def __call__(
        self, keys: Keys, model: Model, variables: Variables, batch: Batch, step: Array
    ) -> tuple[Array, Mapping[str, Array], Any]: ...


class Metric(Protocol):
    """A measure of maps (b, h', w'): -> {name: (b, ...)}."""

    def __call__(self, keys: Keys, predict: Predict, maps: Array, batch: Batch) -> Mapping[str, Array]: ...


class Evaluator(NamedTuple):
    """A measure of a model over a split.

    rows(keys, model, variables, batch) -> {name: (b, ...)}      pure, on the device
    summary({name: (n, ...)} of the whole split, NumPy) -> {name: number or curve}; a curve is {"x": [...], "y": [...]}
    host({name: (b, ...)}, NumPy) -> {name: (b, ...)}            optional, work that is not arithmetic on arrays
    """

    rows: Callable[..., Mapping[str, Array]]
    summary: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    cost: Cost
    host: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None


class Robustness(NamedTuple):
    """Plain data that `measure.robust` executes: the runs, one after the other on what is still unbroken."""

    runs: Runs


Schedule: TypeAlias = Callable[[Any], Any]
"""An optax schedule: step -> number."""

Table: TypeAlias = Mapping[str, Callable[..., Any]]
"""Names that a config may use, and the functions they stand for."""
