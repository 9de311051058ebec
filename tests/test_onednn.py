"""The library behind the custom calls: found or not, right or not, never a crash, nothing leaked."""

import json
import os
import platform
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from topgap_jax import rewrite
from topgap_jax.engine import convolution, library, onednn

pytestmark = pytest.mark.skipif(not onednn.available(), reason=f"no oneDNN here: {onednn.reason()}")

SLOW = pytest.mark.slow

PROGRAM = """
    import logging, os, sys
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s", stream=sys.stdout)
    logging.getLogger("jax").setLevel(logging.ERROR)
    import jax, jax.numpy as jnp
    from jax import lax
    from topgap_jax.engine import convolution, onednn, library, explain, status
    {before}
    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    f = lambda x, w: (convolution(x, w, (2, 2), ((1, 1), (1, 1))) ** 2).sum()
    g = lambda x, w: (lax.conv_general_dilated(x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2).sum()
    for a, b in zip(jax.jit(jax.grad(f, (0, 1)))(x, w), jax.jit(jax.grad(g, (0, 1)))(x, w)):
        assert jnp.allclose(a, b, rtol=1e-5)
    print("path:", explain(f, x, w)[0])
    assert "OMP_WAIT_POLICY" not in os.environ
"""

CASES = {  # what is done before, and what the line in the log says
    "arm64": (
        "import platform; platform.machine = lambda: 'aarch64'",
        "it is for Linux on x86-64, this is linux on aarch64",
    ),
    "unknown jaxlib": (
        "import jaxlib; jaxlib.__version__ = '9.1.0'",
        "jaxlib 9.1.0 is not among those it was tried with",
    ),
    "not installed": (
        "import importlib.metadata as m\n    def files(name): raise m.PackageNotFoundError(name)\n    m.files = files",
        "it is not installed (pip install 'topgap-jax[cpu]')",
    ),
    "no library": (
        "import os; os.environ['TOPGAP_ONEDNN'] = '/nowhere/libdnnl.so.3'",
        "cannot open shared object file",
    ),
    "broken library": ("import os; os.environ['TOPGAP_ONEDNN'] = __file__", "OSError: "),
    "another library": ("import os; os.environ['TOPGAP_ONEDNN'] = 'libm.so.6'", "AttributeError: "),
    "wrong numbers": (
        "library.Ready.run = lambda self, pointers: None",
        "result of kind 1 with Fused(bias=False, residual=False, relu=False, mask=False, limit=inf) is not the definition's",
    ),
    "failing calls": ("library.INFERENCE = 7", "dnnl_convolution_forward_primitive_desc_create gives status"),
    "off": ("import os; os.environ['TOPGAP_ONEDNN'] = 'off'", "it is switched off by TOPGAP_ONEDNN"),
}


@pytest.mark.parametrize(
    "case", [case if case == "not installed" else pytest.param(case, marks=SLOW) for case in CASES]
)
def test_without_it_everything_works(case, tmp_path):
    """On another machine, with an unknown jaxlib, without or with a bad library: XLA's convolutions, and one line that
    says so."""
    before, said = CASES[case]
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM.format(before=before)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("topgap_jax")]
    assert len(lines) == 1 and "convolutions: XLA's, not oneDNN's (" in lines[0] and said in lines[0]
    assert ": xla (" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (lambda p: p.setattr(platform, "machine", lambda: "aarch64"), CASES["arm64"][1]),
        (lambda p: p.setattr(jaxlib, "__version__", "9.1.0"), CASES["unknown jaxlib"][1]),
        (lambda p: p.setenv("TOPGAP_ONEDNN", "off"), CASES["off"][1]),
        (lambda p: (p.setattr(onednn, "KEPT", []), p.setenv("TOPGAP_ONEDNN", "/nowhere/x.so")), CASES["no library"][1]),
        (lambda p: p.setattr(library.Ready, "run", lambda self, pointers: None), CASES["wrong numbers"][1]),
    ],
    ids=["arm64", "unknown jaxlib", "off", "no library", "wrong numbers"],
)
def test_why_it_is_not_used(patch, reason, monkeypatch):
    """The same without a program of its own, one case of each kind."""
    patch(monkeypatch)
    assert reason in onednn._reason.__wrapped__()


