// Streams, graphs and events, and what is counted.
//
//   CUDA_ON_CPU_LAZY=1             work waits in its stream until something waits for it, as late as a GPU may do it: a program
//                                  that does not wait where it must sees what was there before
//   CUDA_ON_CPU_DRY=1              kernels, library calls and copies are only counted
//   CUDA_ON_CPU_LOG=FOLDER         keeps in FOLDER/PID what the process has done on its GPU, up to date however it ends: pairs
//                                  of a name (56 bytes) and a number (8 bytes)
//
// All streams are one queue, which is in order. Work on the legacy stream waits for everything.

#include "cuda_runtime.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <mutex>
#include <vector>

using cuda_on_cpu::counter;
using cuda_on_cpu::failed;
using cuda_on_cpu::finish;
using cuda_on_cpu::ready;
using cuda_on_cpu::submit;
using cuda_on_cpu::Work;

// ---- Counters ----------------------------------------------------------------------------------------------------------

namespace {

struct Counter {
  char name[56];
  long value;
};
const size_t kCounters = 64;

Counter* table() {
  static Counter own[kCounters];
  const char* folder = getenv("CUDA_ON_CPU_LOG");
  if (!folder) return own;
  const int file = open((std::string(folder) + "/" + std::to_string(getpid())).c_str(), O_RDWR | O_CREAT, 0666);
  if (file < 0 || ftruncate(file, sizeof own)) return own;
  void* mapped = mmap(nullptr, sizeof own, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return mapped == MAP_FAILED ? own : static_cast<Counter*>(mapped);
}

}  // namespace

long& cuda_on_cpu::counter(const std::string& name) {
  static std::mutex& mutex = *new std::mutex;
  static std::map<std::string, long*>& known = *new std::map<std::string, long*>;
  static Counter* const counters = table();
  std::lock_guard<std::mutex> lock(mutex);
  long*& found = known[name];
  if (!found) {
    Counter& next = counters[std::min(known.size(), kCounters) - 1];
    strncpy(next.name, name.c_str(), sizeof next.name - 1);
    found = &next.value;
    if (known.size() == 1) {  // the process has begun to use a GPU
      const char* visible = getenv("CUDA_VISIBLE_DEVICES");
      strcpy(counters[kCounters - 1].name, "visible");
      counters[kCounters - 1].value = visible && *visible ? atol(visible) : -1;
    }
  }
  return *found;
}

bool cuda_on_cpu::is_dry() {
  static const bool dry = getenv("CUDA_ON_CPU_DRY") != nullptr;
  return dry;
}

// ---- Graphs and streams ------------------------------------------------------------------------------------------------

struct CUgraph_st {
  std::vector<Work> nodes;
};
struct CUgraphExec_st {
  std::vector<Work> nodes;
};

namespace {

thread_local CUgraph_st* captured = nullptr;  // the graph that this thread's work goes into
thread_local bool is_valid = false;
std::vector<Work>& waiting = *new std::vector<Work>;  // work that is to be done

bool is_legacy(cudaStream_t stream) { return stream == 0 || stream == cudaStreamLegacy; }

}  // namespace

cudaError_t cuda_on_cpu::refused(cudaError_t error) {
  if (!captured || error == cudaSuccess) return cudaSuccess;
  const cudaError_t told = is_valid ? error : cudaErrorStreamCaptureInvalidated;
  is_valid = false;
  return told;
}

void cuda_on_cpu::finish() {
  std::vector<Work> now;
  now.swap(waiting);
  for (const Work& work : now) work();
}

cudaError_t cuda_on_cpu::submit(cudaStream_t stream, Work work, cudaError_t in_capture) {
  static const bool is_lazy = getenv("CUDA_ON_CPU_LAZY") != nullptr;
  if (captured && !is_legacy(stream) && in_capture == cudaSuccess && is_valid) {
    captured->nodes.push_back(std::move(work));
    return cudaSuccess;
  }
  if (captured) {
    return failed(refused(is_legacy(stream) && in_capture == cudaSuccess ? cudaErrorStreamCaptureImplicit
                          : in_capture == cudaSuccess                    ? cudaErrorStreamCaptureInvalidated
                                                                         : in_capture));
  }
  waiting.push_back(std::move(work));
  if (!is_lazy || is_legacy(stream)) finish();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (const cudaError_t error = ready()) return error;
  if (captured || is_legacy(stream)) return failed(cudaErrorStreamCaptureUnsupported);
  captured = new CUgraph_st;
  is_valid = true;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = is_valid ? captured : nullptr;
  if (!is_valid) delete captured;
  captured = nullptr;
  return is_valid ? cudaSuccess : failed(cudaErrorStreamCaptureInvalidated);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = !captured ? cudaStreamCaptureStatusNone
            : is_valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = new CUgraphExec_st{graph->nodes};
  ++counter("graphs");
  return ready();
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (const cudaError_t error = ready()) return error;
  ++counter("graph_launches");
  counter("graph_nodes") += graph->nodes.size();
  for (const Work& work : graph->nodes) {
    if (const cudaError_t error = submit(stream, work)) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  --counter("graphs");
  return delete graph, cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = cudaStreamPerThread, ready(); }

cudaError_t cudaStreamDestroy(cudaStream_t) { return ready(); }

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  if (const cudaError_t error = cuda_on_cpu::refused(cudaErrorStreamCaptureUnsupported)) return failed(error);
  ++counter("waits");
  finish();
  return ready();
}

cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return ready(); }

// ---- Events ------------------------------------------------------------------------------------------------------------

struct CUevent_st {
  std::chrono::steady_clock::time_point time;
};

cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = new CUevent_st, ready(); }

cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, ready(); }

cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaStreamSynchronize(cudaStreamPerThread); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (const cudaError_t error = ready()) return error;
  return submit(stream, [event] { event->time = std::chrono::steady_clock::now(); });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return ready();
}
