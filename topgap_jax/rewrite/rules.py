"""Other forward and backward rules for the operations of a network nobody edited: guided backprop, softplus twins,
relevance.

Rules are given to the function before it is differentiated: `jax.grad(with_rules(f, **guided))`. In a function that has
been differentiated already, the backward pass stands beside the operation and no longer belongs to it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import name_p

from topgap_jax.errors import UserError
from topgap_jax.rewrite.body import Body, Operation, body_of
from topgap_jax.rewrite.interpreter import depending, evaluate, reaches, rebuild, subjaxprs, trace
from topgap_jax.rewrite.names import naming
from topgap_jax.rewrite.operations import OPERATIONS, inside, match, operations, operations_inside
from topgap_jax.types import ByLayer, Rule, Rules


def with_rules(f: Callable, **rules: Rule | None) -> Callable:
    """f with other forward or backward passes for some of its operations, e.g. `with_rules(predict, **guided)`.

    relu: `jax.nn.relu`, `jax.nn.relu6` and a bare `maximum(x, 0)`, in this order of the operands (Flax clips a variance
    by `maximum(0, x)`); not what stands inside `clip`, `celu`, `hard_sigmoid` or `hard_silu`, and no bare maximum
    inside a function with a `custom_jvp` of its own, such as `softplus`. A relu6 with another forward rule r is r(z) -
    r(z - 6). The derivative at 0 is 0.
    max_pool: `reduce_window_max`, i.e. `nn.max_pool`.
    conv: of images and kernel, by JAX or by the engine, 1x1 too. A bias is none of the operands.
    dense: of value and kernel, a product without batch axes (not of queries and keys).
    add: of two values of one shape, as of a residual block; not of a bias, which is spread over other axes or constant.
    mean: over positions, or an average pool: a sum and the division by the number of what is summed.
    round, sign: `lax.round` and `lax.sign`, however a library calls them.
    floor: floor and ceil (so `jnp.trunc`), x // c, and a conversion to whole numbers and back.
    step: of the larger and the smaller, 1[x > t] as a number, or of four `where(x > t, above, below)`, neither of which
    is computed from what is compared.
    threshold: of x, mask and constant, `where(mask, constant, x)` with x compared for the mask, as of MeanSparse; not
    `where(x > t, x, t)`, which is a maximum.
    The last five are found where their value depends on a floating-point argument, not in random masks; not in a table
    look-up (`jnp.digitize`, argmin), nor in x - x % c.

    conv_layer, dense_layer: of value, kernel and bias, a convolution or product with all that is done to its channels
    afterwards: bias, and batch norm in eval mode, which is in the kernel and the bias given.
    softmax: of the logits, up to a shift.
    attention: of probabilities and values, the product of a softmax and what is no kernel.
    matmul: of two values, any other product of them, as of queries and keys.
    mul: of a signal and a gate, an elementwise product of two values that are computed from layers.
    activation: of x, x times a function of x: GELU, SiLU, hard swish, written in any way.
    deviation: of a variance, the root that a layer norm, RMS norm or group norm divides by, or one over it.

    A rule is a `Rule`, or a `ByLayer` of them, as `rules.by_layer` makes. An operation stands in the layers that are
    open where it is computed: Flax's modules, whose path is their names, and any `jax.named_scope`; outside all of
    them, in the layer that the next name of a value derived from it says.

    f may be jitted, and is entered through jit, remat, scan, cond, while, `shard_map`, and custom_jvp and custom_vjp
    functions that hold a match (whose own derivatives are then lost). What f names keeps its name: `tap` and `read`
    work on the result. Forward rules have derivatives of any order. Of backward rules there is no second derivative,
    and no forward mode.

    Raises UserError if no given rule finds its operation (one of several may find none), if a match lies in something
    that cannot be entered, and for a second derivative through a backward rule.
    """
    rules = {name: rule for name, rule in rules.items() if rule is not None}
    for name, rule in rules.items():
        if name not in OPERATIONS:
            raise UserError(f"with_rules: no operation '{name}'; there are {', '.join(OPERATIONS)}")
        if not isinstance(rule, Rule | ByLayer):
            raise UserError(f"with_rules: {name} must be a Rule(forward, backward), got {rule!r}")
    if not rules:
        raise UserError("with_rules: no rule is given, e.g. with_rules(predict, **guided)")
    labels = {label for rule in rules.values() if isinstance(rule, ByLayer) for label, _ in rule.layers if label}

    def ruled(*args, **kwargs):
        with naming() if labels else contextlib.nullcontext():
            closed, arrays, restore = trace(f, args, kwargs)
        if not operations(closed.jaxpr, rules):
            absent = ", nor ".join(OPERATIONS[name][1] for name in rules)
            raise UserError(f"with_rules: the function has no {absent}")
        if labels:
            _check(labels, sorted(set(_paths(closed.jaxpr, ""))))
        return restore(_evaluate(closed.jaxpr, closed.consts, arrays, rules, body_of(closed.jaxpr), ""))

    return ruled


def checked(rules: Any) -> Rules | None:
    """`rules` of a method's option: a dict like `guided`, or None; UserError for anything else."""
    if rules is None or (isinstance(rules, Mapping) and rules and set(rules) <= set(OPERATIONS)):
        return rules
    raise UserError(f"rules must be like guided or softplus(50), for {', '.join(OPERATIONS)}; got {rules!r}")


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], rules: Rules, around: Body, scope: str) -> list:
    """Results of the jaxpr under the rules; scope: the layers that are open around it."""
    ruled = {}
    for eqn in jaxpr.eqns:
        name, operation = match(eqn, around, rules)
        if name:
            layer = _path(eqn, jaxpr, scope) if isinstance(rules[name], ByLayer) else ""
            ruled[id(eqn)] = _rule_of(rules[name], operation, layer, around), operation
    live = _live(jaxpr, ruled)

    def rule(eqn, values, read):
        if id(eqn) not in live:
            return [None for _ in eqn.outvars]  # a layer's convolution, say, which its last step computes again
        if id(eqn) in ruled:
            chosen, operation = ruled[id(eqn)]
            if chosen is None:
                return None
            operands = [jnp.asarray(read(v)) for v in operation.operands]
            operands = operation.inputs(*operands) if operation.inputs else operands
            out = _ruled(chosen, operation.function)(*operands)
            return [jnp.asarray(out, eqn.outvars[0].aval.dtype)]
        within = operations_inside(eqn, around, tuple(rules))
        if not within:
            return None
        if not reaches(eqn):
            listed = " and ".join(sorted(within))
            raise UserError(f"with_rules: {listed} inside '{eqn.primitive.name}', which cannot be entered")
        deeper = "/".join(filter(None, (scope, _scope(eqn))))
        run = lambda body, *given: _evaluate(body, *given, rules, inside(eqn, body, around), deeper)
        return rebuild(eqn, values, run)

    return evaluate(jaxpr, consts, args, rule)


