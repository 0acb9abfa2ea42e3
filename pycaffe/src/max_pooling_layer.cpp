// MaxPooling: Caffe's max pooling with a forward pass that the compiler can vectorise, several times faster on the CPU.
// Same values, same mask, same choice among equals (the first in reading order), so the same gradients to the last bit.
// Everything else, the backward pass and the GPU among it, is Caffe's own.

#include <cfloat>
#include <vector>

#include "caffe/layers/pooling_layer.hpp"

namespace caffe {

namespace {

// Pools one plane with KxK windows at stride S. `padded` is the plane with its border, rows of `width` (a multiple of S)
// floats, then K more floats that are read but not used. Fills `value` and `place`, rows of width / S, for `rows` rows:
// the maximum, and where in `padded` it lies, -1 where nothing exceeds -FLT_MAX.
//
// First along the rows, then across them; each time the first of equals stays, which is the first in reading order. Both
// loops run over whole planes without a branch.
template <typename Dtype, int K, int S>
void PoolPlane(const Dtype* padded, int width, int rows, Dtype* row_value, int* row_place, Dtype* value, int* place) {
  const int out_width = width / S;
  const int count = ((rows - 1) * S + K) * out_width;
  for (int i = 0; i < count; ++i) {
    Dtype best = -FLT_MAX;
    int at = -1;
    for (int k = 0; k < K; ++k) {
      const Dtype v = padded[i * S + k];
      const bool more = v > best;
      best = more ? v : best;
      at = more ? i * S + k : at;
    }
    row_value[i] = best;
    row_place[i] = at;
  }
  for (int row = 0; row < rows; ++row) {
    const Dtype* from = row_value + row * S * out_width;
    const int* from_place = row_place + row * S * out_width;
    Dtype* to = value + row * out_width;
    int* to_place = place + row * out_width;
    for (int i = 0; i < out_width; ++i) {
      Dtype best = -FLT_MAX;
      int at = -1;
      for (int k = 0; k < K; ++k) {
        const Dtype v = from[k * out_width + i];
        const bool more = v > best;
        best = more ? v : best;
        at = more ? from_place[k * out_width + i] : at;
      }
      to[i] = best;
      to_place[i] = at;
    }
  }
}

}  // namespace

template <typename Dtype>
class MaxPoolingLayer : public PoolingLayer<Dtype> {
 public:
  explicit MaxPoolingLayer(const LayerParameter& param) : PoolingLayer<Dtype>(param) {}
  virtual inline const char* type() const { return "MaxPooling"; }

 protected:
  virtual void Forward_cpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    const int k = this->kernel_h_, s = this->stride_h_;
    const bool square = k == this->kernel_w_ && s == this->stride_w_;
    const bool max = this->layer_param_.pooling_param().pool() == PoolingParameter_PoolMethod_MAX;
    if (square && max && top.size() == 1 && k == 3 && s == 1) {
      Forward<3, 1>(*bottom[0], top[0]);
    } else if (square && max && top.size() == 1 && k == 3 && s == 2) {
      Forward<3, 2>(*bottom[0], top[0]);
    } else if (square && max && top.size() == 1 && k == 2 && s == 2) {
      Forward<2, 2>(*bottom[0], top[0]);
    } else {
      PoolingLayer<Dtype>::Forward_cpu(bottom, top);
    }
  }

 private:
  template <int K, int S>
  void Forward(const Blob<Dtype>& bottom, Blob<Dtype>* top) {
    const int height = this->height_, width = this->width_;
    const int rows = this->pooled_height_, columns = this->pooled_width_;
    // The plane with a border of -FLT_MAX that never wins, as far as the last windows reach.
    const int padded_height = (rows - 1) * S + K;
    const int padded_width = ((columns - 1) * S + K + S - 1) / S * S;
    const int out_width = padded_width / S;
    std::vector<Dtype> padded(padded_height * padded_width + K, Dtype(-FLT_MAX));
    std::vector<int> index(padded.size(), -1);  // place in `padded` -> index in the plane
    std::vector<Dtype> row_value(padded_height * out_width), value(rows * out_width);
    std::vector<int> row_place(row_value.size()), place(value.size());
    const int used_height = std::min(height, padded_height - this->pad_h_);
    const int used_width = std::min(width, padded_width - this->pad_w_);
    for (int h = 0; h < used_height; ++h) {
      for (int w = 0; w < used_width; ++w) {
        index[(h + this->pad_h_) * padded_width + w + this->pad_w_] = h * width + w;
      }
    }

    const Dtype* in = bottom.cpu_data();
    Dtype* out = top->mutable_cpu_data();
    int* mask = this->max_idx_.mutable_cpu_data();
    const int planes = bottom.num() * this->channels_;
    for (int plane = 0; plane < planes; ++plane) {
      for (int h = 0; h < used_height; ++h) {
        Dtype* row = &padded[(h + this->pad_h_) * padded_width + this->pad_w_];
        for (int w = 0; w < used_width; ++w) {
          row[w] = in[h * width + w];
        }
      }
      PoolPlane<Dtype, K, S>(padded.data(), padded_width, rows, row_value.data(), row_place.data(), value.data(), place.data());
      for (int h = 0; h < rows; ++h) {
        for (int w = 0; w < columns; ++w) {
          const int at = place[h * out_width + w];
          out[h * columns + w] = value[h * out_width + w];
          mask[h * columns + w] = at < 0 ? -1 : index[at];
        }
      }
      in += height * width;
      out += rows * columns;
      mask += rows * columns;
    }
  }
};

INSTANTIATE_CLASS(MaxPoolingLayer);
REGISTER_LAYER_CLASS(MaxPooling);

}  // namespace caffe
