"""Checkpoints: NumPy archives (.npz) of arrays. These are the state of a Dream, the input pictures
and what watchers keep; the rest is JSON in one more array."""

import dataclasses
import json
import math
import os
import warnings
import zipfile

import numpy as np

from .errors import RunFailed, one_line, refusal
from .files import whole_file
from .machine import zeros
from .records import check_record

RUN_ARRAYS = {  # dtype, *shape; None: any length
    "image": ("float64", 1, 3, None, None),
    "caches": ("float64", None, 3, None, None),
    "before": ("float32", None, 3, None, None),
    "picture": ("uint8", None, None, 3),
    "mask": ("uint8", None, None),
    "guide": ("uint8", None, None, 3),
}


@dataclasses.dataclass
class Checkpoint:
    """A run so far: the numbers and arrays of its Dream and its watchers, the record of how its
    picture is made, and the folder in which its command was run."""

    record: dict
    folder: str
    numbers: dict
    arrays: dict

    def held(self):
        """The bytes of the arrays that the run goes on with."""
        return sum(self.arrays[n].nbytes for n in ("image", "caches") if n in self.arrays)

    def write(self, path):
        """Writes it to `path`, whole or not at all. Raises RunFailed."""
        header = {"record": self.record, "folder": self.folder, "numbers": self.numbers}
        text = np.frombuffer(json.dumps(header).encode(), np.uint8)
        with whole_file(path) as file:
            np.savez(file, header=text, **self.arrays)

    @classmethod
    def read(cls, path, known, scratch=None):
        """The Checkpoint in `path`, with its arrays in the folder `scratch` if there is one; all
        types and dimensions are checked against the `known` arrays, {name: (dtype, *shape)}. Raises
        BadRequest, RunFailed.

        All bytes of every array are read, and so checked against their CRC, before their contents
        are trusted. Pickles are rejected.
        """
        try:
            with zipfile.ZipFile(path) as file:
                if sum(entry.file_size for entry in file.infolist()) > os.path.getsize(path):
                    raise ValueError("it claims to contain more data than it does")
                arrays = {
                    os.path.splitext(entry.filename)[0]: read_array(file, entry, scratch)
                    for entry in file.infolist()
                }
            header = json.loads(arrays.pop("header").tobytes())
            if "command" in header:
                raise ValueError("it was written by version 1.0; finish it with that version")
            for name, kind in {"record": dict, "folder": str, "numbers": dict}.items():
                if type(header.get(name)) is not kind:
                    raise ValueError(f"its {name} is missing or of the wrong type")
            check_record(header["record"])
            check_arrays(arrays, known)
            return cls(**header, arrays=arrays)
        except RunFailed:
            raise
        except Exception as error:  # damage can surface anywhere in zipfile, NumPy or json
            raise unusable(path, f"not a readable checkpoint ({one_line(error)})") from None


def check_arrays(arrays, known):
    """Raises ValueError or KeyError if one of the arrays has not the type and dimensions as in
    `known`, where None is any length."""
    for name, array in arrays.items():
        dtype, *shape = known[name]
        fits = array.dtype == dtype and array.ndim == len(shape)
        if not fits or any(n not in (None, side) for n, side in zip(shape, array.shape)):
            raise ValueError(f"its {name} has the wrong type or shape")


def read_array(file, entry, scratch=None):
    """Reads an array in NumPy's .npy format from an open ZipFile, into the folder `scratch` if it
    is large. Raises ValueError if its size is not as stated, and whatever zipfile and NumPy raise.
    """
    with file.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        header = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}[version]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers that Python 2 wrote
            shape, is_fortran, dtype = getattr(np.lib.format, header)(stream)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError("it contains a pickle")
        if is_fortran or size != entry.file_size - stream.tell():
            raise ValueError(f"its {entry.filename} has the wrong length")
        array = zeros(shape, scratch if size > 1 << 20 else None, dtype)
        left = memoryview(array.reshape(-1).view(np.uint8))
        while count := stream.readinto(left[: 1 << 24]):
            left = left[count:]
        if stream.read(1) or left:  # reading to the end makes zipfile check the CRC
            raise ValueError(f"its {entry.filename} has the wrong length")
    return array


def unusable(path, problem):
    """The BadRequest for a checkpoint that a run cannot continue from."""
    checkpoint = f"{path}.checkpoint"
    remedy = "start over without --resume"
    if os.path.isfile(checkpoint):
        remedy = f"did you mean {checkpoint}?"
    return refusal("resume", path, problem, remedy)
