"""Other forward and backward rules for the operations of a network nobody edited: guided backprop, softplus twins,
relevance.

Rules are given to the function before it is differentiated: `jax.grad(with_rules(f, **guided))`. In a function that has
been differentiated already, the backward pass stands beside the operation and no longer belongs to it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from jax.extend.core.primitives import custom_jvp_call_p

from topgap_jax.errors import UserError
from topgap_jax.rewrite.body import body_of, floating_inside
from topgap_jax.rewrite.interpreter import evaluate, reaches, rebuild, trace
from topgap_jax.rewrite.operations import OPERATIONS, match, operations, operations_inside
from topgap_jax.types import Rule, Rules


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
        if not isinstance(rule, Rule):
            raise UserError(f"with_rules: {name} must be a Rule(forward, backward), got {rule!r}")
    if not rules:
        raise UserError("with_rules: no rule is given, e.g. with_rules(predict, **guided)")

    def ruled(*args, **kwargs):
        closed, arrays, restore = trace(f, args, kwargs)
        if not operations(closed.jaxpr) & set(rules):
            absent = ", nor ".join(OPERATIONS[name][1] for name in rules)
            raise UserError(f"with_rules: the function has no {absent}")
        return restore(_evaluate(closed.jaxpr, closed.consts, arrays, rules))

    return ruled


def checked(rules: Any) -> Rules | None:
    """`rules` of a method's option: a dict like `guided`, or None; UserError for anything else."""
    if rules is None or (isinstance(rules, Mapping) and rules and set(rules) <= set(OPERATIONS)):
        return rules
    raise UserError(f"rules must be like guided or softplus(50), for {', '.join(OPERATIONS)}; got {rules!r}")


def _evaluate(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    rules: Rules,
    bare: bool = True,
    floating: Iterable[Any] | None = None,
) -> list:
    """Results of the jaxpr under the rules; `bare` and `floating` as of `body_of`."""
    around = body_of(jaxpr, bare, floating)

    def rule(eqn, values, read):
        name, operation = match(eqn, around)
        if name in rules:
            operands = [jnp.asarray(read(v)) for v in operation.operands]
            out = _ruled(rules[name], operation.function)(*operands)
            return [jnp.asarray(out, eqn.outvars[0].aval.dtype)]
        inside = set() if name else operations_inside(eqn, around)
        if not inside & set(rules):
            return None
        if not reaches(eqn):
            listed = " and ".join(sorted(inside & set(rules)))
            raise UserError(f"with_rules: {listed} inside '{eqn.primitive.name}', which cannot be entered")
        inner = bare and eqn.primitive is not custom_jvp_call_p
        within = lambda body, *given: _evaluate(body, *given, rules, inner, floating_inside(eqn, body, around))
        return rebuild(eqn, values, within)

    return evaluate(jaxpr, consts, args, rule)


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
