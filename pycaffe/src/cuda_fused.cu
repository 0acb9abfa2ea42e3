// What Caffe's layers do on a GPU in several kernels, done in one: each is a node of a CUDA graph, and a pass has hundreds.
//
// CudaConcat: Caffe's Concat, with one kernel for all of its parts.
#include <vector>

#include "caffe/layers/concat_layer.hpp"
#include "cnn_vis_fused.hpp"

namespace caffe {

namespace {

const int kMostParts = 8;

// Arrays, or places in a Concat, in order.
template <typename Dtype>
struct Parts {
  Dtype* arrays[kMostParts];
  int ends[kMostParts];
  int count = 0;

  void Add(Dtype* array, int length) {
    arrays[count] = array;
    ends[count] = (count ? ends[count - 1] : 0) + length;
    ++count;
  }
};

// top and parts are (number, places, size); the places of a part are its share of the top's. Loops are unrolled, here and in
// SumParts, as a parameter with an index that is not constant would be copied to memory of each thread first.
template <typename Dtype>
__global__ void ConcatParts(const int n, Parts<Dtype> parts, const int places, const int size, Dtype* top, const bool forward) {
  CUDA_KERNEL_LOOP(i, n) {
    const int place = i / size % places, number = i / size / places;
    Dtype* array = parts.arrays[0];
    int begin = 0, end = parts.ends[0];
#pragma unroll
    for (int part = 1; part < kMostParts; ++part) {
      if (part < parts.count && place >= parts.ends[part - 1]) {
        array = parts.arrays[part], begin = parts.ends[part - 1], end = parts.ends[part];
      }
    }
    if (!array) continue;
    Dtype& value = array[(number * (end - begin) + place - begin) * size + i % size];
    if (forward) {
      top[i] = value;
    } else {
      value = top[i];
    }
  }
}

template <typename Dtype>
__global__ void SumParts(const int n, Parts<const Dtype> parts, Dtype* sum) {
  CUDA_KERNEL_LOOP(i, n) {
    Dtype value = parts.arrays[0][i];
#pragma unroll
    for (int part = 1; part < kMostParts; ++part) {
      if (part < parts.count) value += parts.arrays[part][i];
    }
    sum[i] = value;
  }
}

// y is (number, channels, size).
template <typename Dtype>
__global__ void ReLUInPlace(const int n, const Dtype* bias, const int channels, const int size, Dtype* y) {
  CUDA_KERNEL_LOOP(i, n) {
    const Dtype value = bias ? y[i] + bias[i / size % channels] : y[i];
    y[i] = value > 0 ? value : value * 0;
  }
}

template <typename Dtype>
__global__ void ReLUGradientInPlace(const int n, const Dtype* y, Dtype* dy) {
  CUDA_KERNEL_LOOP(i, n) dy[i] *= y[i] > 0;
}

}  // namespace

template <typename Dtype>
class CudaConcatLayer : public ConcatLayer<Dtype> {
 public:
  explicit CudaConcatLayer(const LayerParameter& param) : ConcatLayer<Dtype>(param) {}
  virtual inline const char* type() const { return "CudaConcat"; }

 protected:
  virtual void Forward_gpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    if (IsCaffes(bottom)) return ConcatLayer<Dtype>::Forward_gpu(bottom, top);
    Parts<Dtype> parts;
    for (Blob<Dtype>* blob : bottom) {  // which the kernel only reads
      parts.Add(const_cast<Dtype*>(blob->gpu_data()), blob->shape(this->concat_axis_));
    }
    Do(parts, top[0]->count(), top[0]->mutable_gpu_data(), true);
  }

  virtual void Backward_gpu(const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
                            const vector<Blob<Dtype>*>& bottom) {
    if (IsCaffes(bottom)) return ConcatLayer<Dtype>::Backward_gpu(top, propagate_down, bottom);
    Parts<Dtype> parts;
    for (size_t i = 0; i < bottom.size(); ++i) {
      parts.Add(propagate_down[i] ? bottom[i]->mutable_gpu_diff() : NULL, bottom[i]->shape(this->concat_axis_));
    }
    Do(parts, top[0]->count(), const_cast<Dtype*>(top[0]->gpu_diff()), false);
  }

 private:
  static bool IsCaffes(const vector<Blob<Dtype>*>& bottom) { return bottom.size() == 1 || bottom.size() > kMostParts; }

  void Do(const Parts<Dtype>& parts, int n, Dtype* top, bool forward) {
    const int places = parts.ends[parts.count - 1], size = this->concat_input_size_;
    ConcatParts<Dtype><<<CAFFE_GET_BLOCKS(n), CAFFE_CUDA_NUM_THREADS>>>(n, parts, places, size, top, forward);
    CUDA_POST_KERNEL_CHECK;
  }
};

INSTANTIATE_CLASS(CudaConcatLayer);
REGISTER_LAYER_CLASS(CudaConcat);

template <typename Dtype>
bool SumDiffs(const vector<Blob<Dtype>*>& from, Blob<Dtype>* to) {
  if (from.size() > kMostParts) return false;
  Parts<const Dtype> parts;
  for (const Blob<Dtype>* blob : from) parts.Add(blob->gpu_diff(), 0);
  const int n = to->count();
  SumParts<Dtype><<<CAFFE_GET_BLOCKS(n), CAFFE_CUDA_NUM_THREADS>>>(n, parts, to->mutable_gpu_diff());
  CUDA_POST_KERNEL_CHECK;
  return true;
}

template <typename Dtype>
void ReLUForward(const Blob<Dtype>* bias, Blob<Dtype>* blob) {
  const int n = blob->count(), channels = blob->shape(1), size = blob->count(2);
  const Dtype* added = bias ? bias->gpu_data() : NULL;
  ReLUInPlace<Dtype><<<CAFFE_GET_BLOCKS(n), CAFFE_CUDA_NUM_THREADS>>>(n, added, channels, size, blob->mutable_gpu_data());
  CUDA_POST_KERNEL_CHECK;
}

template <typename Dtype>
void ReLUBackward(Blob<Dtype>* blob) {
  const int n = blob->count();
  ReLUGradientInPlace<Dtype><<<CAFFE_GET_BLOCKS(n), CAFFE_CUDA_NUM_THREADS>>>(n, blob->gpu_data(), blob->mutable_gpu_diff());
  CUDA_POST_KERNEL_CHECK;
}

template bool SumDiffs(const vector<Blob<float>*>& from, Blob<float>* to);
template bool SumDiffs(const vector<Blob<double>*>& from, Blob<double>* to);
template void ReLUForward(const Blob<float>* bias, Blob<float>* blob);
template void ReLUForward(const Blob<double>* bias, Blob<double>* blob);
template void ReLUBackward(Blob<float>* blob);
template void ReLUBackward(Blob<double>* blob);

}  // namespace caffe
