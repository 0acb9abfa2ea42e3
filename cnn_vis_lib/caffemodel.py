"""The names and shapes of a caffemodel's weights, read directly from protobuf's wire format:
Python's protobuf would hold all the numbers in memory, in each worker."""

import itertools
import mmap
import re

import numpy as np

from .errors import one_line, refusal
from .files import extension_of, read_bytes

HTML = (b"<!doctype", b"<html", b"<head", b"<!--", b"<?xml")  # how a web page starts, in lower case


def varint(data, start):
    """Returns (the integer that starts at data[start], the position after it)."""
    value = 0
    for number in range(10):
        byte = data[start + number]
        value |= (byte & 127) << 7 * number
        if byte < 128:
            return value, start + number + 1
    raise ValueError("it is damaged or in another format")


def wire_fields(data):
    """Yields (number, value) for each field of a message in wire format, a memoryview. Values are
    integers, or memoryviews if they have a length or a fixed size. Raises ValueError."""
    position = 0
    try:
        while position < len(data):
            tag, position = varint(data, position)
            number, kind = divmod(tag, 8)
            if kind == 0:
                value, position = varint(data, position)
                yield number, value
                continue
            length, position = (
                varint(data, position) if kind == 2 else ({1: 8, 5: 4}[kind], position)
            )
            if position + length > len(data):
                raise IndexError
            yield number, data[position : position + length]
            position += length
    except IndexError:
        raise ValueError("it ends too early") from None
    except KeyError:
        raise ValueError("it is damaged or in another format") from None


def wire_shape(blob):
    """The shape of a BlobProto in wire format. In the older format it always has four axes, padded
    with leading ones. A blob that says nothing about its shape has no axes: it is one number."""
    older = {}
    for number, value in wire_fields(blob):
        if number == 7:
            return tuple(wire_integers(value))
        if number in (1, 2, 3, 4):
            older[number] = value
    return tuple(older.get(number, 0) for number in (1, 2, 3, 4)) if older else ()


def wire_integers(shape):
    """The dimensions in a BlobShape in wire format, packed or one by one."""
    for number, value in wire_fields(shape):
        if number != 1:
            continue
        position = 0
        while isinstance(value, memoryview) and position < len(value):
            side, position = varint(value, position)
            yield side
        if not isinstance(value, memoryview):
            yield value


LAYERS = {100: (1, 7), 2: (4, 6)}  # field numbers: {layers: (their name, their blobs)}
V0_LAYER = (1, 50)


def wire_layer(layer, name_number, blobs_number):
    """(name, shapes of its blobs) of a layer in wire format."""
    name, shapes = "", []
    for number, value in wire_fields(layer):
        if (name_number, number) == (4, 1):  # a V0 layer inside a V1 layer
            return wire_layer(value, *V0_LAYER)
        if number == name_number:
            name = bytes(value).decode(errors="replace")
        if number == blobs_number:
            shapes.append(wire_shape(value))
    return name, shapes


def read_weights(path):
    """The layers of the caffemodel `path` as {name: shapes of its blobs}. Raises BadRequest."""
    try:
        with open(path, "rb") as file:
            start = file.read(100).lstrip().lower()
            problem = next((NOT_WEIGHTS[key] for key in NOT_WEIGHTS if start.startswith(key)), None)
            if problem:
                raise refusal("caffe_model", path, problem)
            if re.match(rb"pk\x03\x04|\x80[\x02-\x05]", start):  # archives and pickles
                raise foreign_weights(path)
            if not start:
                return {}
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            fields = wire_fields(data)
            layers = dict(wire_layer(value, *LAYERS[n]) for n, value in fields if n in LAYERS)
            if not layers and extension_of(path) in FOREIGN:
                raise foreign_weights(path)
            return layers
    except OSError as error:
        problem = error.strerror
        raise refusal(
            "caffe_model", path, problem, "make it readable, or use another file"
        ) from None
    except (ValueError, TypeError) as error:  # the file may contain anything
        reason = one_line(error) if isinstance(error, ValueError) else "it is in another format"
        problem = f"cannot be read as Caffe weights ({reason})"
        if extension_of(path) in FOREIGN:
            raise foreign_weights(path) from None
        remedy = "use a complete .caffemodel; was the download cut short?"
        raise refusal("caffe_model", path, problem, remedy) from None


def foreign_weights(path):
    """The refusal of another program's weights."""
    program = FOREIGN.get(extension_of(path), "another program")
    problem = f"these are {program}'s weights, not Caffe's"
    return refusal("caffe_model", path, problem, "use a .caffemodel")


WEB_PAGE = "this is a web page, not weights; download the file itself"
FOREIGN = {  # other programs, by the endings of their files
    ".h5": "Keras",
    ".keras": "Keras",
    ".onnx": "ONNX",
    ".pb": "TensorFlow",
    ".pt": "PyTorch",
    ".pth": "PyTorch",
    ".safetensors": "PyTorch",
    ".t7": "Torch",
    ".tflite": "TensorFlow",
}
NOT_WEIGHTS = {  # how a file starts, in lower case: what it is, and the remedy
    b"version https://git-lfs": "this is a Git LFS pointer, not the weights; run: git lfs pull",
    b"\x89hdf": "these are HDF5 weights; save them as .caffemodel with a Caffe that has HDF5",
    **dict.fromkeys(HTML, WEB_PAGE),
}


def read_binaryproto(path):
    """The numbers in the BlobProto `path`, float32 (N,). Raises ValueError."""
    found = {5: [], 8: []}  # single and double precision
    for number, value in wire_fields(memoryview(read_bytes(path))):
        if number in found and isinstance(value, memoryview):
            found[number].append(value)
    single, double = (b"".join(parts) for parts in found.values())
    return np.frombuffer(single, "<f4") if single else np.frombuffer(double, "<f8").astype("f4")


def without_leading_ones(shape):
    """The shape without the leading ones of the older format, so that shapes from both formats can
    be compared."""
    return tuple(itertools.dropwhile(lambda side: side == 1, shape))


def misfits(net, weights):
    """{layer: (shapes of its blobs in `weights`, shapes that it needs)} for the layers of the
    caffe.Net for which they differ. `weights` comes from read_weights."""
    wrong = {}
    for name, blobs in net.params.items():
        stored, needed = weights.get(name, []), [tuple(blob.shape) for blob in blobs]
        if list(map(without_leading_ones, stored)) != list(map(without_leading_ones, needed)):
            wrong[name] = stored, needed
    return wrong
