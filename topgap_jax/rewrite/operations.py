"""What an equation is: the one place that recognises a network's operations in its jaxpr.

`OPERATIONS` is the table of those that a rule may be given for. The rest is for walks over a network: which axes of a
convolution are which, dense layers, sums, changes of shape.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import (
    add_jaxvals_p,
    add_p,
    custom_jvp_call_p,
    div_p,
    dot_general_p,
    gt_p,
    jit_p,
    max_p,
    mul_p,
    name_p,
    reduce_sum_p,
    reduce_window_max_p,
    reduce_window_sum_p,
    select_n_p,
)

from topgap_jax.engine import forward_p
from topgap_jax.rewrite.affine import conv_layer, convolution, convolution_axes, dense_layer, product
from topgap_jax.rewrite.attention import activation, attention, deviation, matmul, multiplication, softmax
from topgap_jax.rewrite.body import (
    SPREADING,
    Body,
    Operation,
    as_it_stands,
    before,
    behind_inside,
    body_of,
    floating_inside,
    is_elementwise,
    is_zero,
    literal,
    reshapes,
    zeros_of,
)
from topgap_jax.rewrite.interpreter import bind, subjaxprs
from topgap_jax.rewrite.steps import floor, rounding, sign, step, threshold

WHOLE = ("clip", "celu", "hard_sigmoid", "hard_silu")  # functions under `jit` whose maximum or relu6 is no ReLU
# (axes of the value, axes summed over) of a mean over positions: tokens, images or volumes, channels last or first,
# alone or in a batch. Not the means of a normalisation, whose axes are the channels, the batch, or groups as well.
POSITIONS = {
    (3, (0, 1)), (3, (1,)), (3, (1, 2)), (4, (1, 2)), (4, (2, 3)), (5, (1, 2, 3)), (5, (2, 3, 4)),
}  # fmt: skip
RELUS = {"relu": (jax.nn.relu, ["max"]), "relu6": (jax.nn.relu6, ["max", "min"])}
SCALE = (mul_p, div_p, select_n_p)  # a select of the value or zero is dropout
SUMS = (add_p, add_jaxvals_p)


def operations(jaxpr: Jaxpr, among: Iterable[str] | None = None) -> set[str]:
    """Which of these operations, by default of all, occur in the jaxpr, at any depth."""
    return _operations(body_of(jaxpr), jaxpr, tuple(OPERATIONS if among is None else among))


def _operations(body: Body, jaxpr: Jaxpr, among: tuple[str, ...]) -> set[str]:
    names = set()
    for eqn in jaxpr.eqns:
        name, _ = match(eqn, body, among)
        names |= {name} if name else operations_inside(eqn, body, among)
    return names


def operations_inside(eqn: JaxprEqn, body: Body, among: tuple[str, ...]) -> set[str]:
    """Names of the operations in the equation's bodies; in a function of `WHOLE` there are none."""
    if eqn.primitive is jit_p and eqn.params["name"] in WHOLE:
        return set()
    return set().union(*(_operations(inside(eqn, inner, body), inner, among) for inner in subjaxprs(eqn)))


def inside(eqn: JaxprEqn, jaxpr: Jaxpr, body: Body) -> Body:
    """The body of a jaxpr inside the equation of this body."""
    bare = body.bare and eqn.primitive is not custom_jvp_call_p
    return body_of(jaxpr, bare, floating_inside(eqn, jaxpr, body), behind_inside(eqn, jaxpr, body))


def match(eqn: JaxprEqn, body: Body, among: Iterable[str]) -> tuple[str | None, Operation | None]:
    """Which of these operations the equation is; (None, None) for any other."""
    for name in among:
        if operation := OPERATIONS[name][0](eqn, body):
            return name, operation
    return None, None


def _relu(eqn: JaxprEqn, zeros: set, bare: bool) -> Operation | None:
    function = None
    if eqn.primitive is custom_jvp_call_p:
        inner = eqn.params["call_jaxpr"].jaxpr
        function, primitives = RELUS.get(inner.debug_info.func_name, (None, None))
        if not (function and _primitives(inner) == primitives and len(inner.invars) == 1 and _has_zero_maximum(inner)):
            return None
    elif eqn.primitive is max_p and bare and is_zero(eqn.invars[1], zeros):
        function = jax.nn.relu if jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating) else None
    return Operation(function, (eqn.invars[0],)) if function else None


def _max_pool(eqn: JaxprEqn, body: Body) -> Operation | None:
    return as_it_stands(eqn) if eqn.primitive is reduce_window_max_p else None


