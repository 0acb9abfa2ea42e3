// CudnnConvolution: Caffe's convolution by cuDNN (8 or 9) on the GPU: all tiles of a batch in one call, without a matrix of
// patches. CudnnTF32Convolution: the same with products of TF32, of 10 bits, on the cards that have them. Nothing of cuDNN is
// touched before the first pass on a GPU, so that a build with it runs where there is none; Caffe's own cuDNN layers end the
// process there as soon as a net is loaded, and ask for algorithms at every pass by functions that cuDNN 8 dropped.
//
// CudnnConvolutionReLU and CudnnTF32ConvolutionReLU do what one of these and a ReLU that works in place on its output do. One
// kernel of ours adds the bias and does the ReLU. (cuDNN could do both in the same call, but not by all of its algorithms, and
// some would make 0 of what is not a number.)
//
// Only algorithms that give the same sums every time are used; all layers share one workspace. Where cuDNN has none, the
// gradients of weights, and convolutions in other than two dimensions are Caffe's own.

#include <cudnn.h>

#include <map>
#include <string>
#include <vector>

#include "caffe/layers/conv_layer.hpp"
#include "cnn_vis_fused.hpp"
#include "cnn_vis_ways.hpp"

namespace caffe {

namespace {

cudnnHandle_t Handle() {
  static cudnnHandle_t handle = NULL;
  if (!handle) {
    CUDNN_OK(cudnnCreate(&handle));
    CUDNN_OK(cudnnSetStream(handle, cudaStreamPerThread));
  }
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

// All that cuDNN is told about a shape. (Never destroyed: the few of a net live as long as its process.)
struct Plan {
  cudnnTensorDescriptor_t in, out, bias;
  cudnnFilterDescriptor_t filter;
  Way<cudnnConvolutionFwdAlgoPerf_t> forward;
  Way<cudnnConvolutionBwdDataAlgoPerf_t> backward;
  bool is_possible;
};

}  // namespace

template <typename Dtype>
class CudnnConvolutionLayer : public ConvolutionLayer<Dtype> {
 public:
  explicit CudnnConvolutionLayer(const LayerParameter& param) : ConvolutionLayer<Dtype>(param) {}
  virtual inline const char* type() const { return "CudnnConvolution"; }

 protected:
  virtual bool TF32() const { return false; }
  virtual bool HasReLU() const { return false; }

  virtual void Forward_cpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    CHECK(!HasReLU()) << type() << " runs on a GPU only";
    ConvolutionLayer<Dtype>::Forward_cpu(bottom, top);
  }

  virtual void Forward_gpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    for (size_t i = 0; i < bottom.size(); ++i) {
      const Plan* plan = this->num_spatial_axes_ == 2 ? PlanFor(*bottom[i], *top[i]) : NULL;
      if (plan) {
        Forward(*plan, *bottom[i], top[i]);
      } else {
        ConvolutionLayer<Dtype>::Forward_gpu({bottom[i]}, {top[i]});
        if (HasReLU()) ReLUForward<Dtype>(NULL, top[i]);
      }
    }
  }

  void Forward(const Plan& plan, const Blob<Dtype>& bottom, Blob<Dtype>* top) {
    const Dtype one = 1, zero = 0;
    const auto& perf = plan.forward.perf;
    CUDNN_OK(cudnnConvolutionForward(Handle(), &one, plan.in, bottom.gpu_data(), plan.filter, this->blobs_[0]->gpu_data(),
                                     plan.forward.convolution, perf.algo, Workspace(perf.memory), perf.memory, &zero,
                                     plan.out, top->mutable_gpu_data()));
    if (HasReLU()) {
      ReLUForward(this->bias_term_ ? this->blobs_[1].get() : NULL, top);
    } else if (this->bias_term_) {
      CUDNN_OK(cudnnAddTensor(Handle(), &one, plan.bias, this->blobs_[1]->gpu_data(), &one, plan.out, top->mutable_gpu_data()));
    }
  }

  virtual void Backward_gpu(const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
                            const vector<Blob<Dtype>*>& bottom) {
    const Dtype one = 1, zero = 0;
    for (Blob<Dtype>* blob : top) {
      if (HasReLU()) ReLUBackward(blob);
    }
    for (size_t i = 0; i < top.size(); ++i) {
      const bool is_own = this->num_spatial_axes_ == 2 && !this->param_propagate_down_[0];
      const Plan* plan = is_own ? PlanFor(*bottom[i], *top[i]) : NULL;
      if (!plan) return ConvolutionLayer<Dtype>::Backward_gpu(top, propagate_down, bottom);
      if (this->bias_term_ && this->param_propagate_down_[1]) {
        CUDNN_OK(cudnnConvolutionBackwardBias(Handle(), &one, plan->out, top[i]->gpu_diff(), &one, plan->bias,
                                              this->blobs_[1]->mutable_gpu_diff()));
      }
      if (propagate_down[i]) {
        const auto& perf = plan->backward.perf;
        CUDNN_OK(cudnnConvolutionBackwardData(Handle(), &one, plan->filter, this->blobs_[0]->gpu_data(), plan->out,
                                              top[i]->gpu_diff(), plan->backward.convolution, perf.algo,
                                              Workspace(perf.memory), perf.memory, &zero, plan->in,
                                              bottom[i]->mutable_gpu_diff()));
      }
    }
  }

 private:
  // The plan for the bottom's shape, made at its first pass; NULL if cuDNN has no way that will do.
  const Plan* PlanFor(const Blob<Dtype>& bottom, const Blob<Dtype>& top) {
    const auto known = plans_.find(bottom.shape());
    if (known == plans_.end()) return PlanFor(plans_[bottom.shape()] = MakePlan(bottom, top));
    return PlanFor(known->second);
  }
  static const Plan* PlanFor(const Plan& plan) { return plan.is_possible ? &plan : NULL; }

