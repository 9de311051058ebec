"""Other forward and backward rules for the non-linear operations of a network nobody edited: guided backprop, softplus twins.

Rules are given to the function before it is differentiated: `jax.grad(with_rules(f, **guided))`. In a function that has been
differentiated already, the backward pass stands beside the operation and no longer belongs to it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import custom_jvp_call_p, jit_p, max_p, reduce_window_max_p

from topgap_jax.build import check_number
from topgap_jax.errors import UserError
from topgap_jax.rewrite.interpreter import bind, evaluate, reaches, rebuild, subjaxprs, trace
from topgap_jax.types import Array, Rule, Rules

WHOLE = ("clip", "celu", "hard_sigmoid", "hard_silu")  # functions under `jit` whose maximum or relu6 is no ReLU
RELUS = {"relu": (jax.nn.relu, ["max"]), "relu6": (jax.nn.relu6, ["max", "min"])}
SPREADING = ("broadcast_in_dim", "convert_element_type", "pcast", "pvary")
LOOKED_FOR = {
    "relu": "functions named relu or relu6 and maximum(x, 0)",
    "max_pool": "max pooling (reduce_window_max)",
}


def with_rules(f: Callable, *, relu: Rule | None = None, max_pool: Rule | None = None) -> Callable:
    """f with other forward or backward passes for its ReLUs or its max pooling, e.g. `with_rules(predict, **guided)`.

    relu: `jax.nn.relu`, `jax.nn.relu6` and a bare `maximum(x, 0)`, in this order of the operands (Flax clips a variance by
    `maximum(0, x)`); not what stands inside `clip`, `celu`, `hard_sigmoid` or `hard_silu`, and no bare maximum inside a function with a `custom_jvp` of its own, such
    as `softplus`. A relu6 with another forward rule r is r(z) - r(z - 6). The derivative at 0 is 0.
    max_pool: `reduce_window_max`, i.e. `nn.max_pool`.

    f may be jitted, and is entered through jit, remat, scan, cond, while, and custom_jvp and custom_vjp functions that hold a
    match (whose own derivatives are then lost). What f names keeps its name: `tap` and `read` work on the result.
    Forward rules have derivatives of any order. Of backward rules there is no second derivative, and no forward mode.

    Raises UserError if no given rule finds its operation (one of several may find none), if a match lies in something that
    cannot be entered, and for a second derivative through a backward rule.
    """
    rules = {name: rule for name, rule in {"relu": relu, "max_pool": max_pool}.items() if rule is not None}
    for name, rule in rules.items():
        if not isinstance(rule, Rule):
            raise UserError(f"with_rules: {name} must be a Rule(forward, backward), got {rule!r}")
    if not rules:
        raise UserError("with_rules: no rule is given, e.g. with_rules(predict, **guided)")

    def ruled(*args, **kwargs):
        closed, arrays, restore = trace(f, args, kwargs)
        if not _operations(closed.jaxpr) & set(rules):
            looked = ", nor ".join(LOOKED_FOR[name] for name in rules)
            raise UserError(f"with_rules: the function has no {looked}")
        return restore(_evaluate(closed.jaxpr, closed.consts, arrays, rules, bare=True))

    return ruled


def checked(rules: Any) -> Rules | None:
    """`rules` of a method's option: a dict like `guided`, or None; UserError for anything else."""
    if rules is None or (isinstance(rules, Mapping) and rules and set(rules) <= set(LOOKED_FOR)):
        return rules
    raise UserError(f"rules must be like guided or softplus(50), for {' and '.join(LOOKED_FOR)}; got {rules!r}")


def softplus(beta: float) -> Rules:
    """ReLU replaced by log(1 + exp(beta z)) / beta, forward and backward: a twin with derivatives of any order.

    It differs from ReLU by log(2) / beta at most, at 0 (Dombrowski et al. 2019, arXiv 1906.07983). Max pooling stays.
    """
    check_number("beta", beta, 1e-6)

    @jax.custom_jvp  # the derivatives of logaddexp hold more operations, which in a second derivative cost a tenth of the time
    def forward(z):
        return jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-beta * jnp.abs(z))) / beta

    forward.defjvp(lambda primals, tangents: (forward(*primals), jax.nn.sigmoid(beta * primals[0]) * tangents[0]))
    return {"relu": Rule(forward=lambda relu, z: forward(z))}


def clip(operation: Callable, gradient: Array, z: Array) -> Array:
    """[phi'(z) g]_+: only what is positive after the ordinary backward pass goes on (Springenberg et al. 2015, arXiv 1412.6806)."""
    (back,) = jax.vjp(operation, z)[1](gradient)
    return jax.nn.relu(back)


def route(operation: Callable, gradient: Array, z: Array) -> Array:
    """[g]_+ sent to the maximum of each window, the first of several: the positive part before the ordinary backward pass."""
    (back,) = jax.vjp(operation, z)[1](jax.nn.relu(gradient))
    return back


