"""CUDA graphs: what a network's pass asks of a GPU, hundreds of calls, done again by one call.

See the CUDA Programming Guide on graphs and stream capture. A graph has fixed addresses and sizes,
so there is one for each number of tiles, and none may be used after memory has moved."""

import collections
import ctypes
import os

from .prototxt import caffe_library


class Graphs:
    """Does work on the GPU as graphs, from the third time on. Work is a function that does the same
    each time it is called with a key: it only gives the GPU things to do, and copies between it and
    memory that Caffe has pinned."""

    TRIALS = 2  # the first times: memory is allocated, and kernels are loaded
    MOST = 32  # graphs are kept, as they take memory; those not used for longest go first

    def __init__(self, library):
        self._library, self._times = library, collections.Counter()
        self._graphs = collections.OrderedDict()  # {key: the graph's address}
        library.cnn_vis_end_graph.restype = ctypes.c_void_p

    @classmethod
    def available(cls):
        """The Graphs of this process, or None if its Caffe has none, or $CNN_VIS_GRAPHS is 0."""
        library = caffe_library()
        is_on = os.environ.get("CNN_VIS_GRAPHS") != "0"
        return cls(library) if is_on and hasattr(library, "cnn_vis_wait") else None

    def has(self, key):
        """Whether the work with this key has become a graph."""
        return key in self._graphs

    def do(self, key, work, trial=None):
        """Gives the GPU the work; if the key is None, not as a graph. Works with the same `trial`
        allocate the same memory while they run, so one that has been tried stands for all."""
        if key not in self._graphs:
            trial = key if trial is None else trial
            self._times[trial] += 1
            if self._times[trial] == 1:  # it may need more memory, which then moves
                self.forget()
                self._times = collections.Counter(dict.fromkeys(self._times, 1))
            if self._times[trial] <= self.TRIALS or key is None:
                work()
                return
            self._library.cnn_vis_begin_graph()
            work()
            self._graphs[key] = self._library.cnn_vis_end_graph()
            self.forget(self.MOST)
        self._graphs.move_to_end(key)
        self._library.cnn_vis_run_graph(ctypes.c_void_p(self._graphs[key]))

    def forget(self, number=0):
        """Removes the graphs but for those that were used last, so many."""
        while len(self._graphs) > number:
            _, graph = self._graphs.popitem(last=False)
            self._library.cnn_vis_forget_graph(ctypes.c_void_p(graph))
