"""`transfer`: adversarial examples that are made on one network and tried on another."""

import jax.numpy as jnp

from topgap_jax.attacks import state as states
from topgap_jax.attacks.state import FINISHED, RUNNING, book, move
from topgap_jax.scores import margin
from topgap_jax.types import Attack, Ball, Cost, Predict


def transfer(ball: Ball, attack: Attack, source: Predict) -> Attack:
    """`attack` on the network `source`, with every iterate inside `ball` tried on the network under attack.

    source: images (b, h, w, c) -> logits (b, k), with its variables bound inside the jitted function, as those of the
    network under attack are. The attack sees the logits of `source` only, also for its target classes, and goes on when
    it has broken that: what moves on to the other network is often a later iterate (Liu et al. 2017, arXiv 1611.02770).
    `search` is the attack's own state on `source`. Costs are of both networks together.
    """

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        crafted = attack.init(keys, source, images, labels, source(images), run=run, eps=state.eps)
        finished = (state.status == RUNNING) & (crafted.status == FINISHED)
        state = state._replace(status=jnp.where(finished, FINISHED, state.status))
        return state._replace(delta=crafted.delta, target=crafted.target, search=crafted)

    def step(predict, state):
        inside = ball.size(state.delta) <= state.eps * (1 + 1e-6)
        logits = predict(state.images + state.delta)
        state = book(state, margin(logits, state.labels), logits, inside)
        crafted = attack.step(source, state.search)
        return move(state, crafted.delta, crafted)

    cost = lambda predict, images: Cost(1, 0) + attack.cost(source, images)
    return attack._replace(init=init, step=step, cost=cost, name=f"transfer of {attack.name}", samples=None)
