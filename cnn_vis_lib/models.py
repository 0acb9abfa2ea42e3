"""Networks known by name, and the files of a network."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import sys
import warnings

import numpy as np

from .caffemodel import read_binaryproto
from .errors import BadRequest, one_line, refusal
from .files import existing_file, file_hash, read_bytes, read_text, sha256_of
from .install import COMMAND, INCLUDED, how_to_install, missing_package

ILSVRC_MEAN = "imagenet/ilsvrc_2012_mean.npy"
GOOGLENET_DEPLOY = "models/bvlc_googlenet/deploy.prototxt"


@dataclasses.dataclass(frozen=True)
class Model:
    """A network known by name.

    `mean` is subtracted from its input; None means the mean of Caffe's ilsvrc mean image. `url` is
    the address of the weights, or of an archive that contains them as the file `member`. `hashes`
    ("sha1:..." or "sha256:...") are the known hashes of the weights.
    """

    name: str
    url: str | None = None
    hashes: tuple = ()
    mean: float | None = None
    member: str | None = None
    other_weights: tuple = ()  # more paths below $CAFFE_ROOT/models

    def weights_places(self):
        """The paths to search for the weights; the first one that exists is used."""
        below, root = f"{self.name}/{self.name}.caffemodel", os.environ.get("CAFFE_ROOT")
        in_caffe = (below, *self.other_weights) if root else ()
        paths = [os.path.join(root, "models", path) for path in in_caffe]
        shared = os.path.join(sys.prefix, "share", "cnn-vis", below)  # by all users of this Python
        return [*paths, self.cache_place(), shared, os.path.join(INCLUDED, below)]

    def cache_place(self):
        """The path to which the weights are downloaded."""
        return os.path.join(cache_folder(), self.name, f"{self.name}.caffemodel")

    def find_weights(self):
        """The path of the weights, or None if they are not installed."""
        return next(filter(os.path.isfile, self.weights_places()), None)

    def find_deploy(self):
        """The path of the prototxt, or None. All full GoogLeNets share one prototxt."""
        path = os.path.join(INCLUDED, self.name, "deploy.prototxt")
        return path if os.path.isfile(path) else find_in_caffe(GOOGLENET_DEPLOY, GOOGLENET_DEPLOY)


MODELS = {
    model.name: model
    for model in (
        Model(
            "googlenet_mini",
            hashes=("sha256:bbfad4b4b68e138b40bde847d5058cf75736958081ca980ebf4ddb9730964455",),
        ),
        Model(
            "bvlc_googlenet",
            "http://dl.caffe.berkeleyvision.org/bvlc_googlenet.caffemodel",
            hashes=("sha1:405fc5acd08a3bb12de8ee5e23a96bec22f08204",),
        ),
        # We do not know whether the published sha1 of Places205 is the archive's or the weights'.
        # If it is the archive's, the weights do not match it and count as "structure checked".
        Model(
            "googlenet_places205",
            "http://places.csail.mit.edu/model/googlenet_places205.tar.gz",
            hashes=("sha1:d767debf686fa15df1e05fbc9b4598076127134a",),
            mean=sum([105.417, 113.753, 116.047]) / 3,
            member="googlelet_places205_train_iter_2400000.caffemodel",
            other_weights=("googlenet_places/googlelet_places205_train_iter_2400000.caffemodel",),
        ),
        Model(
            "googlenet_places365",
            "http://places2.csail.mit.edu/models_places365/googlenet_places365.caffemodel",
            mean=sum([104.051, 112.514, 116.676]) / 3,
        ),
    )
}


def cache_folder():
    """The folder for this user's networks: $CNN_VIS_MODELS, or cnn-vis in the cache folder."""
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return os.environ.get("CNN_VIS_MODELS") or os.path.join(cache, "cnn-vis")


def find_in_caffe(below_root, below_package):
    """The path of a file that comes with Caffe: below $CAFFE_ROOT, or else in the installed Python
    package. None if neither has it."""
    root, package = os.environ.get("CAFFE_ROOT"), importlib.util.find_spec("caffe")
    paths = [os.path.join(root, below_root)] if root else []
    if package is not None and package.submodule_search_locations:
        paths.append(os.path.join(package.submodule_search_locations[0], below_package))
    return next(filter(os.path.isfile, paths), None)


def check_caffe():
    """Raises BadRequest if Caffe itself is missing, which explains any missing file of Caffe's."""
    root = os.environ.get("CAFFE_ROOT")
    is_there = root and os.path.isdir(os.path.join(root, "python", "caffe"))
    if not is_there and importlib.util.find_spec("caffe") is None:
        raise BadRequest(missing_package(ModuleNotFoundError(name="caffe"), "pycaffe"))


