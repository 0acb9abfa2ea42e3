"""What pyproject.toml cannot say: cnn-vis needs what requirements.txt lists. The path to Caffe in
there means nothing outside a clone, so Caffe has to be asked for besides."""

import pathlib

from setuptools import setup

lines = pathlib.Path("requirements.txt").read_text().splitlines()
setup(install_requires=[line for line in lines if not line.startswith(("#", "./"))])
