"""What papers do to the operations of a network, as rules for `rewrite.with_rules(f, **rules)`."""

from topgap_jax.build import merged, table
from topgap_jax.rules import attention, composites, relevance
from topgap_jax.rules.attention import attn_lrp, cp_lrp
from topgap_jax.rules.composites import (
    epsilon_alpha2_beta1,
    epsilon_alpha2_beta1_flat,
    epsilon_gamma_box,
    epsilon_plus,
    epsilon_plus_flat,
    excitation,
)
from topgap_jax.rules.nonlinearity import deconvnet, guided, guided_backprop, guided_upsampled, rect_grad, softplus
from topgap_jax.rules.relevance import alpha_beta, box, by_layer, epsilon, flat, gamma, w_square, z_plus
from topgap_jax.rules.straight_through import straight_through

TABLE = merged(relevance.TABLE, table(rect_grad, softplus))
VALUES = merged(
    {
        "deconvnet": deconvnet,
        "guided": guided,
        "guided_backprop": guided_backprop,
        "guided_upsampled": guided_upsampled,
        "straight_through": straight_through,
    },
    attention.VALUES,
    composites.VALUES,
    relevance.VALUES,
)
"""Rules that a config may name without a call. `guided` is the non-linearity of Kwon et al. (ICPR 2020)."""