def test_errors_are_errors_of_xla():
    """A call that oneDNN refuses raises, and the next one works."""
    x, w = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    geometry = library.Geometry((4, 4), (3, 3), (1, 1), ((0, 0), (0, 0)))
    wrong = jax.jit(lambda x, w: onednn.call(library.FORWARD, (x, w), (1, 9, 9, 2), geometry))
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="topgap_onednn: RuntimeError: dnnl_convolution_forward"):
            wrong(x, w).block_until_ready()
    np.testing.assert_allclose(convolution(x, w, (1, 1), ((0, 0), (0, 0))), 18)


def test_an_interrupt_is_an_error(monkeypatch):
    """Not a result that was never computed."""

    def interrupted(self, pointers):
        raise KeyboardInterrupt

    monkeypatch.setattr(library.Ready, "run", interrupted)
    with pytest.raises(jax.errors.JaxRuntimeError, match="KeyboardInterrupt"):
        one((1, 6, 6, 2), 3).block_until_ready()
    monkeypatch.undo()
    np.testing.assert_array_equal(one((1, 6, 6, 2), 3), 36)


def shapes(count):
    """Small convolutions, no two alike, and their results."""
    for i in range(count):
        yield (1 + i % 3, 4 + i % 5, 4 + i % 7, 1 + i % 11), 1 + i // 8


def one(shape, out):
    return convolution(jnp.full(shape, 2.0), jnp.ones((3, 3, shape[3], out)), (1, 1), ((0, 0), (0, 0)))


