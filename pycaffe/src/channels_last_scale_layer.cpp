// Layers that treat each channel of blobs (N, height, width, C) in its own way, possibly in place: ChannelsLastBatchNorm, with
// the statistics of the training, and ChannelsLastScale.

#include "channels_last/layer.hpp"

namespace caffe {

// top = (bottom - mean) * scale + bias, with numbers for each channel.
class ByChannelLayer : public channels_last::ChannelsLastLayer {
 public:
  using ChannelsLastLayer::ChannelsLastLayer;

  virtual void LayerSetUp(const Blobs& bottom, const Blobs& top) {
    if (blobs_.empty()) MakeBlobs(bottom[0]->shape(3));
    param_propagate_down_.resize(blobs_.size(), false);
  }
  virtual void Reshape(const Blobs& bottom, const Blobs& top) {
    CHECK_EQ(bottom[0]->num_axes(), 4);
    top[0]->ReshapeLike(*bottom[0]);
  }

 protected:
  virtual void MakeBlobs(int channels) = 0;
  // Fills the numbers from the blobs.
  virtual void SetNumbers() = 0;

  void AddBlob(int length, float value) {
    blobs_.emplace_back(new Blob<float>(vector<int>(1, length)));
    caffe_set(length, value, blobs_.back()->mutable_cpu_data());
  }

  virtual void Forward_cpu(const Blobs& bottom, const Blobs& top) {
    const int channels = bottom[0]->shape(3);
    mean_.assign(channels, 0);
    scale_.assign(channels, 1);
    bias_.assign(channels, 0);
    SetNumbers();
    const float* in = bottom[0]->cpu_data();
    float* out = top[0]->mutable_cpu_data();
    channels_last::ForRows(bottom[0]->count(0, 3), channels, [&](int begin, int end) {
      for (int pixel = begin; pixel < end; ++pixel) {
        const float *from = in + static_cast<long>(pixel) * channels, *mean = mean_.data(), *scale = scale_.data();
        const float* bias = bias_.data();
        float* to = out + static_cast<long>(pixel) * channels;
        for (int c = 0; c < channels; ++c) to[c] = (from[c] - mean[c]) * scale[c] + bias[c];
      }
    });
  }

  virtual void Backward_cpu(const Blobs& top, const vector<bool>& propagate_down, const Blobs& bottom) {
    if (!propagate_down[0]) return;
    const int channels = bottom[0]->shape(3);
    const float* gradient = top[0]->cpu_diff();
    float* to = bottom[0]->mutable_cpu_diff();
    channels_last::ForRows(bottom[0]->count(0, 3), channels, [&](int begin, int end) {
      for (int pixel = begin; pixel < end; ++pixel) {
        const float *from = gradient + static_cast<long>(pixel) * channels, *scale = scale_.data();
        float* result = to + static_cast<long>(pixel) * channels;
        for (int c = 0; c < channels; ++c) result[c] = from[c] * scale[c];
      }
    });
  }

  vector<float> mean_, scale_, bias_;
};

class ChannelsLastBatchNormLayer : public ByChannelLayer {
 public:
  using ByChannelLayer::ByChannelLayer;
  virtual inline const char* type() const { return "ChannelsLastBatchNorm"; }

 protected:
  virtual void MakeBlobs(int channels) {
    AddBlob(channels, 0);
    AddBlob(channels, 0);
    AddBlob(1, 0);
  }

  virtual void SetNumbers() {
    const float *mean = blobs_[0]->cpu_data(), *variance = blobs_[1]->cpu_data();
    const float weight = blobs_[2]->cpu_data()[0], scale = weight == 0 ? 0 : 1 / weight;
    for (int c = 0; c < mean_.size(); ++c) {
      mean_[c] = mean[c] * scale;
      scale_[c] = 1 / std::sqrt(variance[c] * scale + layer_param_.batch_norm_param().eps());
    }
  }
};

class ChannelsLastScaleLayer : public ByChannelLayer {
 public:
  using ByChannelLayer::ByChannelLayer;
  virtual inline const char* type() const { return "ChannelsLastScale"; }

 protected:
  virtual void MakeBlobs(int channels) {
    AddBlob(channels, 1);
    if (layer_param_.scale_param().bias_term()) AddBlob(channels, 0);
  }

  virtual void SetNumbers() {
    const int channels = scale_.size();
    std::copy_n(blobs_[0]->cpu_data(), channels, scale_.begin());
    if (blobs_.size() > 1) std::copy_n(blobs_[1]->cpu_data(), channels, bias_.begin());
  }
};

REGISTER_CHANNELS_LAST(ChannelsLastBatchNorm);
REGISTER_CHANNELS_LAST(ChannelsLastScale);

}  // namespace caffe
