"""Arrays of a user's own, where they come in: each mistake is one line that says what would be right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topgap_jax import attacks, balls, edges, explain, metrics
from topgap_jax.attacks import attack
from topgap_jax.errors import UserError
from topgap_jax.measure.splits import resident_split

B = 4
IMAGES = np.random.default_rng(0).random((B, 6, 6, 3), np.float32)
LABELS = np.arange(B, dtype=np.int32)
KEYS = jax.random.split(jax.random.key(0), B)


def predict(images):
    return images.mean((1, 2)) @ jnp.arange(12.0).reshape(3, 4)


def error(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NAN = IMAGES.copy()
NAN[1, 2, 3, 0] = np.nan
ROWS = "labels must be an int array (4,), one class for each image, got "
TYPED = "keys must be 4 typed keys, one for each image, got "
MISTAKES = {
    "bytes": ((IMAGES * 255).astype(np.uint8), LABELS, KEYS, "these are uint8 from 0 to 25", "; give images / 255;"),
    "0 to 255": (IMAGES * 255, LABELS, KEYS, "these are float32 from ", "; give images / 255;"),
    "-1 to 1": (2 * IMAGES - 1, LABELS, KEYS, "these are float32 from -", "; give (images + 1) / 2;"),
    "normalised": (
        (IMAGES - 0.5) * 4,
        LABELS,
        KEYS,
        "; give pixels from 0 to 1; normalisation belongs inside the model",
    ),
    "NaN": (NAN, LABELS, KEYS, "some pixels of these are NaN"),
    "bool": (IMAGES > 0.5, LABELS, KEYS, "these are bool from 0 to 1"),
    "one image": (IMAGES[0], LABELS[:1], KEYS[:1], "(6, 6, 3) and type float32; images[None] is a batch of one"),
    "a list of images": (
        list(IMAGES),
        LABELS,
        KEYS,
        "images must be an array (b, h, w, c) of at least one image, got a list",
    ),
    "no image": (IMAGES[:0], LABELS[:0], KEYS[:0], "of at least one image, got an array of shape (0, 6, 6, 3)"),
    "a label too high": (IMAGES, LABELS + 1, KEYS, "label 4 is no class of a network with 4 logits"),
    "a label too low": (IMAGES, LABELS - 1, KEYS, "label -1 is no class of a network with 4 logits"),
    "float labels": (IMAGES, LABELS * 1.0, KEYS, ROWS + "an array of shape (4,) and type float64"),
    "one-hot labels": (IMAGES, np.eye(4), KEYS, ROWS, "; labels.argmax(-1) are the classes of one-hot rows"),
    "one label": (IMAGES, LABELS[:1], KEYS, ROWS + "an array of shape (1,) and type int32"),
    "a list of labels": (IMAGES, [0, 1, 2, 3], KEYS, ROWS + "a list; jnp.array(labels) is one"),
    "an int": (IMAGES, 3, KEYS, ROWS + "an int"),
    "names": (IMAGES, np.array(list("abcd")), KEYS, ROWS),
    "one key": (
        IMAGES,
        LABELS,
        KEYS[0],
        TYPED + "an array of shape () and type key<fry>; jax.random.split(jax.random.key(0), 4)",
    ),
    "a seed": (IMAGES, LABELS, 0, TYPED + "an int"),
    "a key of the old kind": (IMAGES, LABELS, np.zeros(2, np.uint32), TYPED + "an array of shape (2,) and type uint32"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_attacks_and_explanations_refuse(name):
    images, labels, keys, *words = MISTAKES[name]
    for where, function in {
        "attack": lambda: attack(attacks.pgd(balls.linf(0.1), steps=1), keys, predict, images, labels),
        "explain": lambda: explain.gradient()(keys, predict, images, labels),
    }.items():
        said = error(function)
        assert said.startswith(f"{where}: ") and all(word in said for word in words), said


def test_what_is_right_passes():
    for images in (IMAGES, IMAGES.astype(np.float64), jnp.asarray(IMAGES, jnp.bfloat16), np.zeros_like(IMAGES)):
        for labels in (LABELS, LABELS.astype(np.int64), LABELS.astype(np.uint8)):
            edges.check_examples("here", KEYS, predict, images, labels)
    edges.check_examples("here", None, predict, IMAGES, LABELS)
    jax.jit(lambda images: edges.check_images("here", images))(255 * IMAGES)  # inside jit code trusts its types


def test_a_network_is_a_function_of_images_that_returns_logits():
    gradient = explain.gradient()
    of = lambda predict, method=gradient: method(None, predict, IMAGES, LABELS)
    wanted = "explain: predict must be a function of images alone"
    assert error(of, {"params": IMAGES}).startswith(f"{wanted}, got a dict; models.bind(model, variables) makes one")
    assert "(missing a required argument: 'images')" in error(of, lambda variables, images: images)
    several = lambda images: {"logits": predict(images), "features": images.mean((1, 2))}
    for wrong, what in (
        (several, "returns a dict"),
        (lambda x: predict(x)[:, 0], "returns an array of shape (4,) and type float32"),
    ):
        assert f"the network must return float logits (b, k), one row for each image, and {what}: " in error(of, wrong)
    one = explain.targeted(gradient, lambda outputs: outputs["logits"][:, 1])
    np.testing.assert_array_equal(of(several, one), of(predict, explain.targeted(gradient, np.int64(1))))


def test_numpy_numbers_are_numbers():
    """Of an option that may also be an array, or a name."""
    three = np.int64(3)
    of = lambda method: method(KEYS, predict, IMAGES, LABELS)
    np.testing.assert_array_equal(of(explain.lime(three, samples=12)), of(explain.lime(3, samples=12)))
    with pytest.raises(UserError, match="k must be a whole number"):
        metrics.ranks.topk_intersection(np.ones((2, 4)), np.ones((2, 4)), np.int64(5))


def test_what_draws_at_random_needs_keys():
    of = lambda method: method(None, predict, IMAGES, LABELS)
    noisy = [explain.rise(masks=1), explain.smooth(explain.gradient(), samples=1), explain.integrated(baseline="noise")]
    for method in noisy:
        assert error(of, method).startswith("keys=None: this method draws at random")
    maps, batch = np.ones((B, 3, 3), np.float32), {"image": IMAGES, "label": LABELS}
    assert error(lambda: metrics.deletion(steps=1)(None, predict, maps, batch)).startswith("keys=None: ")
    assert of(explain.ensemble(explain.gradient(), explain.edges())).shape == (B, 6, 6)


ONE_STEP = attacks.pgd(balls.linf(0.1), steps=1)
FLOAT = "attack: the network must return float logits (4, k), one row for each image, and returns "
PREDICTS = {
    "no function": ("resnet", "attack: predict must be a function of images alone, got a str"),
    "NumPy": (
        lambda images: np.asarray(images).mean((1, 2)),
        "attack: predict must be a function of JAX arrays that can be traced, it raised TracerArrayConversion",
    ),
    "one number": (lambda images: images.mean((1, 2, 3)), FLOAT + "an array of shape (4,) and type float32"),
    "classes": (
        lambda images: predict(images).argmax(-1, keepdims=True),
        FLOAT + "an array of shape (4, 1) and type int32",
    ),
    "two results": (lambda images: (predict(images), 1), FLOAT + "a tuple"),
    "another batch": (lambda images: predict(images)[:2], FLOAT + "an array of shape (2, 4) and type float32"),
}


@pytest.mark.parametrize("name", PREDICTS)
def test_functions_that_are_no_network(name):
    function, text = PREDICTS[name]
    assert error(attack, ONE_STEP, KEYS, function, IMAGES, LABELS).startswith(text)


def test_a_network_without_keys_is_not_sampled():
    sampled = attacks.pgd(balls.linf(0.1), steps=1, samples=2)
    text = "attack: predict must be a function of images and keys alone (too many positional arguments)"
    assert error(attack, sampled, KEYS, predict, IMAGES, LABELS).startswith(text)


@pytest.mark.parametrize("eps", [-0.1, float("nan"), 1e20, "8/255", jnp.ones(3), jnp.ones((B, 1)), None])
def test_a_radius_of_the_call(eps):
    def run(images):
        return attack(attacks.pgd(balls.l2(0.1), steps=1), KEYS, predict, images, LABELS, eps=eps)

    if eps is None:
        assert jax.eval_shape(run, IMAGES).eps.shape == (B,)
        return
    assert error(run, IMAGES).startswith(
        "attack: eps must be a number in [0, 1e+06], or one for each of the 4 images, got "
    )


def test_images_are_attacked_in_float32():
    run = lambda images: attack(attacks.pgd(balls.linf(0.1), steps=2), KEYS, predict, images, LABELS)
    for kind in (jnp.bfloat16, jnp.float16):
        assert jax.eval_shape(run, jnp.asarray(IMAGES, kind)).best.dtype == jnp.float32


BYTES = (IMAGES * 255).astype(np.uint8)
SPLITS = {
    "pixels in [0, 1]": (IMAGES, LABELS, "image must be a uint8 array (n, h, w, c), got ", "(255 * image).round()"),
    "one picture": (BYTES[0], LABELS, "image must be a uint8 array (n, h, w, c), got an array of shape (6, 6, 3)"),
    "a list": (list(BYTES), LABELS, "image must be a uint8 array (n, h, w, c), got a list"),
    "float labels": (BYTES, LABELS * 1.0, "label must be an int array (4,), one class for each image, got "),
    "too few labels": (BYTES, LABELS[:3], "label must be an int array (4,), one class for each image, got "),
    "a label too high": (BYTES, LABELS + 1, "label 4 is none of 4 classes"),
    "a label too low": (BYTES, LABELS - 2, "label -2 is none of 4 classes"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits_refuse(name):
    image, label, *words = SPLITS[name]
    said = error(lambda: resident_split({"image": image, "label": label}, classes=4, batch=2))
    assert all(word in said for word in words), said


def test_metrics_refuse():
    batch = {"image": IMAGES, "label": LABELS, "mask": np.ones(B, bool), "id": LABELS}
    measure = lambda maps, **changes: metrics.gini()(KEYS, predict, maps, {**batch, **changes})
    maps = np.ones((B, 3, 3), np.float32)
    assert measure(maps)["gini"].shape == (B,)
    wanted = "metric: maps must be a float array (4, h', w'), one for each image, got "
    for wrong in (maps[:3], maps[0], maps.astype(int), [maps]):
        assert error(measure, wrong).startswith(wanted)
    assert error(lambda: measure(maps, image=255 * IMAGES)).startswith("metric: images must be float in [0, 1], ")


@pytest.mark.parametrize(
    "labels",
    [list(LABELS), LABELS - 1, LABELS + 99, LABELS.astype(np.float32), LABELS[:1]],
    ids=lambda each: type(each).__name__,
)
def test_metrics_refuse_labels(labels):
    batch = {"image": IMAGES, "label": labels, "mask": np.ones(B, bool), "id": LABELS}
    said = error(metrics.deletion(), KEYS, predict, np.ones((B, 3, 3), np.float32), batch)
    assert said.startswith("metric: label")


def test_a_radius_that_cannot_be_squared():
    """Its steps would be infinite, their projection 0: an attack that never moves and says robust."""
    assert error(balls.l2, 1e20) == "eps must be a number in [0, 1e+06], got 1e+20"
    too_far = "step_size must be a number in [0, 1e+06], got 1e+20"
    assert error(lambda: attacks.pgd(balls.l2(1), step_size=1e20)) == too_far
    state = attack(
        attacks.pgd(balls.l2(1e6), steps=2), KEYS, predict, IMAGES, predict(IMAGES).argmax(-1).astype(jnp.int32)
    )
    assert jnp.abs(state.images + state.delta - IMAGES).max() > 0.5
