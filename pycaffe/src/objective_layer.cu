// The objectives on the GPU.
#include "objective_layer.hpp"

namespace caffe {

template <typename Dtype>
__global__ void AmplifyLayerGradient(const int n, const Dtype* x, const Dtype l1, const Dtype l2, const Dtype clip,
                                     Dtype* gradient) {
  CUDA_KERNEL_LOOP(i, n) {
    const Dtype clipped = x[i] < -clip ? -clip : x[i] > clip ? clip : x[i];
    gradient[i] = -l1 * fabs(x[i]) - l2 * clipped;
  }
}

template <typename Dtype>
__global__ void AmplifyNeuronGradient(const int n, const int size, const int channels, const int channel, Dtype* gradient) {
  CUDA_KERNEL_LOOP(i, n) { gradient[i] = i / size % channels == channel ? Dtype(-1) : Dtype(0); }
}

template <typename Dtype>
void AmplifyLayerLayer<Dtype>::Forward_gpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
  const int n = bottom[0]->count();
  const Dtype l1 = this->numbers_[0], l2 = this->numbers_[1], clip = this->numbers_[2];
  AmplifyLayerGradient<Dtype><<<CAFFE_GET_BLOCKS(n), CAFFE_CUDA_NUM_THREADS>>>(n, bottom[0]->gpu_data(), l1, l2, clip,
                                                                               bottom[0]->mutable_gpu_diff());
  CUDA_POST_KERNEL_CHECK;
}

template <typename Dtype>
void AmplifyNeuronLayer<Dtype>::Forward_gpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
  const int n = bottom[0]->count(), size = bottom[0]->count(2), channels = bottom[0]->shape(1);
  AmplifyNeuronGradient<Dtype><<<CAFFE_GET_BLOCKS(n), CAFFE_CUDA_NUM_THREADS>>>(n, size, channels, int(this->numbers_[0]),
                                                                                bottom[0]->mutable_gpu_diff());
  CUDA_POST_KERNEL_CHECK;
}

INSTANTIATE_LAYER_GPU_FORWARD(AmplifyLayerLayer);
INSTANTIATE_LAYER_GPU_FORWARD(AmplifyNeuronLayer);

}  // namespace caffe
