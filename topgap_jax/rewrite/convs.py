"""Convolutions that stay fast inside a loop."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr
from jax.extend.core.primitives import conv_general_dilated_p, custom_jvp_call_p, custom_vjp_call_p
from jax.lax import ConvDimensionNumbers

from topgap_jax.rewrite.interpreter import evaluate, reaches, rebuild, subjaxprs, trace


def canonical_convs(f: Callable) -> Callable:
    """f with every convolution in the layout NHWC, HWIO, by explicit transposes; for the body of a loop on a CPU.

    Outside loops XLA does this itself. Inside, a gradient with respect to images keeps the transposed kernels that JAX writes,
    for which XLA's CPU has nothing but naive loops: 12 times slower with a ResNet-20. Also loops inside f are entered, so that
    the derivative of an explanation that loops is `canonical_convs(jax.grad(...))`.
    """

    def canonical(*args, **kwargs):
        closed, arrays, restore = trace(f, args, kwargs)
        return restore(_evaluate(closed.jaxpr, closed.consts, arrays))

    return canonical


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list:
    def rule(eqn, values, read):
        if eqn.primitive is conv_general_dilated_p:
            return [_convolution(*values, **eqn.params)]
        own = eqn.primitive in (custom_jvp_call_p, custom_vjp_call_p)  # entered, it would lose its own derivative
        if reaches(eqn) and not own and any(_holds(body) for body in subjaxprs(eqn)):
            return rebuild(eqn, values, _evaluate)
        return None

    return evaluate(jaxpr, consts, args, rule)


def _convolution(left, right, *, dimension_numbers, **options):
    n = left.ndim
    last = lambda spec: (spec[0], *spec[2:], spec[1])  # (batch, channel, space) -> (batch, space, channel)
    (out_channel, in_channel, *space), images = dimension_numbers.rhs_spec, (0, n - 1, *range(1, n - 1))
    out = conv_general_dilated_p.bind(
        left.transpose(last(dimension_numbers.lhs_spec)),
        right.transpose((*space, in_channel, out_channel)),
        dimension_numbers=ConvDimensionNumbers(images, (n - 1, n - 2, *range(n - 2)), images),
        **options,
    )
    return out.transpose(np.argsort(last(dimension_numbers.out_spec)))


def _holds(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive is conv_general_dilated_p or any(_holds(body) for body in subjaxprs(eqn)) for eqn in jaxpr.eqns
    )
