"""`transfer`: adversarial examples that are made on one network and tried on another."""

import functools
import re

import jax.numpy as jnp

from topgap_jax.attacks import state as states
from topgap_jax.attacks.state import FINISHED, RUNNING, book, check_ball, move, single
from topgap_jax.build import table
from topgap_jax.errors import UserError
from topgap_jax.scores import margin
from topgap_jax.types import Attack, Ball, Cost, Network, Predict


def transfer(ball: Ball, attack: Attack, source: str | Network | Predict) -> Attack:
    """`attack` on the network `source`, with every iterate, projected onto `ball`, tried on the network under attack.

    The attack is one in the norm of `ball`, and is given its radius.
    source: the folder of a run ('runs/plain'), a file of weights, or a published network's name; it must tell the same
    classes apart, in images of the same size. In Python a `Network`, or a function images (b, h, w, c) -> logits (b, k)
    with its variables bound inside the jitted function, as those of the network under attack are.

    The attack sees the logits of `source` only, also for its target classes, and goes on when it has broken that: what
    moves on to the other network is often a later iterate (Liu et al. 2017, arXiv 1611.02770). `search` is the attack's
    own state on `source`. Costs are of both networks together.
    """
    check_ball(ball)
    if single(attack).aim != "label":
        raise UserError(f"'{attack.name}' is no attack on the label in a ball; give one such as apgd(linf(8/255))")
    if attack.source is not None:
        raise UserError(f"'{attack.name}' is a transfer already")
    if attack.norm not in ("", ball.norm):
        raise UserError(f"transfer({ball.name}, ...): '{attack.name}' moves in {attack.norm}; give one in {ball.norm}")

    # Projected once more, an iterate moves by its rounding; one of an attack that leaves the ball comes into it.
    inside = lambda state, crafted: ball.project(state.images, crafted.delta, state.eps)

    def init(keys, predict, images, labels, logits, *, source, run=None, eps=None):
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        crafted = attack.init(keys, source, images, labels, source(images), run=run, eps=state.eps)
        finished = (state.status == RUNNING) & (crafted.status == FINISHED)
        state = state._replace(status=jnp.where(finished, FINISHED, state.status))
        return state._replace(delta=inside(state, crafted), target=crafted.target, search=crafted)

    def step(predict, state, *, source):
        logits = predict(state.images + state.delta)
        state = book(state, margin(logits, state.labels), logits)
        crafted = attack.step(source, state.search)
        return move(state, inside(state, crafted), crafted)

    cost = lambda predict, images, *, source: Cost(1, 0) + attack.cost(source, images)
    name = "transfer of " + re.sub(r"\b(linf|l2|l1)\([^()]*\)", ball.name, attack.name)
    both = attack._replace(init=init, step=step, cost=cost, name=name, samples=None, norm=ball.norm)
    if isinstance(source, str | Network):
        of = source if isinstance(source, str) else source.name
        return both._replace(name=f"{name}, from {of}", source=source)
    return bound(both, source)


def bound(attack: Attack, source: Predict | None) -> Attack:
    """The attack with its source: images -> logits, bound inside the jitted function. Without a source it is itself."""
    if source is None:
        return attack
    with_source = lambda function: functools.partial(function, source=source)
    parts = {name: with_source(getattr(attack, name)) for name in ("init", "step", "cost")}
    return attack._replace(**parts, source=None)


TABLE = table(transfer)
