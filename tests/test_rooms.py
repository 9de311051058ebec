"""The rooms as a program names them: `import topgap_jax as tg` and no other import."""

import ast
import subprocess
import sys
from pathlib import Path

import topgap_jax as tg

NAMES = """
tg.types.Measure tg.edges.check_images tg.build.build tg.engine.explain tg.engine.status tg.norms.direction_and_length
tg.order.kth_largest tg.keys.example_keys tg.mesh.data_mesh tg.pool.top_gap tg.scores.kl tg.balls.linf tg.penalties.l1_norm
tg.rewrite.with_rules tg.targets.malt_order tg.rewrite.speed.fast tg.metrics.gini tg.metrics.boxes.box_iou tg.drops.sgdrop tg.rules.guided
tg.explain.grad_cam tg.explain.field tg.explain.fields tg.attacks.attack tg.attacks.pgd tg.attacks.state.start
tg.models.linen tg.models.resnet20 tg.evaluators.accuracy tg.training.objectives.standard tg.training.schedules.cosine
tg.progress.bar tg.data.folder tg.data.tfds tg.pretrained.load tg.measure.evaluate.evaluate tg.measure.results.read
tg.run.fit.fit tg.run.cpu.configure_cpu tg.run.checkpoint.latest_step tg.setup.experiment tg.setup.evaluate tg.report.compare
""".split()


def test_every_room_is_there_in_a_fresh_interpreter():
    code = "import topgap_jax as tg\n" + "\n".join(f"assert callable({name}) or {name}" for name in NAMES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_room_is_named_and_no_other():
    folder = Path(tg.__file__).parent
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(tg.ROOMS) == there - {"__init__", "__main__", "cli", "errors"}


def test_every_key_is_made_in_one_place():
    """`jax.random.key` follows `jax_default_prng_impl`, and so would what an example draws beside its neighbours."""
    made = set()
    for path in Path(tg.__file__).parent.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call))
        made |= {path.name for call in calls if ast.unparse(call.func) in ("jax.random.key", "jax.random.PRNGKey")}
    assert made == {"keys.py"}
