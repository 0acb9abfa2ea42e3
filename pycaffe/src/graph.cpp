// CUDA graphs, for cnn_vis.py: what this thread gives its stream between the calls of begin and end becomes a graph, which can
// then be run as often as one likes, in one call. An error ends the process, as in Caffe's own code.
#include <cuda_runtime.h>

#include "caffe/common.hpp"

extern "C" {

void cnn_vis_begin_graph() {
  LOG(ERROR) << "capturing";  // so that the log shows what an error means
  CUDA_CHECK(cudaStreamBeginCapture(cudaStreamPerThread, cudaStreamCaptureModeThreadLocal));
}

void* cnn_vis_end_graph() {
  cudaGraph_t graph;
  cudaGraphExec_t made;
  CUDA_CHECK(cudaStreamEndCapture(cudaStreamPerThread, &graph));
#if CUDART_VERSION >= 12000
  CUDA_CHECK(cudaGraphInstantiate(&made, graph, 0));
#else
  CUDA_CHECK(cudaGraphInstantiate(&made, graph, NULL, NULL, 0));
#endif
  CUDA_CHECK(cudaGraphDestroy(graph));
  LOG(ERROR) << "captured";
  return made;
}

// Does all that is in the graph, and waits for it.
void cnn_vis_run_graph(void* graph) {
  CUDA_CHECK(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), cudaStreamPerThread));
  CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
}

void cnn_vis_forget_graph(void* graph) { CUDA_CHECK(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph))); }

}
