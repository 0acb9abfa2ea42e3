// Layers that move blobs (N, height, width, C).
// ChannelsLastConcat joins several; with a relu_param, after the ReLU of each.
// ChannelsLastSplit passes one on to several layers. They may add up its gradient themselves.
// ChannelsFirst copies one to a blob (N, C, height, width), for layers that need that.

#include "channels_last/layer.hpp"

namespace caffe {

class ChannelsLastConcatLayer : public channels_last::ChannelsLastLayer {
 public:
  using ChannelsLastLayer::ChannelsLastLayer;
  virtual inline const char* type() const { return "ChannelsLastConcat"; }
  virtual inline int ExactNumBottomBlobs() const { return -1; }

  virtual void Reshape(const Blobs& bottom, const Blobs& top) {
    vector<int> shape = bottom[0]->shape();
    shape[3] = 0;
    for (const Blob<float>* blob : bottom) {
      CHECK(std::equal(shape.begin(), shape.begin() + 3, blob->shape().begin())) << "all but channels must agree";
      shape[3] += blob->shape(3);
    }
    top[0]->Reshape(shape);
  }

 protected:
  virtual void Forward_cpu(const Blobs& bottom, const Blobs& top) {
    const int width = top[0]->shape(3);
    const bool relu = layer_param_.has_relu_param();
    float* out = top[0]->mutable_cpu_data();
    vector<const float*> parts;
    for (const Blob<float>* blob : bottom) parts.push_back(blob->cpu_data());
    channels_last::ForRows(top[0]->count(0, 3), width, [&](int begin, int end) {
      for (int pixel = begin; pixel < end; ++pixel) {
        float* to = out + static_cast<long>(pixel) * width;
        for (int i = 0; i < parts.size(); ++i) {
          const int part = bottom[i]->shape(3);
          const float* from = parts[i] + static_cast<long>(pixel) * part;
          if (relu) {
            for (int c = 0; c < part; ++c) to[c] = 0 > from[c] ? 0 : from[c];
          } else {
            std::copy_n(from, part, to);
          }
          to += part;
        }
      }
    });
  }

  virtual void Backward_cpu(const Blobs& top, const vector<bool>& propagate_down, const Blobs& bottom) {
    const int width = top[0]->shape(3);
    const bool relu = layer_param_.has_relu_param();
    const float* gradient = top[0]->cpu_diff();
    vector<float*> parts;
    vector<const float*> masks;
    for (Blob<float>* blob : bottom) parts.push_back(blob->mutable_cpu_diff()), masks.push_back(blob->cpu_data());
    channels_last::ForRows(top[0]->count(0, 3), width, [&](int begin, int end) {
      for (int pixel = begin; pixel < end; ++pixel) {
        const float* from = gradient + static_cast<long>(pixel) * width;
        for (int i = 0; i < parts.size(); ++i) {
          const int part = bottom[i]->shape(3);
          float* to = parts[i] + static_cast<long>(pixel) * part;
          const float* mask = masks[i] + static_cast<long>(pixel) * part;
          if (propagate_down[i] && relu) {
            for (int c = 0; c < part; ++c) to[c] = mask[c] > 0 ? from[c] : 0;
          } else if (propagate_down[i]) {
            std::copy_n(from, part, to);
          }
          from += part;
        }
      }
    });
  }
};

class ChannelsLastSplitLayer : public channels_last::ChannelsLastLayer {
 public:
  using ChannelsLastLayer::ChannelsLastLayer;
  virtual inline const char* type() const { return "ChannelsLastSplit"; }
  virtual inline int ExactNumTopBlobs() const { return -1; }

  virtual void Reshape(const Blobs& bottom, const Blobs& top) {
    for (Blob<float>* blob : top) {
      blob->ReshapeLike(*bottom[0]);
      if (Adds()) blob->ShareDiff(*bottom[0]);
    }
  }

 protected:
  virtual void Forward_cpu(const Blobs& bottom, const Blobs& top) {
    for (Blob<float>* blob : top) blob->ShareData(*bottom[0]);
  }

  virtual void Backward_cpu(const Blobs& top, const vector<bool>& propagate_down, const Blobs& bottom) {
    if (!propagate_down[0] || Adds()) return;
    vector<const float*> parts;
    for (const Blob<float>* blob : top) parts.push_back(blob->cpu_diff());
    float* to = bottom[0]->mutable_cpu_diff();
    const int each = 1 << 12, count = bottom[0]->count();
    channels_last::ForRows(channels_last::DivideUp(count, each), each, [&](int begin, int end) {
      for (int row = begin; row < end; ++row) {
        const int first = row * each, last = std::min(count, first + each);
        std::copy(parts[0] + first, parts[0] + last, to + first);
        for (int part = 1; part < parts.size(); ++part) {
          for (int i = first; i < last; ++i) to[i] += parts[part][i];
        }
      }
    });
  }
};

class ChannelsFirstLayer : public channels_last::ChannelsLastLayer {
 public:
  using ChannelsLastLayer::ChannelsLastLayer;
  virtual inline const char* type() const { return "ChannelsFirst"; }

  virtual void Reshape(const Blobs& bottom, const Blobs& top) {
    CHECK_EQ(bottom[0]->num_axes(), 4);
    top[0]->Reshape({bottom[0]->shape(0), bottom[0]->shape(3), bottom[0]->shape(1), bottom[0]->shape(2)});
  }

 protected:
  virtual void Forward_cpu(const Blobs& bottom, const Blobs& top) {
    channels_last::TransposeMatrices(bottom[0]->cpu_data(), top[0]->count(2), top[0]->shape(1), top[0]->shape(0),
                                     top[0]->mutable_cpu_data());
  }
  virtual void Backward_cpu(const Blobs& top, const vector<bool>& propagate_down, const Blobs& bottom) {
    if (!propagate_down[0]) return;
    channels_last::TransposeMatrices(top[0]->cpu_diff(), top[0]->shape(1), top[0]->count(2), top[0]->shape(0),
                                     bottom[0]->mutable_cpu_diff());
  }
};

REGISTER_CHANNELS_LAST(ChannelsLastConcat);
REGISTER_CHANNELS_LAST(ChannelsLastSplit);
REGISTER_CHANNELS_LAST(ChannelsFirst);

}  // namespace caffe
