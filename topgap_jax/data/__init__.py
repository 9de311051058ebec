"""Data: sources of records (any TFDS set, image folders, the embedded `shapes`), resident on the device or streamed."""

from topgap_jax.build import merged
from topgap_jax.data import folder, shapes, tfds
from topgap_jax.data.folder import pictures
from topgap_jax.data.resident import as_batch, epoch_ids, evaluation_batches, gather, memory, resident
from topgap_jax.data.segments import slic
from topgap_jax.data.source import Record, Source, Splits, decode, with_classes
from topgap_jax.data.stream import Stream, evaluation_stream, stream

TABLE = merged(folder.TABLE, shapes.TABLE, tfds.TABLE)
globals().update(TABLE)  # the methods, also where a file has the name of one
