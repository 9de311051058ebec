"""What Top-GAP costs: the whole training step with `top_gap` beside `gap`, and ways of top-k pooling alone.

    python experiments/bench_pool.py

Goals: at most 1.05x where ResNet-20 pools its 10 class maps (128, 8, 8, 10), at most 1.10x where it pools (128, 16, 16, 64).
One process per setting, asked in turn; ratio = time with top_gap over time with gap, median over the rounds.
"""

STEPS = {  # title: (head with its pool, image classes, k, limit)
    "ResNet-20, maps (128, 8, 8, 10)": ("map_head({pool})", 10, 16, 1.05),
    "ResNet-20 + pyramid, maps (128, 16, 16, 64)": ("pyramid_head({pool}, width=32, finest=2)", 64, 64, 1.10),
}
SHAPES = {(128, 8, 8, 10): 16, (128, 8, 8, 64): 16, (128, 16, 16, 64): 64}
