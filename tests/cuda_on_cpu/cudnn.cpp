// cuDNN's convolutions in plain loops. They insist on shapes that fit, pointers to GPU memory, and the algorithm and workspace
// that the heuristics, or measuring, gave. If TF32 is allowed, operands are rounded to its 10 bits.
#include "cudnn.h"
#include "cudnn_version.h"

#include <cstdint>
#include <vector>

using cuda_on_cpu::check_pointer;
using cuda_on_cpu::OpenMemory;

struct cudnnContext {
  cudaStream_t stream = 0;
};
struct cudnnTensorStruct {
  cudnnDataType_t type;
  int n, c, h, w;
  size_t count() const { return size_t(n) * c * h * w; }
};
struct cudnnConvolutionStruct {
  int pad_h, pad_w, stride_h, stride_w, dilation_h, dilation_w, groups = 1;
  cudnnMathType_t math = CUDNN_DEFAULT_MATH;
};

namespace {

const size_t kWorkspace = 1 << 20;  // what the algorithm that is named takes

template <typename T>
cudnnStatus_t create(T** made) {
  return *made = new T(), CUDNN_STATUS_SUCCESS;
}

int side(int size, int pad, int kernel, int dilation, int stride) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

bool fit(const cudnnTensorStruct& x, const cudnnTensorStruct& w, const cudnnConvolutionStruct& to, const cudnnTensorStruct& y) {
  return x.type == w.type && x.type == y.type && x.n == y.n && w.c * to.groups == x.c && w.n == y.c && w.n % to.groups == 0 &&
         y.h == side(x.h, to.pad_h, w.h, to.dilation_h, to.stride_h) && y.w == side(x.w, to.pad_w, w.w, to.dilation_w, to.stride_w);
}

// Answers as cuDNN's heuristics do, with four unusable algorithms ranked first: one that does not run, one that is not
// deterministic, one that needs too much memory, one that uses TF32 unasked; then a usable one, if the filter is square.
template <typename Perf, typename Algorithm>
cudnnStatus_t tell(int asked, int* returned, Perf* found, Algorithm others, Algorithm will_do, cudnnMathType_t math,
                   const cudnnTensorStruct& w) {
  const cudnnMathType_t found_math = math == CUDNN_FMA_MATH ? CUDNN_FMA_MATH : CUDNN_TENSOR_OP_MATH;
  const Perf all[] = {
      {others, CUDNN_STATUS_NOT_SUPPORTED, -1, 0, CUDNN_DETERMINISTIC, found_math, {}},
      {others, CUDNN_STATUS_SUCCESS, -1, 0, CUDNN_NON_DETERMINISTIC, found_math, {}},
      {others, CUDNN_STATUS_SUCCESS, -1, size_t(4) << 30, CUDNN_DETERMINISTIC, found_math, {}},
      {others, math == CUDNN_FMA_MATH ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_NOT_SUPPORTED, -1, 0, CUDNN_DETERMINISTIC,
       CUDNN_TENSOR_OP_MATH, {}},
      {will_do, CUDNN_STATUS_SUCCESS, -1, kWorkspace, CUDNN_DETERMINISTIC, found_math, {}},
  };
  *returned = std::min(asked, w.h == w.w ? 5 : 4);
  std::copy_n(all, *returned, found);
  return CUDNN_STATUS_SUCCESS;
}

double rounded(double value, bool) { return value; }
float rounded(float value, bool is_tf32) {
  if (!is_tf32) return value;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x1000) & ~0x1fffu;
  memcpy(&value, &bits, sizeof bits);
  return value;
}

// Calls visit(offset in x, offset in w, offset in y) for each product of a convolution.
template <typename Visit>
void products(const cudnnTensorStruct& x, const cudnnTensorStruct& w, const cudnnConvolutionStruct& to, const cudnnTensorStruct& y,
              Visit visit) {
  for (int n = 0; n < y.n; ++n)
    for (int k = 0; k < y.c; ++k)
      for (int c = 0; c < w.c; ++c)
        for (int i = 0; i < w.h; ++i)
          for (int j = 0; j < w.w; ++j)
            for (int row = 0; row < y.h; ++row) {
              const int from_row = row * to.stride_h - to.pad_h + i * to.dilation_h;
              if (from_row < 0 || from_row >= x.h) continue;
              const size_t channel = size_t(n) * x.c + k / (y.c / to.groups) * w.c + c;
              for (int column = 0; column < y.w; ++column) {
                const int from = column * to.stride_w - to.pad_w + j * to.dilation_w;
                if (from < 0 || from >= x.w) continue;
                visit((channel * x.h + from_row) * x.w + from, ((size_t(k) * w.c + c) * w.h + i) * w.w + j,
                      ((size_t(n) * y.c + k) * y.h + row) * y.w + column);
              }
            }
}

