"""`python -m topgap_jax ...` is `topgap ...`."""

from topgap_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