def choose_model(name, given_files):
    """The Model called `name`. If that is None, it is BVLC GoogLeNet, or the included small network
    if BVLC GoogLeNet is not installed and the user named no files instead (`given_files`)."""
    model, small = MODELS[name or "bvlc_googlenet"], MODELS["googlenet_mini"]
    is_missing = name is None and not given_files and model.find_weights() is None
    return small if is_missing and small.find_weights() else model


def stand_in_notice(asked, name):
    """The notice that googlenet_mini replaces BVLC GoogLeNet, or None. `asked` is the model that
    the user chose, or None; `name` is the network in use."""
    if asked is None and name == "googlenet_mini":
        return (
            "BVLC GoogLeNet is not installed: using googlenet_mini, a small imitation. "
            f"To get the real one: {COMMAND} --download_model bvlc_googlenet"
        )
    return None


@dataclasses.dataclass(frozen=True)
class NetworkFiles:
    """The name of a network and the paths of its files. `fit_classifier` is whether the classifier
    takes its width from the weights; `mean` is the number to subtract from pixels, and `scale` the
    one by which the network's input is then multiplied; `guide` is the guide of a run, a file in
    .npy format, uint8 (H, W, 3), and `guide_sha256` is its hash. `notices` are lines for the user.
    """

    deploy: str
    weights: str | None
    name: str = "network"
    fit_classifier: bool = False
    mean: float | None = None
    scale: float = 1.0
    guide: str | None = None
    guide_sha256: str | None = None  # another run's guide may have the same path
    notices: tuple = dataclasses.field(default=(), compare=False)

    def known_name(self):
        """The name if it is that of one of the MODELS, otherwise None."""
        return self.name if self.name in MODELS else None

    def paths(self):
        """{field: path} of the files."""
        named = {name: getattr(self, name) for name in ("weights", "deploy", "guide")}
        return {name: path for name, path in named.items() if path}


def find_files(options):
    """The NetworkFiles for the options. Its weights are None if they are not installed; its mean is
    None if it has yet to be read from the mean image. Raises BadRequest."""
    named = options.deploy_txt or options.caffe_model
    model = choose_model(options.model, named)
    weights, deploy = options.caffe_model, options.deploy_txt
    weights = existing_file("caffe_model", weights) if weights else model.find_weights()
    deploy = existing_file("deploy_txt", deploy) if deploy else model.find_deploy()
    if deploy is None:
        check_caffe()
        remedy = f"name one with --deploy_txt, or {how_to_install('pycaffe')}"
        raise refusal("model", model.name, "no deploy.prototxt found", remedy)
    mean = None if options.mean_image else model.mean
    name = "network" if named else model.name
    return NetworkFiles(deploy, weights, name, not options.deploy_txt, mean)


@contextlib.contextmanager
def with_guide(files, guide):
    """Context manager: the NetworkFiles with the picture `guide`, uint8 (H, W, 3) or None, added as
    an unnamed file that exists until the context ends."""
    if guide is None:
        yield files
        return
    with open(os.memfd_create("guide"), "wb") as file:
        np.save(file, guide)
        file.flush()
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        yield dataclasses.replace(files, guide=path, guide_sha256=sha256_of(path))


def read_mean(path):
    """The mean of the mean image (.npy or .binaryproto), computed in the file's dtype. Raises
    BadRequest."""
    try:
        if not read_bytes(path).startswith((b"\x93NUMPY", b"PK", b"\x80")):
            array = read_binaryproto(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about headers that Python 2 wrote
                array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or not array.size:
            raise ValueError("it contains no numbers")
        mean = float(array.mean())
    except Exception as error:  # the file may contain anything
        problem = f"cannot be read as an array ({one_line(error)})"
        remedy = "use a .npy or .binaryproto file"
        raise refusal("mean_image", path, problem, remedy) from None
    if not 0 <= mean <= 255:
        problem = f"its mean is {mean:g}, but pixels range from 0 to 255"
        raise refusal("mean_image", path, problem, "use another file")
    return mean


def content_of(network):
    """{field: SHA-256} of the NetworkFiles, which identifies them wherever they are stored."""
    return {name: known_sha256(path, os.stat(path)) for name, path in network.paths().items()}


@functools.lru_cache(8)  # a batch asks for each picture
def known_sha256(path, facts):
    """The SHA-256 of a file, found once as long as its os.stat, the `facts`, is the same."""
    return sha256_of(path)


def has_known_hash(path, model):
    """Whether the file has one of the model's known hashes."""
    return any(file_hash(path, known.partition(":")[0]) == known for known in model.hashes)


def standing(path, model):
    """How far the weights `path` can be trusted to be the model's, in a few words."""
    if has_known_hash(path, model):
        return "verified"
    with contextlib.suppress(OSError):
        is_same = file_hash(path, "sha256") == read_text(f"{path}.checked").strip()
        return "structure checked" if is_same else "changed since it was downloaded"
    return "not verified"