// The factors of a call, alpha for what is new and beta for what was there, in double precision.
struct Factors {
  double alpha, beta;

  Factors(cudnnDataType_t type, const void* alpha, const void* beta) : alpha(value(type, alpha)), beta(value(type, beta)) {}
  static double value(cudnnDataType_t type, const void* at) {
    return type == CUDNN_DATA_FLOAT ? *static_cast<const float*>(at) : *static_cast<const double*>(at);
  }
};

// Runs call(T()) with T for the type, on the GPU's memory; `pointers` are those that must lead there. What `call` refers to
// must be its own: it may run later.
template <typename Call, typename... Pointers>
cudnnStatus_t compute(cudnnHandle_t handle, cudnnDataType_t type, Call call, Pointers... pointers) {
  if (!handle) return CUDNN_STATUS_NOT_INITIALIZED;
  (check_pointer(pointers), ...);
  if (cudaPeekAtLastError() == cudaErrorIllegalAddress) return CUDNN_STATUS_EXECUTION_FAILED;
  static const bool refuses = getenv("CUDA_ON_CPU_REFUSE");
  const auto work = [=] {
    ++cuda_on_cpu::counter("library_calls");
    if (cuda_on_cpu::is_dry()) return;
    OpenMemory open;
    type == CUDNN_DATA_FLOAT ? call(float()) : call(double());
  };
  const cudaError_t error = cuda_on_cpu::submit(handle->stream, work, refuses ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
  return error == cudaSuccess ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_EXECUTION_FAILED;
}

}  // namespace

const char* cudnnGetErrorString(cudnnStatus_t status) {
  switch (status) {
    case CUDNN_STATUS_SUCCESS: return "CUDNN_STATUS_SUCCESS";
    case CUDNN_STATUS_NOT_INITIALIZED: return "CUDNN_STATUS_NOT_INITIALIZED";
    case CUDNN_STATUS_BAD_PARAM: return "CUDNN_STATUS_BAD_PARAM";
    case CUDNN_STATUS_NOT_SUPPORTED: return "CUDNN_STATUS_NOT_SUPPORTED";
    case CUDNN_STATUS_EXECUTION_FAILED: return "CUDNN_STATUS_EXECUTION_FAILED";
    default: return "CUDNN_STATUS_INTERNAL_ERROR";
  }
}

size_t cudnnGetVersion() { return CUDNN_MAJOR * 10000; }

cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
  int device;
  return cudaGetDevice(&device) == cudaSuccess ? create(handle) : CUDNN_STATUS_NOT_INITIALIZED;
}

cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  return handle->stream = stream, CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t* tensor) { return create(tensor); }
cudnnStatus_t cudnnCreateFilterDescriptor(cudnnFilterDescriptor_t* filter) { return create(filter); }
cudnnStatus_t cudnnCreateConvolutionDescriptor(cudnnConvolutionDescriptor_t* convolution) { return create(convolution); }

