// Products of pixels and weights: what convolutions spend their time on.
#ifndef CHANNELS_LAST_PRODUCTS_HPP_
#define CHANNELS_LAST_PRODUCTS_HPP_

#include "vectors.hpp"

namespace caffe {
namespace channels_last {

// Numbers of the input that a pixel of the output depends on: `length` in a row, and for the next pixel `step` further on.
struct Segment {
  const float* first;
  long step;
  int length;
};

// What becomes of a sum: `bias`, if it is not NULL, is added, and what is there already if it `continues`; and then less than
// zero is zero with `relu`, which never continues.
struct Epilogue {
  const float* bias;
  bool relu;
  bool continues = false;

  // That of the channels from `channel` on.
  Epilogue From(int channel) const { return {bias ? bias + channel : nullptr, relu, continues}; }
};

// For `pixels` <= kPixels pixels p and `channels` <= kPanel channels o:
//   out[p * out_step + o] = the finished sum over all numbers k of the segments of x[p][k] weights[k][o]
// `weights` are a panel of PackPanels; the bias, that of this panel, is filled up to whole vectors.
void Multiply(int pixels, int channels, const Segment* segments, int count, const float* weights, const Epilogue& epilogue,
              float* out, long out_step);

// Where PackPanels puts the weight of input k and output o.
inline size_t PackedPlace(int inputs, int outputs, int k, int o) {
  const int first = o / kPanel * kPanel, width = std::min(kPanel, WholeVectors(outputs - first));
  return static_cast<size_t>(inputs) * first + static_cast<size_t>(k) * width + o - first;
}

inline size_t PackedSize(int inputs, int outputs) { return static_cast<size_t>(inputs) * WholeVectors(outputs); }

// Packs weights(k, o), inputs x outputs, in panels of at most kPanel outputs, each input after input. The panel of output o,
// a multiple of kPanel, begins at number inputs * o. Outputs are filled up to whole vectors with the zeros that are in `to`.
template <class Weights>
void PackPanels(int inputs, int outputs, const Weights& weights, float* to) {
  for (int k = 0; k < inputs; ++k) {
    for (int o = 0; o < outputs; ++o) to[PackedPlace(inputs, outputs, k, o)] = weights(k, o);
  }
}

}  // namespace channels_last
}  // namespace caffe

#endif  // CHANNELS_LAST_PRODUCTS_HPP_
