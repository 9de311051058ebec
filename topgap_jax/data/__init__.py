"""Data: sources of records (any TFDS set, image folders, the embedded `shapes`), resident on the device or streamed."""

from topgap_jax.data.folder import folder, pictures
from topgap_jax.data.resident import as_batch, epoch_ids, evaluation_batches, gather, memory, resident
from topgap_jax.data.shapes import shapes
from topgap_jax.data.source import Record, Source, Splits, decode
from topgap_jax.data.stream import Stream, evaluation_stream, stream
from topgap_jax.data.tfds import tfds

__all__ = [
    "TABLE",
    "Record",
    "Source",
    "Splits",
    "Stream",
    "as_batch",
    "decode",
    "epoch_ids",
    "evaluation_batches",
    "evaluation_stream",
    "folder",
    "gather",
    "memory",
    "pictures",
    "resident",
    "shapes",
    "stream",
    "tfds",
]

TABLE = {"tfds": tfds, "folder": folder, "shapes": shapes}
