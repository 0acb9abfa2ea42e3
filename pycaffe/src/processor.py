"""Whether this processor can run this build of Caffe. If not, importing this fails, before Caffe
does with an illegal instruction."""

import re

NEEDED = ""  # the extensions that this build uses; the build fills it in

V3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe"
LEVELS = {"x86-64-v3": V3, "x86-64-v4": f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"}


def extensions(path="/proc/cpuinfo"):
    """The names of this processor's extensions; empty if they cannot be found out."""
    try:
        with open(path) as file:
            found = re.search(r"^(?:flags|Features)\s*:(.*)", file.read(), re.MULTILINE)
    except OSError:
        return set()
    return set(found[1].split()) if found else set()


def needed_by(arch):
    """The extensions that code for GCC's -march `arch` uses, as words; of other processors than
    those in LEVELS, none are known. For "native", those of LEVELS that this processor has."""
    if arch == "native":
        has = extensions()
        return " ".join(word for word in LEVELS["x86-64-v4"].split() if word in has)
    return LEVELS.get(arch, "")


def check(needed=NEEDED, has=None):
    """Raises ImportError if this processor lacks an extension."""
    has = extensions() if has is None else has
    missing = [word for word in needed.split() if word not in has]
    if missing and has:
        levels = {"avx512f": " (AVX-512)", "avx2": " (x86-64-v3)"}
        level = next((name for word, name in levels.items() if word in needed.split()), "")
        raise ImportError(f"this build is for newer processors{level}; this one lacks {missing[0]}")


check()