def _add(eqn: JaxprEqn, body: Body) -> Operation | None:
    """A sum of two values of the network, as at the end of a residual block.

    A bias belongs to its layer: a constant, and what is spread over axes of the other. So does what is computed element
    by element from the other, which is part of an activation (GELU's x + .04 x^3).
    """
    literal = any(isinstance(v, Literal) for v in eqn.invars)
    if eqn.primitive is not add_p or not body.bare or literal or not body.varying.issuperset(eqn.invars):
        return None
    out = eqn.outvars[0].aval
    if not jnp.issubdtype(out.dtype, jnp.floating):
        return None
    for v in eqn.invars:
        source = before(v, body, reshapes)
        is_vector = source not in body.made_by and source.aval.ndim == 1 < out.ndim
        if source.aval.size < out.size or is_vector:
            return None
    first, second = (before(v, body, is_elementwise) for v in eqn.invars)
    return None if first is second else as_it_stands(eqn)


def _mean(eqn: JaxprEqn, body: Body) -> Operation | None:
    """A sum over positions divided by their number, or an average pool; the equation is the division."""
    if eqn.primitive not in (div_p, mul_p):
        return None
    total, count = (literal(v, body) for v in eqn.invars)
    if eqn.primitive is mul_p and isinstance(total, Literal):
        total, count = count, total
    if isinstance(total, Literal):
        return None
    steps = []  # from the division back to the sum
    while total in body.made_by and reshapes(body.made_by[total]) and body.made_by[total].primitive is not name_p:
        steps.append(body.made_by[total])
        total = steps[-1].invars[0]
    summing = body.made_by.get(total)
    axes = summed_axes(summing) if summing is not None else None
    if axes is None:
        return None
    value = summing.invars[0]
    if summing.primitive is reduce_sum_p and (value.aval.ndim, axes) not in POSITIONS:
        return None
    number = math.prod(summing.params.get("window_dimensions", value.aval.shape)[i] for i in axes)
    if isinstance(count, Literal):
        if not math.isclose(float(count.val), number if eqn.primitive is div_p else 1 / number, rel_tol=0.01):
            return None
    elif eqn.primitive is mul_p or not _counts(body.made_by.get(count), summing, body):
        return None

    def summed(z):
        for each in (summing, *reversed(steps)):
            (z,) = bind(each, [z])
        return z

    def mean(z):
        return summed(z) / (number if isinstance(count, Literal) else summed(jnp.ones_like(z)))

    return Operation(mean, (value,))


def _counts(eqn: JaxprEqn | None, summing: JaxprEqn, body: Body) -> bool:
    """Whether the equation counts what is in each window, as an average that leaves the padding out divides by."""
    if eqn is None or eqn.primitive is not reduce_window_sum_p or eqn.params != summing.params:
        return False
    return isinstance(literal(eqn.invars[0], body), Literal)


OPERATIONS: dict[str, tuple[Callable[[JaxprEqn, Body], Operation | None], str]] = {
    "relu": (lambda eqn, body: _relu(eqn, body.zeros, body.bare), "functions named relu or relu6 and maximum(x, 0)"),
    "max_pool": (_max_pool, "max pooling (reduce_window_max)"),
    "conv": (convolution, "convolution"),
    "dense": (product, "dense layer (a product with a kernel)"),
    "add": (_add, "sum of two of its values"),
    "mean": (_mean, "mean over positions"),
    "conv_layer": (conv_layer, "convolution"),
    "dense_layer": (dense_layer, "dense layer (a product with a kernel)"),
    "softmax": (softmax, "softmax"),
    "attention": (attention, "product of a softmax and values"),
    "matmul": (matmul, "matrix product of two of its values"),
    "mul": (multiplication, "elementwise product of two of its values"),
    "activation": (activation, "x times a function of x, such as SiLU or GELU"),
    "deviation": (deviation, "root of a variance that a normalisation divides by"),
    "round": (rounding, "round"),
    "floor": (floor, "floor, ceil or conversion to whole numbers"),
    "sign": (sign, "sign"),
    "threshold": (threshold, "where(..., x, constant) by a comparison of x"),
    "step": (step, "number made of a comparison"),
}
"""Each operation: how it is recognised, and what there is none of where no equation is one."""


