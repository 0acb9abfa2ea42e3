// Which of cuDNN's algorithms does a convolution (cudnn_convolution.cpp).
#pragma once
#include <cudnn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <string>

#include "caffe/common.hpp"

namespace caffe {

const size_t kWorkspace = 256 << 20;  // the most bytes that an algorithm may take besides

#define CUDNN_OK(call)                                                                   \
  do {                                                                                   \
    const cudnnStatus_t status = (call);                                                 \
    CHECK_EQ(status, CUDNN_STATUS_SUCCESS) << " cuDNN " << ::cudnnGetErrorString(status); \
  } while (0)

// Algorithms that were measured, in the file that the environment's CNN_VIS_ALGORITHMS names, as measuring takes seconds. A line
// has a card, versions, and a shape; a tab; and the algorithm, the kind of products, the bytes that it takes, and a full stop.
class KeptAlgorithms {
 public:
  // Null if there is no such name: then cuDNN's guesses do.
  static KeptAlgorithms* Get() {
    static const char* const path = getenv("CNN_VIS_ALGORITHMS");
    static KeptAlgorithms* const kept = path && *path ? new KeptAlgorithms(path) : NULL;
    return kept;
  }

  // Whether there is one for the shape.
  template <typename Perf>
  bool Read(const std::string& shape, Perf* perf) const {
    const auto known = lines_.find(machine_ + shape);
    int algorithm, products, end = 0;
    size_t bytes;
    if (known == lines_.end()) return false;
    const char* const found = known->second.c_str();
    if (sscanf(found, "%d %d %zu.%n", &algorithm, &products, &bytes, &end) != 3 || !end || found[end]) return false;
    *perf = Perf();
    perf->algo = static_cast<decltype(perf->algo)>(algorithm);
    perf->mathType = static_cast<cudnnMathType_t>(products);
    perf->memory = bytes;
    perf->status = CUDNN_STATUS_SUCCESS;
    perf->determinism = CUDNN_DETERMINISTIC;  // no others are kept
    return true;
  }

  // If the file cannot be written, it is measured again in the next run.
  template <typename Perf>
  void Write(const std::string& shape, const Perf& perf) {
    const std::string found = std::to_string(perf.algo) + " " + std::to_string(perf.mathType) + " " + std::to_string(perf.memory) + ".";
    lines_[machine_ + shape] = found;
    const std::string line = machine_ + shape + "\t" + found + "\n";
    std::ofstream(path_, std::ios::app) << line;  // at once: others may be writing
  }

 private:
  explicit KeptAlgorithms(const char* path) : path_(path) {
    int driver, device;
    cudaDeviceProp card;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaGetDeviceProperties(&card, device));
    CUDA_CHECK(cudaDriverGetVersion(&driver));
    machine_ = std::string(card.name) + ", CUDA " + std::to_string(driver) + ", cuDNN " + std::to_string(cudnnGetVersion()) + ": ";
    std::ifstream file(path_);
    for (std::string line; std::getline(file, line);) {
      const size_t tab = line.find('\t');
      // The last whole line counts, if several processes have measured at the same time or one was damaged.
      if (tab != std::string::npos && line.back() == '.') lines_[line.substr(0, tab)] = line.substr(tab + 1);
    }
  }

  const std::string path_;
  std::string machine_;
  std::map<std::string, std::string> lines_;
};

// A convolution of some shape in one direction: the algorithm, and a descriptor with the kind of products that it goes with.
template <typename Perf>
struct Way {
  cudnnConvolutionDescriptor_t convolution;
  Perf perf;

  // Chooses the algorithm for a shape; returns whether there is one. ask(is_measured, most, &count, found) asks cuDNN for the
  // best algorithms.
  template <typename Ask>
  bool Choose(const std::string& shape, bool tf32, Ask ask) {
    Perf found[kMost];
    int count = 0;
    if (KeptAlgorithms* kept = KeptAlgorithms::Get()) {
      if (kept->Read(shape, found) && Take(found, 1, tf32)) return true;
      const bool is_measured = ask(true, kMost, &count, found) == CUDNN_STATUS_SUCCESS;  // or memory is short
      cudaGetLastError();  // forgets it
      if (is_measured && Take(found, count, tf32)) return kept->Write(shape, perf), true;
    }
    CUDNN_OK(ask(false, kMost, &count, found));
    return Take(found, count, tf32);
  }

 private:
  static const int kMost = 16;

  // Takes the first that will do; returns whether there is one. Only those that give the same sums every time do.
  bool Take(const Perf* found, int count, bool tf32) {
    for (int i = 0; i < count; ++i) {
      const bool repeats = found[i].determinism == CUDNN_DETERMINISTIC;
      const bool exact = found[i].mathType == CUDNN_FMA_MATH || found[i].mathType == CUDNN_DEFAULT_MATH;
      if (found[i].status != CUDNN_STATUS_SUCCESS || !repeats || !(exact || tf32) || found[i].memory > kWorkspace) continue;
      perf = found[i];
      CUDNN_OK(cudnnSetConvolutionMathType(convolution, tf32 ? perf.mathType : CUDNN_FMA_MATH));
      return true;
    }
    return false;
  }
};

}  // namespace caffe
