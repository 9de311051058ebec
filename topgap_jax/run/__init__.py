"""Everything that touches the disk or the terminal: configs, training, evaluation, checkpoints, progress."""