def _has_zero_maximum(jaxpr: Jaxpr) -> bool:
    """Whether the jaxpr, or a `jit` in it, takes the maximum with 0."""
    zeros = zeros_of(jaxpr)
    return any(
        (eqn.primitive is max_p and any(is_zero(v, zeros) for v in eqn.invars))
        or any(map(_has_zero_maximum, subjaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def relu_of(eqn: JaxprEqn, zeros: set) -> Callable | None:
    """`jax.nn.relu` or `jax.nn.relu6` where the equation is one, or a bare maximum(x, 0); None for any other."""
    operation = _relu(eqn, zeros, bare=True)
    return None if operation is None else operation.function


class Dense(NamedTuple):
    """A product of a value with a kernel over its channels.

    axes: where each other axis of the value is in the result; channels, classes: the axis of what is summed over in the
    value, and that of what is made in the result; matrix: the kernel as (channels, classes).
    """

    axes: dict[int, int]
    channels: int
    classes: int
    matrix: Callable[[Any], Any]


def dense(eqn: JaxprEqn, operand: int) -> Dense | None:
    """The equation as a dense layer of this operand: a plain matrix product, or a 1x1 convolution; None for anything
    else."""
    numbers = convolution_axes(eqn)
    if numbers is None and eqn.primitive is not dot_general_p:
        return None
    value, kernel, (out,) = eqn.invars[operand], eqn.invars[1 - operand], eqn.outvars
    if numbers is None:
        contracted, batch = eqn.params["dimension_numbers"]
        if len(contracted[0]) != 1 or batch[0] or kernel.aval.ndim != 2:
            return None
        (channels,), (rows,) = contracted[operand], contracted[1 - operand]
        first = 0 if operand == 0 else 1  # the axes of the left operand come first
        free = [i for i in range(value.aval.ndim) if i != channels]
        axes = {i: first + place for place, i in enumerate(free)}
        return Dense(axes, channels, (1 - first) * len(free), lambda kernel: kernel if rows == 0 else kernel.T)
    if operand != 0 or any(kernel.aval.shape[i] != 1 for i in numbers.rhs_spec[2:]):
        return None
    axes = {i: j for i, j in zip(numbers.lhs_spec, numbers.out_spec) if i != numbers.lhs_spec[1]}
    channels_in = value.aval.shape[numbers.lhs_spec[1]]
    strides = eqn.params["geometry"].strides if eqn.primitive is forward_p else eqn.params["window_strides"]
    if set(strides) != {1} or any(value.aval.shape[i] != out.aval.shape[j] for i, j in axes.items()):
        return None
    if kernel.aval.shape[numbers.rhs_spec[1]] != channels_in or eqn.params.get("batch_group_count", 1) != 1:
        return None  # in groups
    matrix = lambda kernel: kernel.transpose(numbers.rhs_spec[1], numbers.rhs_spec[0], *numbers.rhs_spec[2:]).reshape(
        channels_in, -1
    )
    return Dense(axes, numbers.lhs_spec[1], numbers.out_spec[1], matrix)


def summed_axes(eqn: JaxprEqn) -> tuple[int, ...] | None:
    """The axes that the equation sums its operand over: a sum, or the sum of an average pool; None for anything
    else."""
    if eqn.primitive is reduce_sum_p:
        return tuple(eqn.params["axes"])
    if eqn.primitive is reduce_window_sum_p:
        return tuple(i for i, size in enumerate(eqn.params["window_dimensions"]) if size > 1)
    return None


def is_whole(eqn: JaxprEqn) -> bool:
    """Whether a sum is over the whole of its axes: any sum, and an average pool with one full window."""
    if eqn.primitive is reduce_sum_p:
        return True
    params, shape, out = eqn.params, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if any(tuple(pad) != (0, 0) for pad in params["padding"]) or set(params["base_dilation"]) != {1}:
        return False
    return all(
        (size, pooled) in ((length, 1), (1, length))
        for size, pooled, length in zip(params["window_dimensions"], out, shape)
    )


def is_positive(eqn: JaxprEqn, zeros: set) -> bool:
    """Whether the equation is value > 0."""
    return eqn.primitive is gt_p and is_zero(eqn.invars[1], zeros)


def is_masked(eqn: JaxprEqn, value: Any, zeros: set) -> bool:
    """Whether the equation is where(mask, value, 0) element by element, as a ReLU's derivative is."""
    if eqn.primitive is not select_n_p or len(eqn.invars) != 3:
        return False
    mask, otherwise, kept = eqn.invars
    return kept is value and is_zero(otherwise, zeros) and mask.aval.shape == value.aval.shape


def _primitives(jaxpr: Jaxpr) -> list[str]:
    """Names of the primitives in order, with those inside `jit` in its place, without what only spreads a literal."""
    names = []
    for eqn in jaxpr.eqns:
        if eqn.primitive is jit_p:
            names += _primitives(eqn.params["jaxpr"].jaxpr)
        elif eqn.primitive.name not in SPREADING:
            names.append(eqn.primitive.name)
    return names
