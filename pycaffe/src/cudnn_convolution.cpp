// CudnnConvolution: Caffe's convolution by cuDNN (8 or 9) on the GPU: all tiles of a batch in one call, without a matrix of
// patches. CudnnTF32Convolution: the same with products of TF32, of 10 bits, on the cards that have them. Nothing of cuDNN is
// touched before the first pass on a GPU, so that a build with it runs where there is none; Caffe's own cuDNN layers end the
// process there as soon as a net is loaded, and ask for algorithms at every pass by functions that cuDNN 8 dropped.
//
// Only algorithms that give the same sums every time are used; all layers share one workspace. The gradients of weights, and
// convolutions in other than two dimensions, are Caffe's own.

#include <cudnn.h>

#include <vector>

#include "caffe/layers/conv_layer.hpp"

namespace caffe {

namespace {

const size_t kWorkspace = 256 << 20;  // the most bytes that an algorithm may take besides

#define CUDNN_OK(call)                                                                   \
  do {                                                                                   \
    const cudnnStatus_t status = (call);                                                 \
    CHECK_EQ(status, CUDNN_STATUS_SUCCESS) << " cuDNN " << ::cudnnGetErrorString(status); \
  } while (0)

cudnnHandle_t Handle() {
  static cudnnHandle_t handle = NULL;
  if (!handle) CUDNN_OK(cudnnCreate(&handle));
  return handle;
}

// Layers run one after the other, so they share it.
void* Workspace(size_t size) {
  static void* memory = NULL;
  static size_t has = 0;
  if (size > has) {
    CUDA_CHECK(cudaFree(memory));
    memory = NULL;
    CUDA_CHECK(cudaMalloc(&memory, size));
    has = size;
  }
  return memory;
}

// The first of the algorithms found, best first, that will do.
template <typename Perf>
Perf Choose(const Perf* found, int count) {
  for (int i = 0; i < count; ++i) {
    const bool repeats = found[i].determinism == CUDNN_DETERMINISTIC;
    if (found[i].status == CUDNN_STATUS_SUCCESS && repeats && found[i].memory <= kWorkspace) return found[i];
  }
  LOG(FATAL) << "cuDNN has no algorithm for a convolution";
}

}  // namespace

template <typename Dtype>
class CudnnConvolutionLayer : public ConvolutionLayer<Dtype> {
 public:
  explicit CudnnConvolutionLayer(const LayerParameter& param) : ConvolutionLayer<Dtype>(param) {}
  virtual inline const char* type() const { return "CudnnConvolution"; }

 protected:
  virtual cudnnMathType_t MathType() const { return CUDNN_FMA_MATH; }

  virtual void Forward_gpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    if (this->num_spatial_axes_ != 2) return ConvolutionLayer<Dtype>::Forward_gpu(bottom, top);
    const Dtype one = 1, zero = 0;
    for (size_t i = 0; i < bottom.size(); ++i) {
      Describe(*bottom[i], *top[i]);
      CUDNN_OK(cudnnConvolutionForward(Handle(), &one, in_, bottom[i]->gpu_data(), filter_, this->blobs_[0]->gpu_data(),
                                       convolution_, forward_.algo, Workspace(forward_.memory), forward_.memory, &zero, out_,
                                       top[i]->mutable_gpu_data()));
      if (this->bias_term_) {
        CUDNN_OK(cudnnAddTensor(Handle(), &one, bias_, this->blobs_[1]->gpu_data(), &one, out_, top[i]->mutable_gpu_data()));
      }
    }
  }

  virtual void Backward_gpu(const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
                            const vector<Blob<Dtype>*>& bottom) {
    if (this->num_spatial_axes_ != 2 || this->param_propagate_down_[0]) {
      return ConvolutionLayer<Dtype>::Backward_gpu(top, propagate_down, bottom);
    }
    const Dtype one = 1, zero = 0;
    for (size_t i = 0; i < top.size(); ++i) {
      Describe(*bottom[i], *top[i]);
      if (this->bias_term_ && this->param_propagate_down_[1]) {
        CUDNN_OK(cudnnConvolutionBackwardBias(Handle(), &one, out_, top[i]->gpu_diff(), &one, bias_,
                                              this->blobs_[1]->mutable_gpu_diff()));
      }
      if (propagate_down[i]) {
        CUDNN_OK(cudnnConvolutionBackwardData(Handle(), &one, filter_, this->blobs_[0]->gpu_data(), out_, top[i]->gpu_diff(),
                                              convolution_, backward_.algo, Workspace(backward_.memory), backward_.memory,
                                              &zero, in_, bottom[i]->mutable_gpu_diff()));
      }
    }
  }

