"""`in_float32`: what a half-precision function gives in float32, through everything that can be entered, and in its
derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from topgap_jax.errors import UserError
from topgap_jax.rewrite import in_float32, layers

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 3)), jnp.float32)


class Net(nn.Module):
    dtype: object

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), dtype=self.dtype)(x)), (2, 2), (2, 2))
        x = nn.LayerNorm(dtype=self.dtype)(nn.avg_pool(x, (2, 2)))
        x = nn.softplus(0.37 * x) + jnp.arange(4, dtype=x.dtype) + jnp.full((), 0.5, x.dtype)
        return nn.Dense(3, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)


VARIABLES = Net(jnp.float32).init(jax.random.key(0), X)
net = lambda dtype: lambda x: Net(dtype).apply(VARIABLES, x)


def squared_gradient(f):
    """A second derivative: the gradient of |gradient|^2."""
    inner = lambda x: (jax.grad(lambda x: f(x)[:, 0].sum())(x) ** 2).sum()
    return jax.grad(inner)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_network(dtype):
    """Equal to the same network of float32 layers, in value and in the second derivative, eager, jitted and under
    remat."""
    full, half = net(jnp.float32), net(dtype)
    assert np.abs(half(X) - full(X)).max() > 1e-4
    # A literal of the network, .37, stays what half precision makes of it.
    rounded = lambda x: jnp.asarray(jnp.asarray(x, dtype), jnp.float32)
    expected = full(X)
    for f in (half, jax.jit(half), jax.checkpoint(half)):
        np.testing.assert_allclose(in_float32(f)(X), expected, atol=3 * float(abs(rounded(0.37) - 0.37)))
    ours = jax.jit(squared_gradient(in_float32(jax.jit(half))))(X)
    theirs = jax.jit(squared_gradient(full))(X)
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=6e-3)  # again the literal
    if dtype == jnp.bfloat16:
        rough = jax.jit(squared_gradient(half))(X)
        assert np.abs(rough - theirs).max() > 3 * np.abs(ours - theirs).max()


def test_loops_and_branches():
    """scan, while and cond carry float32."""

    def f(x):
        x = x.astype(jnp.bfloat16)
        x, rows = lax.scan(lambda carry, _: (carry * 1.5 + x, carry.sum()), x, None, length=3)
        x = lax.fori_loop(0, 2, lambda _, carry: jnp.sin(carry), x)
        x = lax.cond(rows.sum() > 1e9, lambda x: x, lambda x: x / 3, x)
        return x + lax.while_loop(lambda v: v[0] < 2, lambda v: (v[0] + 1, v[1] * v[1]), (0, x))[1]

    by_hand = np.float64(X)
    carry = by_hand
    for _ in range(3):
        carry = carry * 1.5 + by_hand
    carry = np.sin(np.sin(carry)) / 3
    np.testing.assert_allclose(in_float32(f)(X), carry + carry**4, atol=1e-5)
    assert in_float32(f)(X).dtype == jnp.float32


def test_literals_are_widened_where_they_are_results():
    """Of a branch, and of the function itself."""
    half = jnp.bfloat16(1.5)
    branch = lambda x: lax.cond(x.sum() > 1e9, lambda x: x.astype(jnp.bfloat16).sum(), lambda x: half, x)
    for f in (branch, lambda x: half, lambda x: jnp.bfloat16(1.5) * 1):
        for jitted in (lambda f: f, jax.jit):
            out = jitted(in_float32(f))(X)
            assert out.dtype == jnp.float32 and out == 1.5


def test_custom_derivatives_are_kept():
    @jax.custom_jvp
    def odd(x):
        return x * x

    odd.defjvp(lambda primals, tangents: (odd(*primals), 100 * primals[0] * tangents[0]))
    f = in_float32(lambda x: odd(x.astype(jnp.bfloat16)).astype(jnp.float32).sum())
    x = jnp.float32([0.1, 1.7])
    np.testing.assert_allclose(f(x), (x * x).sum(), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(f)(x), 100 * x, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: jax.grad(f)(x).sum())(x), [100, 100], rtol=1e-6)


def test_what_is_in_float32_already_stays():
    f = net(jnp.float32)
    np.testing.assert_array_equal(jax.jit(in_float32(f))(X), jax.jit(f)(X))
    assert in_float32(lambda x, flag: x if flag else None)(X, True) is not None
    assert [x.name for x in layers(in_float32(net(jnp.bfloat16)), X)] == [x.name for x in layers(f, X)]
    assert in_float32(lambda x: (x.astype(jnp.bfloat16) > 0).sum())(X).dtype == jnp.int32


def test_error():
    def f(x):
        return lax.reduce(x.astype(jnp.bfloat16), jnp.bfloat16(0), lambda a, b: a + b * b, (0,))

    with pytest.raises(UserError) as raised:
        in_float32(f)(X)
    assert str(raised.value) == (
        "in_float32: half precision inside 'reduce', which cannot be entered; give the model float32 layers"
    )
