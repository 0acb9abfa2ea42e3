// FastLRN: Caffe's local response normalisation across channels, for the usual exponent 0.75, in one pass over memory and
// with square roots for the general power. Rounding is Caffe's, but for a last bit now and then. Other exponents, an even
// window, normalisation within channels and the GPU are Caffe's own. Sums are taken in Caffe's order, for the same rounding:
// this file is compiled without leave to reorder them.

#include <algorithm>
#include <cmath>
#include <vector>

#include "caffe/layers/lrn_layer.hpp"

namespace caffe {

namespace {

const int kBlock = 128;  // pixels that are taken through all channels together

// s^-0.75, rounded as well as a library's pow: square roots give it nearly, and a step of Newton's method for y^-4 = s^3, in
// double precision, the rest.
template <typename Dtype>
inline Dtype Power(Dtype s) {
  const Dtype root = Dtype(1) / std::sqrt(s);
  const double x = s, y = root * std::sqrt(root);
  return y + 0.25 * y * (1 - x * x * x * (y * y) * (y * y));
}

}  // namespace

template <typename Dtype>
class FastLRNLayer : public LRNLayer<Dtype> {
 public:
  explicit FastLRNLayer(const LayerParameter& param) : LRNLayer<Dtype>(param) {}
  virtual inline const char* type() const { return "FastLRN"; }

 protected:
  // scale = k + alpha / size * (sum of squares in the window of channels), top = bottom * scale^-beta.
  virtual void CrossChannelForward_cpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    if (!Fits()) {
      return LRNLayer<Dtype>::CrossChannelForward_cpu(bottom, top);
    }
    const int channels = this->channels_, plane = this->height_ * this->width_, reach = this->pre_pad_;
    const Dtype alpha = this->alpha_ / this->size_, k = this->k_;
    for (int n = 0; n < this->num_; ++n) {
      const Dtype* in = bottom[0]->cpu_data() + n * channels * plane;
      Dtype* scale = this->scale_.mutable_cpu_data() + n * channels * plane;
      Dtype* out = top[0]->mutable_cpu_data() + n * channels * plane;
      for (int first = 0; first < plane; first += kBlock) {
        const int count = std::min(kBlock, plane - first);
        Dtype sum[kBlock];
        std::fill(sum, sum + kBlock, k);
        for (int c = -reach; c < channels; ++c) {
          if (c + reach < channels) {
            const Dtype* x = in + (c + reach) * plane + first;
            for (int p = 0; p < count; ++p) sum[p] += alpha * (x[p] * x[p]);
          }
          if (c > reach) {
            const Dtype* x = in + (c - reach - 1) * plane + first;
            for (int p = 0; p < count; ++p) sum[p] -= alpha * (x[p] * x[p]);
          }
          if (c >= 0) {
            const int at = c * plane + first;
            for (int p = 0; p < count; ++p) {
              scale[at + p] = sum[p];
              out[at + p] = in[at + p] * Power(sum[p]);
            }
          }
        }
      }
    }
  }

  // The gradient by bottom: top' * scale^-beta - 2 alpha beta / size * bottom * (sum of top' * top / scale in the window).
  virtual void CrossChannelBackward_cpu(const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
                                        const vector<Blob<Dtype>*>& bottom) {
    if (!Fits()) {
      return LRNLayer<Dtype>::CrossChannelBackward_cpu(top, propagate_down, bottom);
    }
    const int channels = this->channels_, plane = this->height_ * this->width_, reach = this->pre_pad_;
    const Dtype factor = 2 * this->alpha_ * this->beta_ / this->size_;
    std::vector<Dtype> ratio(channels * kBlock);
    for (int n = 0; n < this->num_; ++n) {
      const Dtype* in = bottom[0]->cpu_data() + n * channels * plane;
      const Dtype* out = top[0]->cpu_data() + n * channels * plane;
      const Dtype* gradient = top[0]->cpu_diff() + n * channels * plane;
      const Dtype* scale = this->scale_.cpu_data() + n * channels * plane;
      Dtype* to = bottom[0]->mutable_cpu_diff() + n * channels * plane;
      for (int first = 0; first < plane; first += kBlock) {
        const int count = std::min(kBlock, plane - first);
        Dtype sum[kBlock] = {0};
        for (int c = -reach; c < channels; ++c) {
          if (c + reach < channels) {
            const int at = (c + reach) * plane + first;
            Dtype* r = &ratio[(c + reach) * kBlock];
            for (int p = 0; p < count; ++p) {
              r[p] = gradient[at + p] * out[at + p] / scale[at + p];
              sum[p] += r[p];
            }
          }
          if (c > reach) {
            const Dtype* r = &ratio[(c - reach - 1) * kBlock];
            for (int p = 0; p < count; ++p) sum[p] -= r[p];
          }
          if (c >= 0) {
            const int at = c * plane + first;
            for (int p = 0; p < count; ++p) {
              to[at + p] = gradient[at + p] * Power(scale[at + p]) - factor * (in[at + p] * sum[p]);
            }
          }
        }
      }
    }
  }

 private:
  bool Fits() const { return this->beta_ == Dtype(0.75) && this->size_ % 2 == 1; }
};

INSTANTIATE_CLASS(FastLRNLayer);
REGISTER_LAYER_CLASS(FastLRN);

}  // namespace caffe
