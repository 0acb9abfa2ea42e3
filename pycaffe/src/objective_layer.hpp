// The objectives of cnn_vis.py (AmplifyLayer, AmplifyNeuron) as layers, so that activations need not leave the GPU.
#ifndef OBJECTIVE_LAYER_HPP_
#define OBJECTIVE_LAYER_HPP_

#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "caffe/layer.hpp"

namespace caffe {

// Forward writes the gradient of the loss into the bottom's diff, for a backward pass that starts at the layer that made
// the bottom. The top is a single number without a meaning: with a loss weight it tells Net that a backward pass is wanted.
// python_param's param_str, free for layers that Caffe does not know, gives the objective's numbers, separated by spaces.
template <typename Dtype>
class ObjectiveLayer : public Layer<Dtype> {
 public:
  explicit ObjectiveLayer(const LayerParameter& param) : Layer<Dtype>(param) {}
  virtual void LayerSetUp(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    std::istringstream words(this->layer_param_.python_param().param_str());
    std::string word;
    while (words >> word) numbers_.push_back(strtod(word.c_str(), NULL));
    CHECK_EQ(numbers_.size(), ExactNumbers()) << "numbers of " << this->type();
  }
  virtual void Reshape(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    top[0]->Reshape(vector<int>(1, 1));
  }
  virtual inline int ExactNumBottomBlobs() const { return 1; }
  virtual inline int ExactNumTopBlobs() const { return 1; }

 protected:
  virtual size_t ExactNumbers() const = 0;
  virtual void Forward_cpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    WriteGradient(bottom[0]->cpu_data(), *bottom[0], bottom[0]->mutable_cpu_diff());
  }
  virtual void Backward_cpu(const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
                            const vector<Blob<Dtype>*>& bottom) {}
  virtual void Backward_gpu(const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
                            const vector<Blob<Dtype>*>& bottom) {}
  virtual void WriteGradient(const Dtype* x, const Blob<Dtype>& shape, Dtype* gradient) const = 0;

  vector<Dtype> numbers_;
};

// Numbers: l1, l2, clip. The gradient is -l1 |a| - l2 a, where a of the second term is kept within -clip and clip.
template <typename Dtype>
class AmplifyLayerLayer : public ObjectiveLayer<Dtype> {
 public:
  explicit AmplifyLayerLayer(const LayerParameter& param) : ObjectiveLayer<Dtype>(param) {}
  virtual inline const char* type() const { return "AmplifyLayer"; }

 protected:
  virtual size_t ExactNumbers() const { return 3; }
  virtual void WriteGradient(const Dtype* x, const Blob<Dtype>& shape, Dtype* gradient) const;
  virtual void Forward_gpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top);
};

// Number: a channel. The gradient is -1 there, and 0 elsewhere.
template <typename Dtype>
class AmplifyNeuronLayer : public ObjectiveLayer<Dtype> {
 public:
  explicit AmplifyNeuronLayer(const LayerParameter& param) : ObjectiveLayer<Dtype>(param) {}
  virtual inline const char* type() const { return "AmplifyNeuron"; }

 protected:
  virtual size_t ExactNumbers() const { return 1; }
  virtual void WriteGradient(const Dtype* x, const Blob<Dtype>& shape, Dtype* gradient) const;
  virtual void Forward_gpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top);
};

}  // namespace caffe

#endif  // OBJECTIVE_LAYER_HPP_
