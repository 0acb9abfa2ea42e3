// What cnn_vis.py asks of a GPU besides Caffe: memory, and CUDA graphs. What this thread gives its stream between the calls of
// begin and end becomes a graph, which can then be run as often as one likes, in one call. An error ends the process, as in
// Caffe's own code.
#include <cuda_runtime.h>

#include <cstring>

#include "caffe/common.hpp"

extern "C" {

// Null if there is not so much.
void* cnn_vis_allocate(size_t size) {
  void* found = nullptr;
  const cudaError_t result = cudaMalloc(&found, size);
  if (result != cudaErrorMemoryAllocation) CUDA_CHECK(result);
  cudaGetLastError();  // forgets it
  return found;
}

void cnn_vis_free(void* memory) { CUDA_CHECK(cudaFree(memory)); }

// Zeros in this machine's memory, where the GPU's kernels can write.
void* cnn_vis_allocate_pinned(size_t size) {
  void* found = nullptr;
  CUDA_CHECK(cudaMallocHost(&found, size));
  return memset(found, 0, size);
}

void cnn_vis_free_pinned(void* memory) { CUDA_CHECK(cudaFreeHost(memory)); }

// Copies from or to a GPU; waits for it.
void cnn_vis_copy(void* to, const void* from, size_t size) { CUDA_CHECK(cudaMemcpy(to, from, size, cudaMemcpyDefault)); }

// Waits for all that this thread has given the GPU.
void cnn_vis_wait() { CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread)); }

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

// Gives the stream all that is in the graph.
void cnn_vis_run_graph(void* graph) {
  CUDA_CHECK(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), cudaStreamPerThread));
}

void cnn_vis_forget_graph(void* graph) { CUDA_CHECK(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph))); }

}