  cudnnTensorDescriptor_t Tensor(int n, int c, int h, int w) const {
    cudnnTensorDescriptor_t tensor;
    CUDNN_OK(cudnnCreateTensorDescriptor(&tensor));
    CUDNN_OK(cudnnSetTensor4dDescriptor(tensor, CUDNN_TENSOR_NCHW, kType, n, c, h, w));
    return tensor;
  }

  cudnnConvolutionDescriptor_t Convolution() const {
    const int *pad = this->pad_.cpu_data(), *stride = this->stride_.cpu_data(), *dilation = this->dilation_.cpu_data();
    cudnnConvolutionDescriptor_t made;
    CUDNN_OK(cudnnCreateConvolutionDescriptor(&made));
    CUDNN_OK(cudnnSetConvolution2dDescriptor(made, pad[0], pad[1], stride[0], stride[1], dilation[0], dilation[1],
                                             CUDNN_CROSS_CORRELATION, kType));
    CUDNN_OK(cudnnSetConvolutionGroupCount(made, this->group_));
    CUDNN_OK(cudnnSetConvolutionMathType(made, TF32() ? CUDNN_DEFAULT_MATH : CUDNN_FMA_MATH));
    return made;
  }

  static string Words(const vector<int>& numbers) {
    string words;
    for (int number : numbers) words += std::to_string(number) + " ";
    return words;
  }
  static string Words(const Blob<int>& numbers) {
    return Words(vector<int>(numbers.cpu_data(), numbers.cpu_data() + numbers.count()));
  }

  Plan MakePlan(const Blob<Dtype>& bottom, const Blob<Dtype>& top) const {
    const int outputs = this->num_output_, *kernel = this->kernel_shape_.cpu_data();
    Plan plan;
    plan.in = Tensor(bottom.num(), bottom.channels(), bottom.height(), bottom.width());
    plan.out = Tensor(top.num(), outputs, top.height(), top.width());
    plan.bias = Tensor(1, outputs, 1, 1);
    CUDNN_OK(cudnnCreateFilterDescriptor(&plan.filter));
    CUDNN_OK(cudnnSetFilter4dDescriptor(plan.filter, kType, CUDNN_TENSOR_NCHW, outputs, bottom.channels() / this->group_,
                                        kernel[0], kernel[1]));
    plan.forward.convolution = Convolution();
    plan.backward.convolution = Convolution();

    const string shape = Words(bottom.shape()) + "-> " + Words(top.shape()) + Words(this->blobs_[0]->shape()) + Words(this->pad_) +
                         Words(this->stride_) + Words(this->dilation_) + (TF32() ? "TF32" : "FP32");
    const auto ask_forward = [&](bool is_measured, int most, int* count, cudnnConvolutionFwdAlgoPerf_t* found) {
      const auto ask = is_measured ? cudnnFindConvolutionForwardAlgorithm : cudnnGetConvolutionForwardAlgorithm_v7;
      return ask(Handle(), plan.in, plan.filter, plan.forward.convolution, plan.out, most, count, found);
    };
    const auto ask_backward = [&](bool is_measured, int most, int* count, cudnnConvolutionBwdDataAlgoPerf_t* found) {
      const auto ask = is_measured ? cudnnFindConvolutionBackwardDataAlgorithm : cudnnGetConvolutionBackwardDataAlgorithm_v7;
      return ask(Handle(), plan.filter, plan.out, plan.backward.convolution, plan.in, most, count, found);
    };
    plan.is_possible = plan.forward.Choose("forward " + shape, TF32(), ask_forward) &&
                       plan.backward.Choose("backward " + shape, TF32(), ask_backward);
    return plan;
  }

  static const cudnnDataType_t kType = sizeof(Dtype) == sizeof(float) ? CUDNN_DATA_FLOAT : CUDNN_DATA_DOUBLE;
  std::map<vector<int>, Plan> plans_;  // by the bottom's shape
};

template <typename Dtype>
class CudnnTF32ConvolutionLayer : public CudnnConvolutionLayer<Dtype> {
 public:
  explicit CudnnTF32ConvolutionLayer(const LayerParameter& param) : CudnnConvolutionLayer<Dtype>(param) {}
  virtual inline const char* type() const { return "CudnnTF32Convolution"; }

 protected:
  virtual bool TF32() const { return true; }
};

// A convolution with a ReLU.
template <typename Dtype, template <typename> class Convolution>
class WithReLU : public Convolution<Dtype> {
 public:
  explicit WithReLU(const LayerParameter& param) : Convolution<Dtype>(param), type_(param.type()) {}
  virtual inline const char* type() const { return type_.c_str(); }

 protected:
  virtual bool HasReLU() const { return true; }

 private:
  const string type_;
};
template <typename Dtype>
using CudnnConvolutionReLULayer = WithReLU<Dtype, CudnnConvolutionLayer>;
template <typename Dtype>
using CudnnTF32ConvolutionReLULayer = WithReLU<Dtype, CudnnTF32ConvolutionLayer>;

INSTANTIATE_CLASS(CudnnConvolutionLayer);
REGISTER_LAYER_CLASS(CudnnConvolution);
INSTANTIATE_CLASS(CudnnTF32ConvolutionLayer);
REGISTER_LAYER_CLASS(CudnnTF32Convolution);
REGISTER_LAYER_CLASS(CudnnConvolutionReLU);
REGISTER_LAYER_CLASS(CudnnTF32ConvolutionReLU);

}  // namespace caffe
