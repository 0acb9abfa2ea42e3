"""What pyproject.toml cannot express: cnn-vis needs the packages in requirements.txt, except Caffe,
which is listed by a path that exists only in a clone. pip needs it as a separate argument."""

import pathlib

from setuptools import setup

lines = pathlib.Path("requirements.txt").read_text().splitlines()
setup(install_requires=[line for line in lines if not line.startswith(("#", "./"))])
