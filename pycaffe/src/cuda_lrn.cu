// CudaLRN: Caffe's LRN across channels with a thread for each value. Caffe's own has one for each pixel, which walks through
// all channels: for a few tiles that is too few threads for a large card.
#include <vector>

#include "caffe/layers/lrn_layer.hpp"
#include "caffe/util/math_functions.hpp"

namespace caffe {

// What the value i needs of the channels at most `reach` away from its own, `step` values apart: the sum of term(i of another).
#define CNN_VIS_SUM_NEAR(sum, i, channels, step, reach, term)                                    \
  {                                                                                              \
    const int channel = i / step % channels;                                                     \
    for (int c = max(-reach, -channel); c <= min(reach, channels - 1 - channel); ++c) {          \
      const int j = i + c * step;                                                                \
      sum += term;                                                                               \
    }                                                                                            \
  }

// scale = k + factor * (sum of x^2), y = x * scale^-beta
template <typename Dtype>
__global__ void CudaLRNForward(const int n, const Dtype* x, const int channels, const int step, const int reach,
                               const Dtype factor, const Dtype k, const Dtype beta, Dtype* scale, Dtype* y) {
  CUDA_KERNEL_LOOP(i, n) {
    Dtype sum = 0;
    CNN_VIS_SUM_NEAR(sum, i, channels, step, reach, x[j] * x[j])
    scale[i] = k + factor * sum;
    y[i] = x[i] * pow(scale[i], -beta);
  }
}

// dx = dy * scale^-beta - factor * x * (sum of dy * y / scale)
template <typename Dtype>
__global__ void CudaLRNBackward(const int n, const Dtype* x, const Dtype* y, const Dtype* scale, const Dtype* dy,
                                const int channels, const int step, const int reach, const Dtype factor, const Dtype beta,
                                Dtype* dx) {
  CUDA_KERNEL_LOOP(i, n) {
    Dtype sum = 0;
    CNN_VIS_SUM_NEAR(sum, i, channels, step, reach, dy[j] * y[j] / scale[j])
    dx[i] = dy[i] * pow(scale[i], -beta) - factor * x[i] * sum;
  }
}

template <typename Dtype>
class CudaLRNLayer : public LRNLayer<Dtype> {
 public:
  explicit CudaLRNLayer(const LayerParameter& param) : LRNLayer<Dtype>(param) {}
  virtual inline const char* type() const { return "CudaLRN"; }

 protected:
  virtual void CrossChannelForward_gpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    const int n = bottom[0]->count();
    CudaLRNForward<Dtype><<<CAFFE_GET_BLOCKS(n), CAFFE_CUDA_NUM_THREADS>>>(
        n, bottom[0]->gpu_data(), this->channels_, this->height_ * this->width_, this->pre_pad_, this->alpha_ / this->size_,
        this->k_, this->beta_, this->scale_.mutable_gpu_data(), top[0]->mutable_gpu_data());
    CUDA_POST_KERNEL_CHECK;
  }

  virtual void CrossChannelBackward_gpu(const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
                                        const vector<Blob<Dtype>*>& bottom) {
    const int n = bottom[0]->count();
    CudaLRNBackward<Dtype><<<CAFFE_GET_BLOCKS(n), CAFFE_CUDA_NUM_THREADS>>>(
        n, bottom[0]->gpu_data(), top[0]->gpu_data(), this->scale_.gpu_data(), top[0]->gpu_diff(), this->channels_,
        this->height_ * this->width_, this->pre_pad_, Dtype(2) * this->alpha_ * this->beta_ / this->size_, this->beta_,
        bottom[0]->mutable_gpu_diff());
    CUDA_POST_KERNEL_CHECK;
  }
};

INSTANTIATE_CLASS(CudaLRNLayer);
REGISTER_LAYER_CLASS(CudaLRN);

}  // namespace caffe
