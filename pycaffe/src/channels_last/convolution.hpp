// Algorithms for the convolution of a picture with the channels last.
#ifndef CHANNELS_LAST_CONVOLUTION_HPP_
#define CHANNELS_LAST_CONVOLUTION_HPP_

#include <memory>

#include "picture.hpp"
#include "products.hpp"

namespace caffe {
namespace channels_last {

struct Side {  // vertically or horizontally
  int kernel, stride, pad, dilation, size, out_size;
  bool operator==(const Side& o) const {
    return kernel == o.kernel && stride == o.stride && pad == o.pad && dilation == o.dilation && size == o.size;
  }
};

struct Geometry {
  int inputs, outputs, groups;  // channels; each group of outputs depends on a group of the inputs
  Side y, x;
  int group_inputs() const { return inputs / groups; }
  int group_outputs() const { return outputs / groups; }
  bool operator==(const Geometry& o) const { return y == o.y && x == o.x; }  // of the same layer
};

// How far it is in memory from a number of the input to its next channel, column and row.
struct Strides {
  long channel, column, row;
};

class Algorithm {
 public:
  virtual ~Algorithm() {}
  // `out` of a picture `in`, both channels last.
  virtual void Forward(const float* in, const Epilogue& epilogue, float* out) = 0;
  // The gradient `to` by the input, from that by the output, which counts as 0 where `mask` is not positive, if that is not
  // NULL. If it `adds`, the gradient is added to what is there.
  virtual void Backward(const float* gradient, const float* mask, bool adds, float* to) = 0;
};

// The fastest algorithm for a geometry and an input of these strides. `weights` are Caffe's, (outputs, inputs of a group,
// kernel height, kernel width); they are packed when they are first used, and must not change afterwards.
std::unique_ptr<Algorithm> ChooseAlgorithm(const Geometry& geometry, const Strides& strides, const float* weights);

}  // namespace channels_last
}  // namespace caffe

#endif  // CHANNELS_LAST_CONVOLUTION_HPP_
