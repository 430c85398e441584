"""Writes a GGUF file again with every tensor in float32: the same weights for a server that is to compute exactly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

_WRITTEN_ANYWAY = ("GGUF.", "general.architecture", "general.file_type")


def dequantise(source: Path, target: Path, *, noise: float = 0.0) -> None:
    """Write ``source`` to ``target`` in float32, with noise in its matrices: a share of their standard deviation."""
    generator = np.random.default_rng(0)
    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(_value(reader.fields["general.architecture"])))
    for name, field in reader.fields.items():
        if not name.startswith(_WRITTEN_ANYWAY):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, _value(field), field.types[0], sub_type=inner)
    writer.add_file_type(0)  # all float32
    for tensor in reader.tensors:
        plain = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if noise and len(tensor.shape) > 1:
            plain += (noise * plain.std() * generator.standard_normal(plain.shape)).astype(np.float32)
        writer.add_tensor(tensor.name, plain.reshape(tuple(reversed(tensor.shape.tolist()))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value(field: Any) -> Any:
    return field.contents()


if __name__ == "__main__":
    dequantise(Path(sys.argv[1]), Path(sys.argv[2]))