def upsampled_mask(operation: Callable, gradient: Array, z: Array) -> Array:
    """g sent to the maximum of each window, times 1[g > 0] enlarged by nearest neighbours to the size of the input.

    What the official code of guided non-linearity does (hjkwonispl/gnl): with windows that overlap it can drop a positive
    part, or let a negative sum through; without, it equals `route`.
    """
    (back,) = jax.vjp(operation, z)[1](gradient)
    mask = gradient > 0
    for axis, (size, pooled) in enumerate(zip(z.shape, gradient.shape)):
        if size != pooled:
            mask = jnp.take(mask, jnp.arange(size) * pooled // size, axis)
    return jnp.where(mask, back, 0)


guided_backprop: Rules = {"relu": Rule(backward=clip)}
guided: Rules = {"relu": Rule(backward=clip), "max_pool": Rule(backward=route)}
guided_upsampled: Rules = {"relu": Rule(backward=clip), "max_pool": Rule(backward=upsampled_mask)}

TABLE = {"softplus": softplus}
VALUES = {"guided": guided, "guided_backprop": guided_backprop, "guided_upsampled": guided_upsampled}
"""Rules that a config may name without a call. `guided` is the non-linearity of Kwon et al. (ICPR 2020)."""


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], rules: Rules, bare: bool) -> list:
    """Results of the jaxpr under the rules; `bare`: whether a bare maximum(x, 0) is a ReLU here."""
    zeros = zeros_of(jaxpr)

    def rule(eqn, values, read):
        name, operation = _match(eqn, zeros, bare)
        if name in rules:
            out = _ruled(rules[name], operation)(values[0])
            return [jnp.asarray(out, eqn.outvars[0].aval.dtype)]
        held = set() if name else _held(eqn, bare)
        if not held & set(rules):
            return None
        if not reaches(eqn):
            listed = " and ".join(sorted(held & set(rules)))
            raise UserError(f"with_rules: {listed} inside '{eqn.primitive.name}', which cannot be entered")
        inner = bare and eqn.primitive is not custom_jvp_call_p
        return rebuild(eqn, values, lambda body, consts, args: _evaluate(body, consts, args, rules, inner))

    return evaluate(jaxpr, consts, args, rule)


def _operations(jaxpr: Jaxpr, bare: bool = True) -> set[str]:
    """The operations that occur in the jaxpr, at any depth."""
    zeros, found = zeros_of(jaxpr), set()
    for eqn in jaxpr.eqns:
        name, _ = _match(eqn, zeros, bare)
        found |= {name} if name else _held(eqn, bare)
    return found


def _held(eqn: JaxprEqn, bare: bool) -> set[str]:
    """The operations inside the equation; in a function of `WHOLE` there are none."""
    if eqn.primitive is jit_p and eqn.params["name"] in WHOLE:
        return set()
    return set().union(*(_operations(body, bare and eqn.primitive is not custom_jvp_call_p) for body in subjaxprs(eqn)))


def _match(eqn: JaxprEqn, zeros: set, bare: bool) -> tuple[str | None, Callable | None]:
    """The operation that the equation is, as a function of its first operand; (None, None) for any other equation."""
    if eqn.primitive is custom_jvp_call_p:
        body = eqn.params["call_jaxpr"].jaxpr
        function, primitives = RELUS.get(body.debug_info.func_name, (None, None))
        if function and _primitives(body) == primitives and len(body.invars) == 1 and _has_zero_maximum(body):
            return "relu", function
    elif eqn.primitive is max_p and bare:
        z, zero = eqn.invars
        if is_zero(zero, zeros) and jnp.issubdtype(z.aval.dtype, jnp.floating):
            return "relu", jax.nn.relu
    elif eqn.primitive is reduce_window_max_p:
        return "max_pool", lambda z: bind(eqn, [z])[0]
    return None, None


def _has_zero_maximum(jaxpr: Jaxpr) -> bool:
    """Whether the jaxpr, or a `jit` in it, takes the maximum with 0."""
    zeros = zeros_of(jaxpr)
    return any(
        (eqn.primitive is max_p and any(is_zero(v, zeros) for v in eqn.invars))
        or any(map(_has_zero_maximum, subjaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def relu_of(eqn: JaxprEqn, zeros: set) -> bool:
    """Whether the equation is a ReLU: `jax.nn.relu`, or a bare maximum(x, 0)."""
    return _match(eqn, zeros, bare=True)[1] is jax.nn.relu


def zeros_of(jaxpr: Jaxpr) -> set:
    """The variables that are a literal 0, spread over a shape or over the devices of a `shard_map`."""
    zeros = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in SPREADING and is_zero(eqn.invars[0], zeros):
            zeros.update(eqn.outvars)
    return zeros


def is_zero(variable: Any, zeros: set) -> bool:
    if isinstance(variable, Literal):
        return variable.aval.ndim == 0 and variable.val == 0
    return variable in zeros


def _primitives(jaxpr: Jaxpr) -> list[str]:
    """Names of the primitives in order, with those inside `jit` in its place, without what only spreads a literal."""
    names = []
    for eqn in jaxpr.eqns:
        if eqn.primitive is jit_p:
            names += _primitives(eqn.params["jaxpr"].jaxpr)
        elif eqn.primitive.name not in SPREADING:
            names.append(eqn.primitive.name)
    return names


def _ruled(rule: Rule, operation: Callable) -> Callable:
    """The operation with the rule's forward and backward pass."""
    if rule.forward is None:
        forward = operation
    elif operation is jax.nn.relu6:
        forward = lambda z: rule.forward(jax.nn.relu, z) - rule.forward(jax.nn.relu, z - 6)
    else:
        forward = lambda *inputs: rule.forward(operation, *inputs)
    if rule.backward is None:
        return forward

    @jax.custom_jvp
    def backward(gradient, inputs):
        gradients = rule.backward(forward, gradient, *inputs)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return tuple(g.astype(z.dtype) for g, z in zip(gradients, inputs, strict=True))

    @backward.defjvp
    def second(primals, tangents):
        raise UserError(
            "with_rules: no second derivative through a backward rule, whose result is the gradient of no function; "
            "a forward rule such as softplus(50) has derivatives of any order"
        )

    ruled = jax.custom_vjp(forward)
    ruled.defvjp(lambda *inputs: (forward(*inputs), inputs), lambda inputs, gradient: backward(gradient, inputs))
    return ruled
