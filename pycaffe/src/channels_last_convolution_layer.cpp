// ChannelsLastConvolution: Caffe's Convolution in two dimensions, from blobs (N, C, height, width), with `axis: 1`, or
// (N, height, width, C), with `axis: 3`, to (N, height, width, C). With a relu_param also the ReLU that follows it.

#include "channels_last/convolution.hpp"
#include "channels_last/layer.hpp"

namespace caffe {

class ChannelsLastConvolutionLayer : public channels_last::ChannelsLastLayer {
 public:
  using ChannelsLastLayer::ChannelsLastLayer;
  virtual inline const char* type() const { return "ChannelsLastConvolution"; }

  virtual void LayerSetUp(const Blobs& bottom, const Blobs& top) {
    const ConvolutionParameter& c = layer_param_.convolution_param();
    CHECK(c.axis() == 1 || c.axis() == 3) << "axis of channels";
    is_planar_ = c.axis() == 1;
    CHECK(!(is_planar_ && Adds())) << "only a gradient with the channels last can be added to";
    geometry_.inputs = bottom[0]->shape(c.axis());
    geometry_.outputs = c.num_output();
    geometry_.groups = c.group();
    CHECK_EQ(geometry_.inputs % geometry_.groups, 0);
    CHECK_EQ(geometry_.outputs % geometry_.groups, 0);
    for (int i = 0; i < 2; ++i) {
      channels_last::Side& side = i ? geometry_.x : geometry_.y;
      side.kernel = OneOf(c.kernel_size(), i, c.has_kernel_h() || c.has_kernel_w(), i ? c.kernel_w() : c.kernel_h(), 0);
      side.stride = OneOf(c.stride(), i, c.has_stride_h() || c.has_stride_w(), i ? c.stride_w() : c.stride_h(), 1);
      side.pad = OneOf(c.pad(), i, c.has_pad_h() || c.has_pad_w(), i ? c.pad_w() : c.pad_h(), 0);
      side.dilation = OneOf(c.dilation(), i, false, 0, 1);
      CHECK(side.kernel > 0 && side.stride > 0 && side.dilation > 0) << "sizes of the kernel";
    }
    if (blobs_.empty()) {
      const vector<int> shape = {geometry_.outputs, geometry_.group_inputs(), geometry_.y.kernel, geometry_.x.kernel};
      blobs_.resize(c.bias_term() ? 2 : 1);
      blobs_[0].reset(new Blob<float>(shape));
      if (c.bias_term()) blobs_[1].reset(new Blob<float>(vector<int>(1, geometry_.outputs)));
    }
    param_propagate_down_.resize(blobs_.size(), false);
  }

  virtual void Reshape(const Blobs& bottom, const Blobs& top) {
    CHECK_EQ(bottom[0]->num_axes(), 4);
    CHECK_EQ(bottom[0]->shape(is_planar_ ? 1 : 3), geometry_.inputs);
    for (int i = 0; i < 2; ++i) {
      channels_last::Side& side = i ? geometry_.x : geometry_.y;
      side.size = bottom[0]->shape(i + (is_planar_ ? 2 : 1));
      side.out_size = (side.size + 2 * side.pad - side.dilation * (side.kernel - 1) - 1) / side.stride + 1;
      CHECK_GT(side.out_size, 0) << "the kernel is larger than the picture";
    }
    top[0]->Reshape({bottom[0]->shape(0), geometry_.y.out_size, geometry_.x.out_size, geometry_.outputs});
  }

 protected:
  virtual void Forward_cpu(const Blobs& bottom, const Blobs& top) {
    Prepare();
    const float* bias = blobs_.size() > 1 ? bias_.data() : nullptr;
    for (int n = 0; n < bottom[0]->shape(0); ++n) {
      algorithm_->Forward(bottom[0]->cpu_data() + n * bottom[0]->count(1), {bias, layer_param_.has_relu_param()},
                          top[0]->mutable_cpu_data() + n * top[0]->count(1));
    }
  }

  virtual void Backward_cpu(const Blobs& top, const vector<bool>& propagate_down, const Blobs& bottom) {
    if (!propagate_down[0]) return;
    Prepare();
    for (int n = 0; n < bottom[0]->shape(0); ++n) {
      const float* mask = layer_param_.has_relu_param() ? top[0]->cpu_data() + n * top[0]->count(1) : nullptr;
      algorithm_->Backward(top[0]->cpu_diff() + n * top[0]->count(1), mask, Adds(),
                           bottom[0]->mutable_cpu_diff() + n * bottom[0]->count(1));
    }
  }

 private:
  // What a convolution_param says for side i: two numbers, or one for both, or in fields of its own.
  template <class Repeated>
  static int OneOf(const Repeated& numbers, int i, bool is_own, int own, int otherwise) {
    return is_own ? own : numbers.size() == 0 ? otherwise : numbers.Get(numbers.size() > 1 ? i : 0);
  }

  // Chooses the algorithm for the size of the picture, and copies the bias, filled up to whole vectors.
  void Prepare() {
    if (algorithm_ && geometry_ == prepared_) return;
    prepared_ = geometry_;
    const channels_last::Side &y = geometry_.y, &x = geometry_.x;
    const channels_last::Strides planar = {static_cast<long>(y.size) * x.size, 1, x.size};
    const channels_last::Strides last = {1, geometry_.inputs, static_cast<long>(x.size) * geometry_.inputs};
    algorithm_ = channels_last::ChooseAlgorithm(geometry_, is_planar_ ? planar : last, blobs_[0]->cpu_data());
    if (blobs_.size() > 1) {
      const float* bias = blobs_[1]->cpu_data();
      std::copy(bias, bias + geometry_.outputs, bias_.Need(channels_last::WholeVectors(geometry_.outputs)));
    }
  }

  channels_last::Geometry geometry_, prepared_;
  bool is_planar_;
  std::unique_ptr<channels_last::Algorithm> algorithm_;
  channels_last::Buffer bias_;
};

REGISTER_CHANNELS_LAST(ChannelsLastConvolution);

}  // namespace caffe
