// The objectives on the CPU: to the last bit what NumPy gives in cnn_vis.py, so without fused products and sums.
#include "objective_layer.hpp"

#include <algorithm>
#include <cmath>

namespace caffe {

template <typename Dtype>
void AmplifyLayerLayer<Dtype>::WriteGradient(const Dtype* x, const Blob<Dtype>& shape, Dtype* gradient) const {
  const Dtype l1 = this->numbers_[0], l2 = this->numbers_[1], clip = this->numbers_[2];
  for (int i = 0; i < shape.count(); ++i) {
    const Dtype clipped = x[i] < -clip ? -clip : x[i] > clip ? clip : x[i];
    gradient[i] = -l1 * std::abs(x[i]) - l2 * clipped;
  }
}

template <typename Dtype>
void AmplifyNeuronLayer<Dtype>::WriteGradient(const Dtype* x, const Blob<Dtype>& shape, Dtype* gradient) const {
  const int channels = shape.shape(1), size = shape.count(2);
  for (int i = 0; i < shape.count(); i += size) {
    std::fill_n(gradient + i, size, i / size % channels == this->numbers_[0] ? Dtype(-1) : Dtype(0));
  }
}

#ifdef CPU_ONLY
STUB_GPU_FORWARD(AmplifyLayerLayer, Forward);
STUB_GPU_FORWARD(AmplifyNeuronLayer, Forward);
#endif

INSTANTIATE_CLASS(AmplifyLayerLayer);
INSTANTIATE_CLASS(AmplifyNeuronLayer);
REGISTER_LAYER_CLASS(AmplifyLayer);
REGISTER_LAYER_CLASS(AmplifyNeuron);

}  // namespace caffe
