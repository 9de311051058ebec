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
"""Rules that a config may name without a call."""
ABOUT = {
    "deconvnet": "Deconvnet: what is positive goes back through ReLU (Zeiler & Fergus 2014, arXiv 1311.2901).",
    "guided": "Guided non-linearity of ReLU and max pooling, as the paper says (Kwon et al., ICPR 2020).",
    "guided_backprop": "Guided backprop: the positive part goes on behind each ReLU (Springenberg et al. 2015, arXiv "
    "1412.6806).",
    "guided_upsampled": "Guided non-linearity as its official code has it (Kwon et al., ICPR 2020).",
    "straight_through": "Rounding, floors, signs and thresholds have gradients (Bengio et al. 2013, arXiv 1308.3432).",
    "attn_lrp": "LRP through attention: softmax by its gradient, products half each (AttnLRP 2024, arXiv 2402.05602).",
    "cp_lrp": "LRP through attention whose probabilities are constants (Ali et al. 2022, arXiv 2202.07304).",
    "epsilon_alpha2_beta1": "LRP: alpha 2, beta 1 in convolutions, epsilon in dense layers (Bach et al. 2015).",
    "epsilon_alpha2_beta1_flat": "`epsilon_alpha2_beta1` with the flat rule in the first layer.",
    "epsilon_gamma_box": "LRP: box in the first layer, gamma .25 in convolutions, epsilon in dense layers (Montavon et "
    "al. 2019).",
    "epsilon_plus": "LRP: z+ in convolutions, epsilon in dense layers (Montavon et al. 2019).",
    "epsilon_plus_flat": "`epsilon_plus` with the flat rule in the first layer.",
    "excitation": "Excitation backprop: a walk down through excitatory weights (Zhang et al. 2016, arXiv 1608.00507).",
    "flat": "LRP-flat, for the first layer: relevance in equal parts to what a unit sees.",
    "w_square": "LRP-w^2, for the first layer: relevance in proportion to the squared weights (Montavon et al. 2017).",
    "z_plus": "LRP-z+: relevance to positive contributions only (Montavon et al. 2017, arXiv 1512.02479).",
}
"""What each is, in a sentence."""
