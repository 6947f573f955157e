"""TensorFlow checkpoints without TensorFlow: Hugging Face's tf_model.h5 and google-research's bert_model.ckpt."""

import math
import re
import struct
from pathlib import Path

import numpy as np
import torch

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")  # whose names are known here
SUFFIXES = (".h5", ".index")
UNUSED = re.compile(  # heads of pre-training, what optimisers keep
    r"^cls/|^lm_head/|^(discriminator|generator)_(predictions|lm_head)/|^vocab_(transform|layer_norm|"
    r"projector)/|/(adam_[mv]|Adam(_1)?)$|^(global_step|beta[12]_power)$")
RENAMES = (
    (r"/layer_(?:\._)?(\d+)/", r"/layer/\1/"), (r"(_embeddings)(/embeddings)?$", r"\1/weight"),
    (r"/(gamma|kernel)$", "/weight"), (r"/beta$", "/bias"), (r"^output_(weight|bias)s?$", r"classifier/\1"))
DTYPES = {1: "<f4", 2: "<f8", 19: "<f2"}  # numbers of TensorFlow's types.proto, names of numpy


def find_checkpoint(source) -> Path | None:
    """The TensorFlow file of a folder, tf_model.h5 or the index of a TF1 checkpoint; None if there is neither. A file
    of that kind stands for itself. Raises ValueError if a folder has several."""
    source = Path(source)
    found = [source] if source.is_file() else sorted([*source.glob("tf_model.h5"), *source.glob("*.ckpt*.index")])
    if len(found) > 1:
        raise ValueError(f"{source} holds several TensorFlow checkpoints, {[x.name for x in found]}; name one file")
    return found[0] if found and found[0].suffix in SUFFIXES else None


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The float32 state dict of a TensorFlow file, by torch's names: all but what is known to be UNUSED. Raises
    ValueError or OSError naming a file that is cut off or corrupt, ImportError for tf_model.h5 without h5py."""
    state = {}
    for name, array in _read_h5(path) if path.suffix == ".h5" else _read_bundle(path):
        array = array.T if name.endswith("/kernel") else array  # [in, out] there, [out, in] here
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        state[name.replace("/", ".")] = torch.from_numpy(np.array(array, np.float32, order="C"))
    return state


def _read_h5(path: Path):
    """Names and arrays of a Keras file, LAYER/MODEL/bert/encoder/.../kernel:0; a layer mlm___cls stands for cls."""
    try:
        import h5py
    except ImportError:
        raise ImportError(f"{path.name} needs h5py: pip install xdistil[tf]") from None
    names = []
    try:
        with h5py.File(path) as file:
            file.visit(names.append)
            for full in names:
                name = re.sub(r"^\w*___", "", re.sub(r"^[^/]+/[^/]+/|:0$", "", full))
                if isinstance(file[full], h5py.Dataset) and not UNUSED.search(name):
                    yield name, file[full].astype(np.float32)[()]
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cut off or not a Keras file ({error}); get it again") from None


def _read_bundle(path: Path):
    """Names and arrays of a TF1 checkpoint: NAME.index is a leveldb table of protobuf messages that say where in
    NAME.data-* a tensor lies (TensorFlow's tensor_bundle.proto), with checksums of both."""
    try:
        table = path.read_bytes()
        _, at = _varint(table, len(table) - 48)  # the footer: offset and size of an empty block, then of the index
        _, at = _varint(table, at)
        entries = {key.decode(): dict(_message(value)) for _, place in _block(table, table[at:], path)
                   for key, value in _block(table, place, path)}
        n_files = entries.pop("")[1]
        for name, entry in entries.items():
            if UNUSED.search(name):
                continue
            data = path.with_name(f"{path.stem}.data-{entry.get(3, 0):05}-of-{n_files:05}")
            shape = [dict(_message(dim)).get(1, 0) for _, dim in _message(entry.get(2, b""))]
            dtype, offset, size = np.dtype(DTYPES.get(entry[1], "V0")), entry.get(4, 0), entry.get(5, 0)
            if math.prod(shape) * dtype.itemsize != size:
                raise ValueError(f"{path}: {name} is in slices or of another type than float, which is not read here")
            if data.stat().st_size < offset + size:
                raise ValueError(f"{data}: cut off before the end of {name}; get it again")
            array = np.fromfile(data, dtype, math.prod(shape), offset=offset)
            if masked_crc32c(array.view(np.uint8)) != entry[6]:
                raise ValueError(f"{data}: {name} has another checksum than in {path.name}; get both again")
            yield name, array.reshape(shape)
    except (IndexError, KeyError, struct.error, UnicodeDecodeError):
        raise ValueError(f"{path}: cut off or not the index of a TensorFlow checkpoint; get it again") from None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at a byte, seven bits in each, and where it ends."""
    value, shift = 0, 0
    while data[at] > 127:
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1


def _message(data: bytes):
    """The fields of a protobuf message: number, and value as an int or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        size, at = (4, at) if tag & 7 == 5 else _varint(data, at)
        at += size if tag & 7 else 0
        yield tag >> 3, {0: size, 2: data[at - size : at], 5: int.from_bytes(data[at - 4 : at], "little")}[tag & 7]


def _block(table: bytes, place: bytes, path: Path):
    """Keys and values of a block of a leveldb table; a key holds only what differs from the one before."""
    start, at = _varint(place, 0)
    size = _varint(place, at)[0]
    data, kind, checksum = struct.unpack(f"<{size}sBI", table[start : start + size + 5])
    if masked_crc32c(np.frombuffer(table, np.uint8, size + 1, start)) != checksum:
        raise ValueError(f"{path}: corrupt, a block has another checksum; get it again")
    if kind:
        raise ValueError(f"{path}: compressed by snappy, which is not read here; save it with TensorFlow's Saver")
    end, at, key = size - 4 - 4 * int.from_bytes(data[-4:], "little"), 0, b""
    while at < end:
        n_shared, at = _varint(data, at)
        n_new, at = _varint(data, at)
        length, at = _varint(data, at)
        key, at = key[:n_shared] + data[at : at + n_new], at + n_new + length
        yield key, data[at - length : at]


def masked_crc32c(data: np.ndarray) -> int:
    """CRC-32C of uint8 [n], n >= 4, as leveldb stores it. Modulo its polynomial x^6777 = x^484 + x^100 + 1, and so for
    powers 2^k of x: the front of the data is added further on, 64 bits at a time, then 8, until a few kB are left."""
    padding, crc, table = -len(data) % 8, 0, list(range(256))
    for _ in range(8):
        table = [x >> 1 ^ 0x82F63B78 * (x & 1) for x in table]
    data = np.concatenate([np.zeros(padding, np.uint8), data])  # zeros in front change nothing
    data[padding : padding + 4] ^= 255
    for kind in (np.uint64, np.uint8):
        words = data.view(kind)
        for start in range(0, len(words) - 6777, 6777 - 484):
            front = words[start : min(start + 6777 - 484, len(words) - 6777)]
            for ahead in (start + 6777, start + 6777 - 484, start + 6777 - 100):
                words[ahead : ahead + len(front)] ^= front
        data = words[-6777:].view(np.uint8)
    for byte in data.tobytes():
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
