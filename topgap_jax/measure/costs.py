"""What a method costs on a model, from shapes alone."""

import jax

from topgap_jax.models import bind
from topgap_jax.types import Cost, Costs, Model, Variables


def cost_of(cost: Costs, model: Model, variables: Variables, images: jax.Array) -> Cost:
    """What a method's `cost` says for this model and images of this size; the model is traced, not run."""
    costs = []
    jax.eval_shape(lambda variables, images: costs.append(cost(bind(model, variables), images)), variables, images)
    return costs[0]