 private:
  // Tells cuDNN the shapes and asks it for algorithms, where they are not those of the last pass. (Descriptors are never
  // destroyed: the few of a net live as long as its process.)
  void Describe(const Blob<Dtype>& bottom, const Blob<Dtype>& top) {
    if (bottom.shape() == described_) return;
    if (described_.empty()) {
      CUDNN_OK(cudnnCreateTensorDescriptor(&in_));
      CUDNN_OK(cudnnCreateTensorDescriptor(&out_));
      CUDNN_OK(cudnnCreateTensorDescriptor(&bias_));
      CUDNN_OK(cudnnCreateFilterDescriptor(&filter_));
      CUDNN_OK(cudnnCreateConvolutionDescriptor(&convolution_));
    }
    const cudnnDataType_t type = sizeof(Dtype) == sizeof(float) ? CUDNN_DATA_FLOAT : CUDNN_DATA_DOUBLE;
    const int *kernel = this->kernel_shape_.cpu_data(), *pad = this->pad_.cpu_data(), *stride = this->stride_.cpu_data(),
              *dilation = this->dilation_.cpu_data();
    const int outputs = this->num_output_;
    CUDNN_OK(cudnnSetTensor4dDescriptor(in_, CUDNN_TENSOR_NCHW, type, bottom.num(), bottom.channels(), bottom.height(),
                                        bottom.width()));
    CUDNN_OK(cudnnSetTensor4dDescriptor(out_, CUDNN_TENSOR_NCHW, type, top.num(), outputs, top.height(), top.width()));
    CUDNN_OK(cudnnSetTensor4dDescriptor(bias_, CUDNN_TENSOR_NCHW, type, 1, outputs, 1, 1));
    CUDNN_OK(cudnnSetFilter4dDescriptor(filter_, type, CUDNN_TENSOR_NCHW, outputs, bottom.channels() / this->group_, kernel[0],
                                        kernel[1]));
    CUDNN_OK(cudnnSetConvolution2dDescriptor(convolution_, pad[0], pad[1], stride[0], stride[1], dilation[0], dilation[1],
                                             CUDNN_CROSS_CORRELATION, type));
    CUDNN_OK(cudnnSetConvolutionGroupCount(convolution_, this->group_));
    CUDNN_OK(cudnnSetConvolutionMathType(convolution_, MathType()));

    int count = 0;
    cudnnConvolutionFwdAlgoPerf_t forward[CUDNN_CONVOLUTION_FWD_ALGO_COUNT];
    CUDNN_OK(cudnnGetConvolutionForwardAlgorithm_v7(Handle(), in_, filter_, convolution_, out_,
                                                    CUDNN_CONVOLUTION_FWD_ALGO_COUNT, &count, forward));
    forward_ = Choose(forward, count);
    cudnnConvolutionBwdDataAlgoPerf_t backward[CUDNN_CONVOLUTION_BWD_DATA_ALGO_COUNT];
    CUDNN_OK(cudnnGetConvolutionBackwardDataAlgorithm_v7(Handle(), filter_, out_, convolution_, in_,
                                                         CUDNN_CONVOLUTION_BWD_DATA_ALGO_COUNT, &count, backward));
    backward_ = Choose(backward, count);
    described_ = bottom.shape();
  }

  vector<int> described_;  // the bottom's shape that the rest is for
  cudnnTensorDescriptor_t in_, out_, bias_;
  cudnnFilterDescriptor_t filter_;
  cudnnConvolutionDescriptor_t convolution_;
  cudnnConvolutionFwdAlgoPerf_t forward_;
  cudnnConvolutionBwdDataAlgoPerf_t backward_;
};

template <typename Dtype>
class CudnnTF32ConvolutionLayer : public CudnnConvolutionLayer<Dtype> {
 public:
  explicit CudnnTF32ConvolutionLayer(const LayerParameter& param) : CudnnConvolutionLayer<Dtype>(param) {}
  virtual inline const char* type() const { return "CudnnTF32Convolution"; }

 protected:
  virtual cudnnMathType_t MathType() const { return CUDNN_TENSOR_OP_MATH; }
};

INSTANTIATE_CLASS(CudnnConvolutionLayer);
REGISTER_LAYER_CLASS(CudnnConvolution);
INSTANTIATE_CLASS(CudnnTF32ConvolutionLayer);
REGISTER_LAYER_CLASS(CudnnTF32Convolution);

}  // namespace caffe
