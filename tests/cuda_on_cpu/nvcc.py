#!/usr/bin/env python3
"""Wraps the C++ compiler: `nvcc.py g++ ... -c x.cu -o x.o` compiles x.cu as C++; other commands run
unchanged. A file that includes .cu files, as in CMake's unity builds, counts as one too.

After preprocessing, only CUDA's launches are not C++: KERNEL<<<HOW>>>(ARGUMENTS) becomes a call of
what cuda_on_cpu::launch (cuda_runtime.h) returns for KERNEL and HOW. Line numbers do not change.
"""

import os
import re
import subprocess
import sys
import tempfile

EXACTLY = {"-fmad=false": "-ffp-contract=off"}  # nvcc's word: GCC's
LAUNCH = re.compile(r"([A-Za-z_]\w*(?:\s*<[^<>;{}]*>)?)(\s*)<<\s?<(.*?)>>\s?>", re.DOTALL)


def translated(text):
    """Preprocessed CUDA as C++."""
    return LAUNCH.sub(r"::cuda_on_cpu::launch([](const auto&... a) { \1(a...); },\2 \3)", text)


def without_dependencies(command):
    """The words of a compiler's command but for those that ask it to write a dependency file."""
    words = iter(command)
    for word in words:
        if word in ("-MF", "-MT", "-MQ"):
            next(words)
        elif word not in ("-MD", "-MMD"):
            yield word


def is_cuda(word):
    """Whether a word of a compiler's command is the path of a file with CUDA in it."""
    if word.endswith(".cxx"):
        with open(word) as file:
            return '.cu"' in file.read()
    return word.endswith(".cu")


def main():
    command = [EXACTLY.get(word, word) for word in sys.argv[1:]]
    sources = [word for word in command if is_cuda(word)]
    if not sources:
        os.execvp(command[0], command)
    (source,) = sources
    target = command[command.index("-o") + 1]
    with tempfile.TemporaryDirectory() as folder:
        read, written = (os.path.join(folder, f"{name}.ii") for name in ("read", "written"))
        instead = {"-c": "-E", target: read}
        first, *others = [instead.get(word, word) if before not in ("-MF", "-MT", "-MQ") else word
                          for before, word in zip(["", *command], command)]  # fmt: skip
        subprocess.run([first, "-include", "cuda_runtime.h", *others], check=True)
        with open(read) as file, open(written, "w") as other:
            other.write(translated(file.read()))
        words = without_dependencies(command)
        subprocess.run([written if word == source else word for word in words], check=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
