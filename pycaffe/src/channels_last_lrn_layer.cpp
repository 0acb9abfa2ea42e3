// ChannelsLastLRN: Caffe's local response normalisation across channels for blobs (N, height, width, C) and the usual exponent
// 0.75. Sums of squares are taken from those of the neighbouring channel, as Caffe takes them: pictures of many steps show
// whether they are rounded as the original's.

#include "channels_last/layer.hpp"

namespace caffe {

class ChannelsLastLRNLayer : public channels_last::ChannelsLastLayer {
 public:
  using ChannelsLastLayer::ChannelsLastLayer;
  virtual inline const char* type() const { return "ChannelsLastLRN"; }

  virtual void LayerSetUp(const Blobs& bottom, const Blobs& top) {
    const LRNParameter& p = layer_param_.lrn_param();
    CHECK(p.beta() == 0.75f && p.norm_region() == LRNParameter_NormRegion_ACROSS_CHANNELS) << "only the usual exponent";
    CHECK_EQ(p.local_size() % 2, 1);
    size_ = p.local_size();
    alpha_ = p.alpha() / size_;
    k_ = p.k();
  }

  virtual void Reshape(const Blobs& bottom, const Blobs& top) {
    CHECK_EQ(bottom[0]->num_axes(), 4);
    channels_ = bottom[0]->shape(3);
    top[0]->ReshapeLike(*bottom[0]);
    scale_.ReshapeLike(*bottom[0]);
  }

 protected:
  // scale = k + alpha / size * (sum of squares in the window of channels), top = bottom * scale^-beta.
  virtual void Forward_cpu(const Blobs& bottom, const Blobs& top) {
    using namespace channels_last;
    const float* in = bottom[0]->cpu_data();
    float *out = top[0]->mutable_cpu_data(), *scales = scale_.mutable_cpu_data();
    const int pixels = scale_.count() / channels_;
    ForRows(DivideUp(pixels, kLanes), static_cast<long>(kLanes) * channels_ * size_, [&](int begin, int end) {
      std::vector<float> scratch(2 * kLanes * WholeVectors(channels_));
      for (int block = begin; block < end; ++block) {
        const long first = static_cast<long>(block) * kLanes * channels_;
        const int count = std::min(kLanes, pixels - block * kLanes);
        SetScales(in + first, count, scales + first, scratch.data(), &scratch[scratch.size() / 2]);
        for (long i = first; i < first + count * channels_; ++i) out[i] = in[i] * Power(scales[i]);
      }
    });
  }

  // The gradient by bottom: top' * scale^-beta - 2 alpha beta / size * bottom * (sum of top' * top / scale in the window).
  virtual void Backward_cpu(const Blobs& top, const vector<bool>& propagate_down, const Blobs& bottom) {
    if (!propagate_down[0]) return;
    const float *in = bottom[0]->cpu_data(), *out = top[0]->cpu_data(), *gradient = top[0]->cpu_diff();
    const float* scales = scale_.cpu_data();
    float* to = bottom[0]->mutable_cpu_diff();
    const float factor = 2 * alpha_ * 0.75f;
    ForPixels([&](long first, float* ratios) {
      const float *x = in + first, *y = out + first, *d = gradient + first, *scale = scales + first;
      float* result = to + first;
      for (int c = 0; c < channels_; ++c) ratios[c] = d[c] * y[c] / scale[c];
      SumWindows(ratios, result);
      for (int c = 0; c < channels_; ++c) result[c] = d[c] * Power(scale[c]) - factor * (x[c] * result[c]);
    });
  }

 private:
  // The scales of `count` pixels, which are summed up in the lanes of vectors. `squares` and `sums` are scratch.
  void SetScales(const float* in, int count, float* scales, float* squares, float* sums) const {
    using namespace channels_last;
    const int channels = channels_, reach = size_ / 2;
    Vector rows[kLanes];
    for (int c = 0; c < channels; c += kLanes) {
      if (count == kLanes && c + kLanes <= channels) {
#pragma GCC unroll 16
        for (int p = 0; p < kLanes; ++p) rows[p] = Load(in + p * channels + c);
      } else {
        for (int p = 0; p < kLanes; ++p) {
          rows[p] = p < count ? LoadFirst(in + p * channels + c, std::min(kLanes, channels - c)) : Vector{};
        }
      }
      Transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) Store(squares + (c + i) * kLanes, rows[i] * rows[i]);
    }
    Vector sum = Vector{} + k_;
    for (int c = -reach; c < channels; ++c) {
      if (c + reach < channels) sum += alpha_ * Load(squares + (c + reach) * kLanes);
      if (c > reach) sum -= alpha_ * Load(squares + (c - reach - 1) * kLanes);
      if (c >= 0) Store(sums + c * kLanes, sum);
    }
    for (int c = 0; c < channels; c += kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = Load(sums + (c + i) * kLanes);
      Transpose(rows);
      if (count == kLanes && c + kLanes <= channels) {
#pragma GCC unroll 16
        for (int p = 0; p < kLanes; ++p) Store(scales + p * channels + c, rows[p]);
      } else {
        for (int p = 0; p < count; ++p) StoreFirst(scales + p * channels + c, rows[p], channels - c);
      }
    }
  }

  // Calls use(place of the first channel, scratch for the channels with zeros around them) for each pixel.
  template <class Use>
  void ForPixels(const Use& use) const {
    const int reach = size_ / 2;
    channels_last::ForRows(scale_.count() / channels_, static_cast<long>(channels_) * size_, [&](int begin, int end) {
      std::vector<float> scratch(channels_ + 2 * reach);
      for (int pixel = begin; pixel < end; ++pixel) use(static_cast<long>(pixel) * channels_, &scratch[reach]);
    });
  }

  void SumWindows(const float* __restrict__ numbers, float* __restrict__ sums) const {
    const int reach = size_ / 2;
    if (size_ == 5) {
      for (int c = 0; c < channels_; ++c) {
        sums[c] = numbers[c - 2] + numbers[c - 1] + numbers[c] + numbers[c + 1] + numbers[c + 2];
      }
      return;
    }
    for (int c = 0; c < channels_; ++c) {
      sums[c] = 0;
      for (int i = c - reach; i <= c + reach; ++i) sums[c] += numbers[i];
    }
  }

  // s^-0.75 for s > 0, rounded as well as a library's pow. A number's bits are nearly its logarithm, so three quarters of them,
  // subtracted from a constant, give it to 6%; a step of Halley's method for y^-4 = s^3 gives it to 0.2%; and a series the
  // rest, from the error with what rounding its products lost.
  static inline float Power(float s) {
#if !defined(__FMA__) && !defined(__aarch64__)
    return std::pow(s, -0.75f);
#endif
    int32_t bits;
    memcpy(&bits, &s, sizeof(bits));
    bits = 0x6f180000 - (bits >> 1) - (bits >> 2);
    float y;
    memcpy(&y, &bits, sizeof(y));
    const float guess = s * y, distance = 1 - guess * guess * guess * y;
    y += y * (distance * (0.25f + 0.15625f * distance));
    const float product = s * y, square = product * product, rest = product * y;  // s^3 y^4 = square rest
    const float lost = std::fma(product, product, -square) * rest + square * std::fma(product, y, -rest) +
                       3 * square * y * std::fma(s, y, -product);
    const float error = std::fma(-square, rest, 1.f) - lost;
    return y + y * (error * (0.25f + error * (0.15625f + error * 0.1171875f)));
  }

  int size_, channels_;
  float alpha_, k_;
  Blob<float> scale_;
};

REGISTER_CHANNELS_LAST(ChannelsLastLRN);

}  // namespace caffe