def _live(jaxpr: Jaxpr, ruled: Mapping[int, tuple[Any, Operation]]) -> set[int]:
    """The equations, by `id`, that are needed under the rules; whatever has a name is."""
    wanted, live = set(filter(_is_variable, jaxpr.outvars)), set()
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars) or eqn.primitive is name_p or eqn.effects:
            rule, operation = ruled.get(id(eqn), (None, None))
            live.add(id(eqn))
            wanted.update(filter(_is_variable, operation.operands if rule else eqn.invars))
    return live


def _is_variable(v: Any) -> bool:
    return not isinstance(v, Literal)


def _rule_of(rule: Rule | ByLayer, operation: Operation, layer: str, body: Body) -> Rule | None:
    """The rule for the operation that stands in this layer."""
    if isinstance(rule, Rule):
        return rule
    is_first = operation.operands[0] not in body.behind
    return next(
        (each for label, each in rule.layers if (is_first if label is None else _stands(layer, label))), rule.otherwise
    )


def _stands(path: str, label: str) -> bool:
    return f"/{label}/" in f"/{path}/"


def _scope(eqn: JaxprEqn) -> str:
    """The layers that are open where the equation was traced, a path."""
    return "/".join(part.name for part in eqn.source_info.name_stack.stack if type(part).__name__ == "Scope")


def _path(eqn: JaxprEqn, jaxpr: Jaxpr, scope: str) -> str:
    """Where the equation stands: the layers open around it, or the next name that is given to what it computes."""
    path = "/".join(filter(None, (scope, _scope(eqn))))
    if path:
        return path
    derived = depending(jaxpr, eqn.outvars)
    return next((e.params["name"] for e in jaxpr.eqns if e.primitive is name_p and e.invars[0] in derived), "")


def _paths(jaxpr: Jaxpr, scope: str) -> Iterator[str]:
    """Where the equations stand, at any depth."""
    for eqn in jaxpr.eqns:
        path = "/".join(filter(None, (scope, _scope(eqn))))
        yield from (path, eqn.params["name"] if eqn.primitive is name_p else path)
        for body in subjaxprs(eqn):
            yield from _paths(body, path)


def _check(labels: set[str], paths: Sequence[str]) -> None:
    for label in sorted(labels):
        if not any(_stands(path, label) for path in paths):
            listed = ", ".join(path for path in paths if path and "->" not in path)
            raise UserError(
                f"by_layer: nothing stands in a layer '{label}'; layers: {listed or 'the function has none'}"
            )


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
        if len(gradients) != len(inputs):
            raise UserError(
                f"with_rules: a backward rule returned {len(gradients)} gradient(s) for the {len(inputs)} operands of"
                " its operation; it must return a tuple, one for each"
            )
        is_float = lambda z: jnp.issubdtype(z.dtype, jnp.floating)  # masks and whole numbers have no gradient
        return tuple(g.astype(z.dtype) if is_float(z) else None for g, z in zip(gradients, inputs, strict=True))

    @backward.defjvp
    def second(primals, tangents):
        raise UserError(
            "with_rules: no second derivative through a backward rule, whose result is the gradient of no function; "
            "a forward rule such as softplus(50) has derivatives of any order"
        )

    ruled = jax.custom_vjp(forward)
    ruled.defvjp(lambda *inputs: (forward(*inputs), inputs), lambda inputs, gradient: backward(gradient, inputs))
    return ruled
