"""The network that the options ask for, with the input that it was trained on."""

import dataclasses
import functools
import math
import os
import re

from .errors import refusal
from .files import existing_file, read_bytes
from .install import how_to_install
from .models import ILSVRC_MEAN, check_caffe, choose_model, find_files, find_in_caffe, read_mean
from .processes import in_a_worker
from .prototxt import training_input


def find_network(options):
    """The complete NetworkFiles for a run with the options. Raises BadRequest."""
    files = find_files(options)
    if files.weights is None:
        model = choose_model(options.model, options.deploy_txt)
        paths = " or ".join(model.weights_places()[:-1])
        remedy = f"use --download_model {model.name}, or name its weights with --caffe_model"
        raise refusal("model", model.name, f"not installed at {paths}", remedy)
    files = as_in_training(files, options)
    if files.mean is not None:
        return files
    path = options.mean_image or find_in_caffe(f"python/caffe/{ILSVRC_MEAN}", ILSVRC_MEAN)
    if path is None:
        check_caffe()
        remedy = f"name the file, or {how_to_install('pycaffe')}"
        raise refusal("mean_image", "unset", "ilsvrc_2012_mean.npy was not found", remedy)
    return dataclasses.replace(files, mean=read_mean(existing_file("mean_image", path)))


def as_in_training(files, options):
    """The NetworkFiles with scale and mean from the options or, if these leave them open, as a
    training prototxt states them. Raises BadRequest."""
    scale, mean, notices = options.input_scale, files.mean, []
    training = {}
    content = read_bytes(files.deploy) if options.deploy_txt else b""
    if re.search(rb"\b(scale|mean_\w+)\s*:", content):
        training = known_training_input(files.deploy, content).copy()
    if "scale" in training and scale in (None, training["scale"]):
        scale = training["scale"]
        if not 0 < scale < math.inf:
            raise refusal(
                "deploy_txt", files.deploy, f"its scale is {scale:g}", "set --input_scale"
            )
        notices.append(f"the network's input is scaled by {scale:g}, as {files.deploy} says")
    if not options.mean_image and (path := training.get("mean_file")):
        if os.path.isfile(path):
            training["mean"] = read_mean(path)
        else:
            notices.append(f"{path}, named in {files.deploy}, does not exist; see --mean_image")
    if not options.mean_image and "mean" in training:
        mean = training["mean"]
        if not 0 <= mean <= 255:
            problem = f"its mean_value is {mean:g}, but pixels range from 0 to 255"
            raise refusal("deploy_txt", files.deploy, problem, "name a --mean_image")
        notices.append(f"{mean:g} is subtracted from pixels, as {files.deploy} says")
    return dataclasses.replace(files, mean=mean, scale=scale or 1.0, notices=tuple(notices))


@functools.cache
def known_training_input(path, content):
    """training_input(path), found once for each `content` of the file."""
    return in_a_worker(training_input, path)
