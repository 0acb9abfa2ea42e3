// What the layers for blobs with the channels last, (N, height, width, C), have in common.
#ifndef CHANNELS_LAST_LAYER_HPP_
#define CHANNELS_LAST_LAYER_HPP_

#include <algorithm>
#include <cmath>
#include <vector>

#include "caffe/layer.hpp"
#include "caffe/layer_factory.hpp"
#include "caffe/util/math_functions.hpp"
#include "picture.hpp"

namespace caffe {
namespace channels_last {

// A layer for networks whose weights are fixed: they are those of the first pass, and gradients flow to the input only. Single
// precision, on the CPU.
class ChannelsLastLayer : public Layer<float> {
 public:
  typedef std::vector<Blob<float>*> Blobs;
  explicit ChannelsLastLayer(const LayerParameter& param) : Layer<float>(param) {}
  virtual inline int ExactNumBottomBlobs() const { return 1; }
  virtual inline int ExactNumTopBlobs() const { return 1; }
  virtual inline int MinBottomBlobs() const { return 1; }
  virtual inline int MinTopBlobs() const { return 1; }

 protected:
  // Whether the gradient by the bottom is added to what is there already: that of the bottom's other readers, which share it.
  // The param_str of python_param, free for layers that Caffe does not know, says so, and to a Split that its tops share one.
  bool Adds() const { return layer_param_.python_param().param_str() == "adds"; }
};

template <class Made>
shared_ptr<Layer<float>> Make(const LayerParameter& param) {
  return shared_ptr<Layer<float>>(new Made(param));
}

}  // namespace channels_last
}  // namespace caffe

#define REGISTER_CHANNELS_LAST(type) \
  static LayerRegisterer<float> g_creator_##type(#type, channels_last::Make<type##Layer>)

#endif  // CHANNELS_LAST_LAYER_HPP_
