"""`noise`: what no gradient is needed for, random points of the ball and its corners."""

from topgap_jax.attacks import state as states
from topgap_jax.attacks.naming import options_in_name
from topgap_jax.attacks.state import book, check_ball, move, run_keys, step_keys, where
from topgap_jax.build import check_number, table
from topgap_jax.keys import normal
from topgap_jax.scores import margin
from topgap_jax.types import Attack, Ball, Cost


@options_in_name("draws")
def noise(ball: Ball, *, draws: int = 1000) -> Attack:
    """Additive noise: in turn `draws` random points of the ball and `draws` of its corners, x + eps * ascent(N(0, I)).

    In linf a corner has every pixel value at +-eps, in l2 it is a point of the sphere, in l1 one pixel value. A model
    that this breaks where an attack with gradients did not has misled the attack (Athalye et al. 2018, arXiv
    1802.00420). Forward passes only.
    """
    check_ball(ball)
    check_number("draws", draws, 1, whole=True)

    def init(keys, predict, images, labels, logits, *, run=None, eps=None):
        state = states.start(keys, images, labels, logits, eps=ball.eps if eps is None else eps, run=run)
        drawn = ball.start(run_keys(state), images, state.eps)
        return state._replace(delta=ball.project(images, drawn, state.eps))

    def step(predict, state):
        logits = predict(state.images + state.delta)
        state, keys = book(state, margin(logits, state.labels), logits), step_keys(state)
        corner = state.eps[:, None, None, None] * ball.ascent(normal(keys, state.images))
        point = where(state.count % 2 == 0, corner, ball.start(keys, state.images, state.eps))
        return move(state, ball.project(state.images, point, state.eps))

    # The last point is evaluated after the last step.
    name = f"noise 2 x {draws}, {ball.name}"
    return Attack(init, step, 2 * draws - 1, lambda predict, images: Cost(1, 0), name, norm=ball.norm)


TABLE = table(noise)
