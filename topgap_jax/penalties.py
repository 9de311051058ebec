"""Costs of a perturbation and the penalties on the gradient that they amount to: `l1_norm`, `l2_norm`, `elastic`,
`group_norm`.

Training on the costliest perturbation, max over delta of loss(x + delta) - R(delta), is to first order training on
loss(x) + R*(g), g the input gradient and R* the convex conjugate of R (Gong, Dou & Farnia 2024, arXiv 2404.04647). Each
function is named after R*. g is the gradient of one example's cross-entropy with respect to pixels in [0, 1], shape (b,
h, w, c).
"""

import math

import jax.numpy as jnp

from topgap_jax.build import check_number, table
from topgap_jax.errors import UserError
from topgap_jax.norms import direction_and_length
from topgap_jax.types import Penalty

AXES = (1, 2, 3)
# A perturbation on the rim of a constraint is inside, whatever the rounding: of its norm, and of (x + delta) - x with x
# in [0, 1].
SLACK, ROUNDING = 1e-5, 1e-7


def l1_norm(eps: float) -> Penalty:
    """R*(g) = eps |g|_1, for sparse maps; R: no pixel value moves by more than eps; maximiser eps sign(g), as in FGSM.

    g (b, h, w, c) (Gong, Dou & Farnia 2024, arXiv 2404.04647).
    """
    check_number("eps", eps, 0)
    project = lambda delta: jnp.clip(delta, -eps, eps)
    return Penalty(
        name=f"l1_norm({eps:.4g})",
        value=lambda gradient: eps * jnp.abs(gradient).sum(AXES),
        cost=lambda delta: _inside(jnp.abs(delta).max(AXES), eps, 1),
        maximiser=lambda gradient: eps * jnp.sign(gradient),
        prox=lambda delta, t: project(delta),
        project=project,
        scale=None,
        boxed=True,
    )


def l2_norm(eps: float) -> Penalty:
    """R*(g) = eps |g|_2; R: the perturbation is no longer than eps; maximiser eps g / |g|_2, 0 for g = 0.

    g (b, h, w, c) (Gong, Dou & Farnia 2024, arXiv 2404.04647).
    """
    check_number("eps", eps, 0)
    return _grouped(f"l2_norm({eps:.4g})", eps, lambda values: values.reshape(values.shape[0], -1), (1,))


def elastic(eps1: float, eps2: float) -> Penalty:
    """R*(g) = eps1 |g|_1 + eps2 |g|_2^2; maximiser eps1 sign(g) + 2 eps2 g.

    g (b, h, w, c) (Gong, Dou & Farnia 2024, arXiv 2404.04647). R(delta) = sum of max(|delta_i| - eps1, 0)^2 / (4 eps2).
    Moving by eps1 costs nothing. `elastic(0, eps2)` is double backpropagation's penalty.
    """
    check_number("eps1", eps1, 0)
    check_number("eps2", eps2, 0)
    if eps2 == 0:
        raise UserError("eps2 must be above 0; without its part the penalty is l1_norm(eps1)")

    def prox(delta, t):
        size, k = jnp.abs(delta), t / (2 * eps2)
        return jnp.where(size <= eps1, delta, jnp.sign(delta) * (size + k * eps1) / (1 + k))

    return Penalty(
        name=f"elastic({eps1:.4g}, {eps2:.4g})",
        value=lambda gradient: (eps1 * jnp.abs(gradient) + eps2 * gradient * gradient).sum(AXES),
        cost=lambda delta: (jnp.maximum(jnp.abs(delta) - eps1, 0.0) ** 2).sum(AXES) / (4 * eps2),
        maximiser=lambda gradient: eps1 * jnp.sign(gradient) + 2 * eps2 * gradient,
        prox=prox,
        project=lambda delta: delta,
        scale=2 * eps2,
        boxed=False,
    )


def group_norm(eps: float, patch: int, *, joint_channels: bool = True) -> Penalty:
    """R*(g) = eps sum over groups G of |g_G|_2, for connected maps; R: no group is longer than eps.

    g (b, h, w, c), maximiser eps g_G / |g_G|_2 (Gong, Dou & Farnia 2024, arXiv 2404.04647). Groups are tiles of patch x
    patch pixels, all channels together or, `joint_channels=False`, each by itself (the authors' code, with patch 14 at
    224 pixels). `patch` must divide height and width.
    """
    check_number("eps", eps, 0)
    check_number("patch", patch, 1, whole=True)
    axes = (2, 4, 5) if joint_channels else (2, 4)

    def tiles(values):
        b, h, w, c = values.shape
        if h % patch or w % patch:
            raise UserError(f"group_norm: patch={patch} does not divide images of {h}x{w}; take a divisor of both")
        return values.reshape(b, h // patch, patch, w // patch, patch, c)

    joint = "" if joint_channels else ", joint_channels=False"
    return _grouped(f"group_norm({eps:.4g}, {patch}{joint})", eps, tiles, axes)


def _grouped(name, eps, groups, axes):
    """The penalty eps * sum of the groups' lengths. `groups` reshapes (b, h, w, c) so that a group is what `axes` run
    over."""
    sum_up = lambda lengths: lengths.sum(tuple(range(1, lengths.ndim)))

    def maximiser(gradient):
        direction, _ = direction_and_length(groups(gradient), axes)
        return (eps * direction).reshape(gradient.shape)

    def project(delta):
        direction, length = direction_and_length(groups(delta), axes)
        return (direction * jnp.minimum(length, eps)).reshape(delta.shape)

    def cost(delta):
        values = groups(delta)
        _, length = direction_and_length(values, axes)
        return _inside(length.reshape(length.shape[0], -1).max(1), eps, math.prod(values.shape[axis] for axis in axes))

    return Penalty(
        name=name,
        value=lambda gradient: eps * sum_up(direction_and_length(groups(gradient), axes)[1]),
        cost=cost,
        maximiser=maximiser,
        prox=lambda delta, t: project(delta),
        project=project,
        scale=None,
        boxed=False,
    )


def _inside(size, eps, entries):
    """0 where the norm of so many entries is at most eps, else inf."""
    return jnp.where(size <= eps + max(eps * SLACK, ROUNDING * math.sqrt(entries)), 0.0, jnp.inf)


TABLE = table(l1_norm, l2_norm, elastic, group_norm)
