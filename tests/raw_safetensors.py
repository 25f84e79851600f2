"""Safetensors files written by hand, so that no reader is tested against its own writer."""

import json

import numpy as np

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}


def write_raw(path, tensors, *, align=8):
    """Write name → (type, shape, bytes); where the bytes are a dict, offset → bytes, the rest is a hole of zeros."""
    header, position = {}, 0
    for name, (dtype, shape, _) in tensors.items():
        size = int(np.prod(shape, dtype=object)) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % align)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (_, _, data) in tensors.items():
            start = 8 + len(text) + header[name]["data_offsets"][0]
            for offset, piece in data.items() if isinstance(data, dict) else [(0, data)]:
                file.seek(start + offset)
                file.write(piece)
        file.truncate(8 + len(text) + position)


def e4m3(data):
    """Decode bytes of E4M3, from the definition of the format."""
    codes = np.frombuffer(data, np.uint8).astype(np.int64)
    exponent, fraction = (codes >> 3) & 15, (codes & 7) / 8
    size = np.where(exponent > 0, (1 + fraction) * 2.0 ** (exponent - 7), fraction * 2.0**-6)
    return np.where(codes & 127 == 127, np.nan, np.where(codes >= 128, -size, size))


def e8m0(data):
    """Decode bytes of E8M0, from the definition of the format."""
    codes = np.frombuffer(data, np.uint8).astype(np.int64)
    return np.where(codes == 255, np.nan, 2.0 ** (codes - 127.0))


def random_e4m3(size, seed):
    """Random bytes of E4M3, NaN left out."""
    codes = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return np.where(codes & 127 == 127, 17, codes).astype(np.uint8).tobytes()
