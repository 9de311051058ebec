"""The same function with its convolutions at the speed of the machine."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core.primitives import conv_general_dilated_p
from jax.lax import ConvDimensionNumbers

from topgap_jax.engine import convolution, refusal
from topgap_jax.rewrite.interpreter import evaluate, keeps_derivatives, rebuild, subjaxprs, trace


def fast_convs(f: Callable) -> Callable:
    """f with the convolutions of `engine`, on a CPU; elsewhere f itself. For any function, before it is differentiated.

    Derivatives of any order, in loops too, are then made of fast convolutions: `jax.grad(fast_convs(predict))`. Around
    a gradient, `fast_convs(jax.grad(predict))`, the numbers are right but most of the gain is lost. What the engine
    does not take (dilated images, a batch in groups, other ranks) and what stands inside a function with derivatives of
    its own stays as it is; `engine.explain(fast_convs(f), *args)` says which. The numbers are those of finite ones: see
    `engine.convolution`.
    """

    def fast(*args, **kwargs):
        if jax.default_backend() != "cpu":
            return f(*args, **kwargs)
        return _replaced(f, args, kwargs, _by_engine, refusal)

    return fast


def canonical_convs(f: Callable) -> Callable:
    """f with every convolution in the layout NHWC, HWIO, by explicit transposes; for the body of a loop on a CPU.

    It is for what `fast_convs` does not take, and for functions that are differentiated already. Outside loops XLA does
    this itself. Inside, a gradient with respect to images keeps the transposed kernels that JAX writes, for which XLA's
    CPU has nothing but naive loops: 12 times slower with a ResNet-20. Also loops inside f are entered, so that the
    derivative of an explanation that loops is `canonical_convs(jax.grad(...))`.
    """
    return lambda *args, **kwargs: _replaced(f, args, kwargs, _by_lax, lambda eqn: "")


def _replaced(f, args, kwargs, replace, refusal):
    """f(*args, **kwargs) with `replace(equation, images NHWC, kernel HWIO)` in place of each convolution that is not
    refused."""
    closed, arrays, restore = trace(f, args, kwargs)
    takes = lambda eqn: eqn.primitive is conv_general_dilated_p and not refusal(eqn)

    def holds(jaxpr: Jaxpr) -> bool:
        return any(takes(eqn) or any(holds(body) for body in subjaxprs(eqn)) for eqn in jaxpr.eqns)

    def run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list:
        return evaluate(jaxpr, consts, args, rule)

    def rule(eqn, values, read):
        if takes(eqn):
            return [_in_order(replace, eqn, *values)]
        if keeps_derivatives(eqn) and any(holds(body) for body in subjaxprs(eqn)):
            return rebuild(eqn, values, run)
        return None

    return restore(run(closed.jaxpr, closed.consts, arrays))


def _in_order(replace: Callable, eqn: JaxprEqn, left: Any, right: Any) -> Any:
    """The equation by a convolution of NHWC with HWIO, whatever the order of its axes; any number of spatial axes."""
    numbers = eqn.params["dimension_numbers"]
    last = lambda spec: (spec[0], *spec[2:], spec[1])  # (batch, channel, space) -> (batch, space, channel)
    out_channel, in_channel, *space = numbers.rhs_spec
    out = replace(eqn, left.transpose(last(numbers.lhs_spec)), right.transpose((*space, in_channel, out_channel)))
    return out.transpose(np.argsort(last(numbers.out_spec)))


def _by_engine(eqn: JaxprEqn, images: Any, kernel: Any) -> Any:
    params = eqn.params
    groups, dilation = params["feature_group_count"], params["rhs_dilation"]
    return convolution(images, kernel, params["window_strides"], params["padding"], groups=groups, dilation=dilation)


def _by_lax(eqn: JaxprEqn, images: Any, kernel: Any) -> Any:
    n = images.ndim
    order = (0, n - 1, *range(1, n - 1))
    numbers = ConvDimensionNumbers(order, (n - 1, n - 2, *range(n - 2)), order)
    return conv_general_dilated_p.bind(images, kernel, **(eqn.params | {"dimension_numbers": numbers}))
