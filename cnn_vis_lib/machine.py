"""This machine: its cores, memory and GPUs, and the versions of the software on it."""

import contextlib
import ctypes
import functools
import math
import mmap
import os
import re
import resource
import shutil
import tempfile

import numpy as np

from .errors import BadRequest, RunFailed, refusal
from .files import read_text

BYTES_A_PIXEL = 24  # of an image, and of a tile's cache
BYTES_BESIDES = 16  # a pixel, for 8-bit pictures: the start, and those for enlarging and writing
BYTES_MORE = {"use_pixel_learning_rates": 8, "mask": 20, "keep_colors": 14}  # a pixel, by setting


def room_needed(settings, sizes, cached):
    """(bytes of the images and caches, bytes besides, the index of the size that needs these), for
    a run with these sizes, whose tiles have so many `cached` pixels at each."""
    areas = [math.prod(size) for size in sizes]
    most = BYTES_BESIDES + sum(n for name, n in BYTES_MORE.items() if getattr(settings, name))
    needs = [
        (BYTES_A_PIXEL * (area + smaller + tiles), most * area)
        for area, smaller, tiles in zip(areas, [0, *areas], cached)
    ]
    largest = max(range(len(sizes)), key=lambda i: sum(needs[i]))
    return *needs[largest], largest


def check_room(settings, sizes, cached, scratch=None, held=0):
    """Raises BadRequest if the sizes of a run, whose tiles have so many `cached` pixels at each,
    are too large for the memory, or for the folder `scratch`, in which the images and caches are.
    `held` is how many of the bytes needed are allocated already."""
    arrays, besides, largest = room_needed(settings, sizes, cached)
    checks = [
        (arrays + besides, free_memory() + held, "memory", "use --scratch, or a smaller size")
    ]
    if scratch:
        free = shutil.disk_usage(scratch).free + held
        checks = [(besides, free_memory(), "memory", "use a smaller size")]
        remedy = "use another folder, or a smaller size"
        checks += [(arrays, free, f"disk space in --scratch {scratch}", remedy)]
    for needed, free, what, remedy in checks:
        if needed > free:
            name = "final_size" if largest else "initial_size"
            amounts = f"{needed / 1e9:.2f} GB of {what}, but only {free / 1e9:.2f} GB is free"
            problem = f"{'x'.join(map(str, sizes[largest]))} needs {amounts}"
            raise refusal(name, getattr(settings, name) or "unset", problem, remedy)


def zeros(shape, folder=None, dtype="float64"):
    """An array of zeros, in memory or in an unnamed file in `folder`, which disappears with the
    process however that ends. Raises RunFailed if the file does not fit there."""
    if folder is None:
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would kill the process
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        remedy = "use a folder on a disk with more free space"
        raise RunFailed(f"--scratch {folder}: {error.strerror}; {remedy}") from None
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


def keep_freed_memory():
    """Makes glibc keep up to 64 MB of freed memory for reuse. A tile's arrays are allocated and
    freed in every step; by default each is returned to the system and then mapped again page by
    page, which doubles the time of the computation."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


def count_gpus():
    """The number of GPUs that the NVIDIA driver offers this process; 0 without a driver."""
    count = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def visible_gpu(number):
    """What to set CUDA_VISIBLE_DEVICES to for the number-th GPU that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number].strip() if visible else str(number)


CGROUPS = "/sys/fs/cgroup"


def cgroup_folders(controller):
    """Yields the folders with this process's limits by a controller, "cpu" or "memory": those of
    its cgroup and its parents, of version 1 and version 2."""
    with contextlib.suppress(OSError):
        paths = {"": "/", controller: "/"}
        for line in read_text("/proc/self/cgroup").splitlines():
            _, together, path = line.split(":", 2)  # version 2's line names no controllers
            if {"", controller}.intersection(together.split(",")):
                paths |= {together: path, together and controller: path}
        for name, path in paths.items():
            parts = path.strip("/").split("/")
            for depth in range(len(parts), -1, -1):
                yield os.path.join(CGROUPS, name, *parts[:depth])


def count_cores():
    """The number of cores that this process may use, given its affinity and cgroup quotas."""
    cores = len(os.sched_getaffinity(0))
    for folder in cgroup_folders("cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):
                texts = (read_text(f"{folder}/{name}") for name in names)
                quota, period = map(int, " ".join(texts).split())  # "max" is not a number
                cores = min(cores, max(1, quota // period)) if quota > 0 else cores
    return cores


def free_memory():
    """Free memory in bytes, also respecting cgroup limits; infinite if unknown."""
    free = [math.inf]
    with contextlib.suppress(OSError):
        available = re.findall(r"MemAvailable: *(\d+) kB", read_text("/proc/meminfo"))
        free += [1024 * int(kilobytes) for kilobytes in available]
    for folder in cgroup_folders("memory"):
        for names in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int(read_text(f"{folder}/memory.{name}")) for name in names)
                # Cached files count as used, but that memory is freed on demand.
                stat = read_text(f"{folder}/memory.stat")
                cached = dict(line.split() for line in stat.splitlines())
                name = "inactive_file" if names[0] == "max" else "total_inactive_file"
                free.append(limit - used + int(cached.get(name, 0)))
    return max(0, min(free))


# Workers' BLAS has one thread: processes scale much better than threads, and sums then do not
# depend on the number of workers.
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def huge_pages():
    """The environment in which glibc puts a process's large arrays in pages of 2 MB, where Linux
    allows it: the processor finds what is in them faster. Needs glibc 2.35; an older one ignores
    it."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    own = "" if "glibc.malloc.hugetlb" in tunables else "glibc.malloc.hugetlb=1"
    return {"GLIBC_TUNABLES": ":".join(filter(None, [tunables, own]))}


@functools.cache
def versions():
    """The versions of the software that makes the pictures, as a dict."""
    import importlib.metadata
    import platform

    software = {"python": platform.python_version()}
    for name in ("numpy", "scipy", "pillow", "pycaffe"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            software[name] = importlib.metadata.version(name)
    return software


LEAST_LIMITS = {  # ulimit's letter: (the resource, the fewest bytes that libraries need)
    "v": (resource.RLIMIT_AS, 600 << 20),
    "d": (resource.RLIMIT_DATA, 250 << 20),
}


def check_surroundings():
    """Raises BadRequest if the current directory is gone or the shell's memory limits are too
    low."""
    try:
        os.getcwd()
    except OSError:
        raise BadRequest("the current directory no longer exists", "change to another") from None
    for letter, (limit, least) in LEAST_LIMITS.items():
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY and soft < least:
            problem = "too little memory to start; allow at least"
            raise BadRequest(f"ulimit -{letter} {soft >> 10}: {problem} {least >> 10}")