@SLOW
def test_first_use_by_many_threads(tmp_path):
    """They wait for one of them to load it."""
    program = """
        from concurrent.futures import ThreadPoolExecutor
        from topgap_jax.engine import onednn
        with ThreadPoolExecutor(4) as pool:
            print(set(pool.map(lambda _: onednn.reason(), range(8))), len(onednn.KEPT))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stdout.strip() == "{''} 1", done.stderr


@SLOW
def test_an_interrupted_start_a_guard_and_a_number_of_threads():
    """A start that was interrupted is made again; a transfer guard is not meant for the self-test; OMP_NUM_THREADS
    wins."""
    program = """
        import jax
        from topgap_jax.engine import onednn
        test, onednn._self_test = onednn._self_test, lambda: exec("raise KeyboardInterrupt")
        try:
            onednn.reason()
        except KeyboardInterrupt:
            print("interrupted")
        onednn._self_test = test
        with jax.transfer_guard("disallow"):
            print(repr(onednn.reason()), [library.threads for library in onednn.KEPT])
    """
    words, environment = [sys.executable, "-c", textwrap.dedent(program)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.stdout == "interrupted\n'' [1]\n", done.stderr


@pytest.mark.parametrize("end", ["", *(pytest.param(end, marks=SLOW) for end in ("raise KeyboardInterrupt", "del y"))])
def test_the_end_waits_for_what_is_computed(end):
    """A process may end, well or badly, while its last step is still computed, also if nobody holds the result."""
    program = f"""
        import jax, jax.numpy as jnp
        from jax import lax
        from topgap_jax.engine import convolution, onednn
        assert onednn.available()
        # Without the product XLA takes it for a small thing, and does not return before it is done.
        step = lambda i, x: jnp.tanh(convolution(x, jnp.ones((3, 3, 16, 16)), (1, 1), ((1, 1), (1, 1)))) @ jnp.ones((16, 16))
        f = jax.jit(lambda x: lax.fori_loop(0, 500, step, x)).lower(jnp.ones((8, 32, 32, 16))).compile()
        y = f(jnp.ones((8, 32, 32, 16)))
        print(y.is_ready())
        {end}
    """
    words = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n" and done.returncode in ((0,) if "raise" not in end else (1, 130, -2)), done.stderr


def test_threads():
    """Four Python threads at once, same and different shapes: every result right."""
    wanted = list(shapes(6)) * 20
    with ThreadPoolExecutor(4) as pool:
        for (shape, out), result in zip(wanted, pool.map(lambda pair: np.asarray(one(*pair)), wanted)):
            assert result.shape == (shape[0], shape[1] - 2, shape[2] - 2, out) and (result == 18 * shape[3]).all()


@pytest.mark.parametrize(("count", "rounds"), [(20, 4), pytest.param(200, 49, marks=SLOW)])
def test_memory_is_bounded(monkeypatch, count, rounds):
    """10,000 calls over 200 shapes (in make test 100 over 20): kept is what they need, or the limit; memory does not
    grow."""
    (loaded,) = onednn.KEPT
    wanted = list(dict.fromkeys(shapes(400)))[:count]
    assert len(wanted) == count
    alive = lambda: sum(map(len, loaded.ready.values()))
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    for pair in wanted:
        one(*pair)
    before, memory = alive(), resident()
    for _ in range(rounds):
        for pair in wanted:
            one(*pair)
    # A second thread of XLA may have needed some of them at the same time as a first.
    assert before <= alive() <= 2 * before and resident() - memory < 30
    monkeypatch.setattr(library, "LIMIT", count // 4)
    for pair in wanted[: count // 2]:
        np.testing.assert_array_equal(one(*pair), 18 * pair[0][3])
    assert len(loaded.ready) == count // 4


CACHED = """
    import json, os, sys
    import jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # else what is slow on a busy machine
    from topgap_jax.run.cpu import configure_cpu
    configure_cpu(devices=int(sys.argv[2]))
    from topgap_jax.engine import available, convolution
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    f = lambda x, w: jnp.tanh(convolution(x, w, (2, 2), ((1, 1), (1, 1)))).sum()
    x = jax.device_put(jnp.linspace(0, 1, 8 * 192).reshape(8, 8, 8, 3), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    dx, dw = jax.jit(jax.grad(f, (0, 1)))(x, jnp.linspace(-1, 1, 108).reshape(3, 3, 3, 4) / 9)
    print(json.dumps([available(), float(jnp.abs(dx).sum()), float(jnp.abs(dw).sum())]))
"""


@SLOW
@pytest.mark.parametrize("devices", [1, 2])
def test_persistent_compilation_cache(devices, tmp_path):
    """A second process compiles nothing and finds the same numbers; one without the library neither profits nor
    suffers."""
    script, cache = tmp_path / "program.py", tmp_path / "cache"
    script.write_text(textwrap.dedent(CACHED))

    def run(**environment):
        words = [sys.executable, script, cache, str(devices)]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""} | environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), {path.name for path in cache.iterdir() if "-cache" in path.name}

    (used, *first), files = run()
    (again, *second), same = run()
    (off, *third), more = run(TOPGAP_ONEDNN="off")
    (back, *fourth), final = run()
    assert used and again and back and not off
    assert first == second == fourth and same == files and final == more
    np.testing.assert_allclose(third, first, rtol=1e-5)


@pytest.mark.parametrize(("pads", "size"), [("VALID", 64), (((1, 0), (0, 1)), 17)])
def test_weight_gradients_of_strided_1x1_convolutions(pads, size):
    """From 8 to 16 channels at 64x64 oneDNN's own kernel wrote past its buffer (AVX-512) and ended the process."""
    options = {"window_strides": (2, 2), "padding": pads, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    f = lambda x, w: (jax.lax.conv_general_dilated(x, w, **options) ** 2).sum()
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(8, size, size, 8), (1, 1, 8, 16)]))
    gradients = jax.jit(jax.grad(rewrite.fast_convs(f), argnums=(0, 1)))(x, w)
    for ours, laxs in zip(gradients, jax.jit(jax.grad(f, argnums=(0, 1)))(x, w)):
        np.testing.assert_allclose(ours, laxs, rtol=1e-4, atol=1e-4 * np.abs(laxs).max())