cudnnStatus_t cudnnSetTensor4dDescriptor(cudnnTensorDescriptor_t tensor, cudnnTensorFormat_t format, cudnnDataType_t type, int n,
                                         int c, int h, int w) {
  if (format != CUDNN_TENSOR_NCHW || std::min({n, c, h, w}) < 1) return CUDNN_STATUS_BAD_PARAM;
  return *tensor = {type, n, c, h, w}, CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetFilter4dDescriptor(cudnnFilterDescriptor_t filter, cudnnDataType_t type, cudnnTensorFormat_t format, int k,
                                         int c, int h, int w) {
  return cudnnSetTensor4dDescriptor(filter, format, type, k, c, h, w);
}

cudnnStatus_t cudnnSetConvolution2dDescriptor(cudnnConvolutionDescriptor_t convolution, int pad_h, int pad_w, int u, int v,
                                              int dilation_h, int dilation_w, cudnnConvolutionMode_t mode, cudnnDataType_t) {
  if (mode != CUDNN_CROSS_CORRELATION) return CUDNN_STATUS_NOT_SUPPORTED;
  return *convolution = {pad_h, pad_w, u, v, dilation_h, dilation_w}, CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetConvolutionGroupCount(cudnnConvolutionDescriptor_t convolution, int groups) {
  return convolution->groups = groups, CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetConvolutionMathType(cudnnConvolutionDescriptor_t convolution, cudnnMathType_t type) {
  return convolution->math = type, CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetConvolutionForwardAlgorithm_v7(cudnnHandle_t handle, cudnnTensorDescriptor_t x, cudnnFilterDescriptor_t w,
                                                     cudnnConvolutionDescriptor_t convolution, cudnnTensorDescriptor_t y,
                                                     int asked, int* returned, cudnnConvolutionFwdAlgoPerf_t* found) {
  if (!handle || !fit(*x, *w, *convolution, *y)) return CUDNN_STATUS_BAD_PARAM;
  return tell(asked, returned, found, CUDNN_CONVOLUTION_FWD_ALGO_GEMM, CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM,
              convolution->math, *w);
}

cudnnStatus_t cudnnGetConvolutionBackwardDataAlgorithm_v7(cudnnHandle_t handle, cudnnFilterDescriptor_t w,
                                                          cudnnTensorDescriptor_t dy, cudnnConvolutionDescriptor_t convolution,
                                                          cudnnTensorDescriptor_t dx, int asked, int* returned,
                                                          cudnnConvolutionBwdDataAlgoPerf_t* found) {
  if (!handle || !fit(*dx, *w, *convolution, *dy)) return CUDNN_STATUS_BAD_PARAM;
  return tell(asked, returned, found, CUDNN_CONVOLUTION_BWD_DATA_ALGO_0, CUDNN_CONVOLUTION_BWD_DATA_ALGO_1, convolution->math,
              *w);
}

namespace {

// What measuring answers; if nothing is being captured, as it allocates memory and waits.
template <typename Guess>
cudnnStatus_t measured(Guess guess) {
  if (cuda_on_cpu::refused(cudaErrorStreamCaptureUnsupported)) return CUDNN_STATUS_EXECUTION_FAILED;
  ++cuda_on_cpu::counter("measurements");
  return guess();
}

}  // namespace

cudnnStatus_t cudnnFindConvolutionForwardAlgorithm(cudnnHandle_t handle, cudnnTensorDescriptor_t x, cudnnFilterDescriptor_t w,
                                                   cudnnConvolutionDescriptor_t convolution, cudnnTensorDescriptor_t y,
                                                   int asked, int* returned, cudnnConvolutionFwdAlgoPerf_t* found) {
  return measured([&] { return cudnnGetConvolutionForwardAlgorithm_v7(handle, x, w, convolution, y, asked, returned, found); });
}

cudnnStatus_t cudnnFindConvolutionBackwardDataAlgorithm(cudnnHandle_t handle, cudnnFilterDescriptor_t w,
                                                        cudnnTensorDescriptor_t dy, cudnnConvolutionDescriptor_t convolution,
                                                        cudnnTensorDescriptor_t dx, int asked, int* returned,
                                                        cudnnConvolutionBwdDataAlgoPerf_t* found) {
  return measured([&] {
    return cudnnGetConvolutionBackwardDataAlgorithm_v7(handle, w, dy, convolution, dx, asked, returned, found);
  });
}

namespace {

// to = alpha * (the sums that products(add) makes) + beta * to. Sums are of double precision; what is there may be NaN.
template <typename T, typename Products>
void accumulate(const Factors& factors, size_t count, void* to, Products products) {
  std::vector<double> sums(count);
  products([&](size_t i, double product) { sums[i] += product; });
  const T a = factors.alpha, b = factors.beta;
  T* out = static_cast<T*>(to);
  for (size_t i = 0; i < count; ++i) out[i] = a * T(sums[i]) + (b == 0 ? 0 : b * out[i]);
}

}  // namespace

cudnnStatus_t cudnnConvolutionForward(cudnnHandle_t handle, const void* alpha, cudnnTensorDescriptor_t x_shape, const void* x,
                                      cudnnFilterDescriptor_t w_shape, const void* w, cudnnConvolutionDescriptor_t convolution,
                                      cudnnConvolutionFwdAlgo_t algorithm, void* workspace, size_t workspace_size,
                                      const void* beta, cudnnTensorDescriptor_t y_shape, void* y) {
  if (!fit(*x_shape, *w_shape, *convolution, *y_shape)) return CUDNN_STATUS_BAD_PARAM;
  if (algorithm != CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM || workspace_size < kWorkspace) return CUDNN_STATUS_NOT_SUPPORTED;
  if (convolution->math == CUDNN_DEFAULT_MATH) return CUDNN_STATUS_NOT_SUPPORTED;  // not the kind that was told
  const Factors factors(x_shape->type, alpha, beta);
  const auto call = [=, in_shape = *x_shape, filter = *w_shape, how = *convolution, out_shape = *y_shape](auto type) {
    using T = decltype(type);
    const T *from = static_cast<const T*>(x), *weights = static_cast<const T*>(w);
    const bool tf32 = how.math != CUDNN_FMA_MATH;
    accumulate<T>(factors, out_shape.count(), y, [&](auto add) {
      products(in_shape, filter, how, out_shape, [&](size_t in, size_t weight, size_t out) {
        add(out, double(rounded(from[in], tf32)) * rounded(weights[weight], tf32));
      });
    });
  };
  return compute(handle, x_shape->type, call, x, w, workspace, y);
}

cudnnStatus_t cudnnConvolutionBackwardData(cudnnHandle_t handle, const void* alpha, cudnnFilterDescriptor_t w_shape,
                                           const void* w, cudnnTensorDescriptor_t dy_shape, const void* dy,
                                           cudnnConvolutionDescriptor_t convolution, cudnnConvolutionBwdDataAlgo_t algorithm,
                                           void* workspace, size_t workspace_size, const void* beta,
                                           cudnnTensorDescriptor_t dx_shape, void* dx) {
  if (!fit(*dx_shape, *w_shape, *convolution, *dy_shape)) return CUDNN_STATUS_BAD_PARAM;
  if (algorithm != CUDNN_CONVOLUTION_BWD_DATA_ALGO_1 || workspace_size < kWorkspace) return CUDNN_STATUS_NOT_SUPPORTED;
  if (convolution->math == CUDNN_DEFAULT_MATH) return CUDNN_STATUS_NOT_SUPPORTED;  // not the kind that was told
  const Factors factors(dx_shape->type, alpha, beta);
  const auto call = [=, in_shape = *dx_shape, filter = *w_shape, how = *convolution, out_shape = *dy_shape](auto type) {
    using T = decltype(type);
    const T *from = static_cast<const T*>(dy), *weights = static_cast<const T*>(w);
    const bool tf32 = how.math != CUDNN_FMA_MATH;
    accumulate<T>(factors, in_shape.count(), dx, [&](auto add) {
      products(in_shape, filter, how, out_shape, [&](size_t in, size_t weight, size_t out) {
        add(in, double(rounded(from[out], tf32)) * rounded(weights[weight], tf32));
      });
    });
  };
  return compute(handle, dx_shape->type, call, dy, w, workspace, dx);
}

namespace {

// Calls visit(i, channel) for each element of a tensor.
template <typename Visit>
void elements(const cudnnTensorStruct& shape, Visit visit) {
  const int size = shape.h * shape.w;
  for (size_t i = 0; i < shape.count(); ++i) visit(i, i / size % shape.c);
}

bool is_of_channels(const cudnnTensorStruct& bias, const cudnnTensorStruct& whole) {
  return bias.type == whole.type && bias.n == 1 && bias.h == 1 && bias.w == 1 && bias.c == whole.c;
}

}  // namespace

cudnnStatus_t cudnnConvolutionBackwardBias(cudnnHandle_t handle, const void* alpha, cudnnTensorDescriptor_t dy_shape,
                                           const void* dy, const void* beta, cudnnTensorDescriptor_t db_shape, void* db) {
  if (!is_of_channels(*db_shape, *dy_shape)) return CUDNN_STATUS_BAD_PARAM;
  const Factors factors(dy_shape->type, alpha, beta);
  const auto call = [=, from_shape = *dy_shape, to_shape = *db_shape](auto type) {
    using T = decltype(type);
    T *to = static_cast<T*>(db), a = factors.alpha, b = factors.beta;
    for (int c = 0; c < to_shape.c; ++c) to[c] = b == 0 ? 0 : b * to[c];
    elements(from_shape, [&](size_t i, int c) { to[c] += a * static_cast<const T*>(dy)[i]; });
  };
  return compute(handle, dy_shape->type, call, dy, db);
}

cudnnStatus_t cudnnAddTensor(cudnnHandle_t handle, const void* alpha, cudnnTensorDescriptor_t a_shape, const void* a,
                             const void* beta, cudnnTensorDescriptor_t c_shape, void* c) {
  if (!is_of_channels(*a_shape, *c_shape)) return CUDNN_STATUS_BAD_PARAM;
  const Factors factors(c_shape->type, alpha, beta);
  const auto call = [=, shape = *c_shape](auto type) {
    using T = decltype(type);
    T *to = static_cast<T*>(c), one = factors.alpha, b = factors.beta;
    elements(shape, [&](size_t i, int channel) { to[i] = one * static_cast<const T*>(a)[channel] + b * to[i]; });
  };
  return compute(handle, c_shape->type, call, a, c);
}
