"""What papers do to the operations of a network, as rules for `rewrite.with_rules(f, **rules)`."""

from topgap_jax.build import table
from topgap_jax.rules.nonlinearity import guided, guided_backprop, guided_upsampled, softplus
from topgap_jax.rules.straight_through import straight_through

TABLE = table(softplus)
VALUES = {
    "guided": guided,
    "guided_backprop": guided_backprop,
    "guided_upsampled": guided_upsampled,
    "straight_through": straight_through,
}
"""Rules that a config may name without a call. `guided` is the non-linearity of Kwon et al. (ICPR 2020)."""
