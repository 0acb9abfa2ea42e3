// WinogradConvolution: Caffe's convolution with 3x3 kernels, stride 1 and padding 1, on the CPU in less than half of the
// multiplications, by the minimal filtering F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks" (2016). Rounding differs from Caffe's own as that of two BLAS libraries does. F(4x4, 3x3) takes fewer yet, but
// was no faster in a network, whose weights it swells, and rounds visibly worse.
//
// For networks that are only looked through: the weights are those of the first pass, and as soon as any gradient of theirs
// is asked for, or the shape is another, it is Caffe's own layer, as it is on a GPU.

#include <algorithm>
#include <vector>

#include "caffe/layers/conv_layer.hpp"
#include "caffe/util/math_functions.hpp"

namespace caffe {

namespace {

const int kOut = 2;           // a patch of output pixels, to the side
const int kIn = kOut + 2;     // the patch of input that it depends on
const int kArea = kIn * kIn;  // products for each patch and pair of channels, where direct convolution takes 36
const int kCached = 1 << 18;  // numbers that a processor's cache holds with ease

// The output of a patch d and a kernel g is AT [(G g GT) * (BT d B)] A.
constexpr float BT[kIn][kIn] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}};
constexpr float G[kIn][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
constexpr float AT[kOut][kIn] = {{1, 1, 1, 0}, {0, 1, -1, -1}};
// A kernel turned by half a turn has the same G g GT with the first and the last row exchanged, and so the columns.
const int kTurned[kIn] = {3, 1, 2, 0};

// Vectors out[i] = sum over j of M[i][j] in[j], of n numbers, `in_step` and `out_step` apart.
template <typename Dtype, int rows>
inline void Transform(const float (&M)[rows][kIn], const Dtype* __restrict__ in, int in_step, Dtype* __restrict__ out,
                      int out_step, int n) {
  for (int t = 0; t < n; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      Dtype sum = 0;
#pragma GCC unroll 4
      for (int j = 0; j < kIn; ++j) {
        sum += M[i][j] * in[j * in_step + t];
      }
      out[i * out_step + t] = sum;
    }
  }
}

}  // namespace

template <typename Dtype>
class WinogradConvolutionLayer : public ConvolutionLayer<Dtype> {
 public:
  explicit WinogradConvolutionLayer(const LayerParameter& param) : ConvolutionLayer<Dtype>(param) {}
  virtual inline const char* type() const { return "WinogradConvolution"; }

 protected:
  virtual void Forward_cpu(const vector<Blob<Dtype>*>& bottom, const vector<Blob<Dtype>*>& top) {
    if (!Fits()) {
      return ConvolutionLayer<Dtype>::Forward_cpu(bottom, top);
    }
    if (weights_.empty()) {
      TransformWeights();
    }
    const Dtype* bias = this->bias_term_ ? this->blobs_[1]->cpu_data() : NULL;
    for (int i = 0; i < bottom.size(); ++i) {
      for (int n = 0; n < this->num_; ++n) {
        Convolve(bottom[i]->cpu_data() + n * this->bottom_dim_, this->channels_, bottom[i]->height(), bottom[i]->width(),
                 this->num_output_, false, bias, top[i]->mutable_cpu_data() + n * this->top_dim_);
      }
    }
  }

  // The gradient by the input is the same convolution with each kernel turned by half a turn.
  virtual void Backward_cpu(const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
                            const vector<Blob<Dtype>*>& bottom) {
    const vector<bool>& learns = this->param_propagate_down_;
    if (!Fits() || weights_.empty() || std::find(learns.begin(), learns.end(), true) != learns.end()) {
      return ConvolutionLayer<Dtype>::Backward_cpu(top, propagate_down, bottom);
    }
    for (int i = 0; i < top.size(); ++i) {
      for (int n = 0; propagate_down[i] && n < this->num_; ++n) {
        Convolve(top[i]->cpu_diff() + n * this->top_dim_, this->num_output_, bottom[i]->height(), bottom[i]->width(),
                 this->channels_, true, NULL, bottom[i]->mutable_cpu_diff() + n * this->bottom_dim_);
      }
    }
  }

 private:
  bool Fits() const {
    const int* kernel = this->kernel_shape_.cpu_data();
    const int* stride = this->stride_.cpu_data();
    const int* pad = this->pad_.cpu_data();
    const int* dilation = this->dilation_.cpu_data();
    return this->num_spatial_axes_ == 2 && this->group_ == 1 && kernel[0] == 3 && kernel[1] == 3 && stride[0] == 1 &&
           stride[1] == 1 && pad[0] == 1 && pad[1] == 1 && dilation[0] == 1 && dilation[1] == 1;
  }

  // Fills weights_, kArea matrices num_output x channels.
  void TransformWeights() {
    const int count = this->num_output_ * this->channels_;
    const Dtype* kernel = this->blobs_[0]->cpu_data();
    weights_.resize(kArea * count);
    for (int k = 0; k < count; ++k, kernel += 9) {
      for (int i = 0; i < kIn; ++i) {
        Dtype half[3];
        for (int s = 0; s < 3; ++s) {
          half[s] = G[i][0] * kernel[s] + G[i][1] * kernel[3 + s] + G[i][2] * kernel[6 + s];
        }
        for (int j = 0; j < kIn; ++j) {
          weights_[(i * kIn + j) * count + k] = G[j][0] * half[0] + G[j][1] * half[1] + G[j][2] * half[2];
        }
      }
    }
  }

  // Convolves planes `in` (inputs x height x width) to `out` (outputs x height x width), adding `bias` where it is not NULL;
  // `back`: with the kernels turned, and inputs and outputs exchanged.
  void Convolve(const Dtype* in, int inputs, int height, int width, int outputs, bool back, const Dtype* bias, Dtype* out) {
    const int rows = (height + kOut - 1) / kOut, columns = (width + kOut - 1) / kOut;
    // So many rows of patches at once that what they are transformed to stays in the processor's cache.
    const int most = std::max(1, std::min(rows, kCached / (kArea * (inputs + outputs) * columns)));
    const int turns = (rows + most - 1) / most;
    patches_.resize(kArea * most * columns);
    half_.resize(patches_.size());
    spectrum_.resize(inputs * patches_.size());
    products_.resize(outputs * patches_.size());
    bordered_.resize((most * kOut + 2) * (columns * kOut + 2));
    for (int turn = 0; turn < turns; ++turn) {
      const int first = rows * turn / turns, n = rows * (turn + 1) / turns - first, patches = n * columns;
      for (int c = 0; c < inputs; ++c) {
        Gather(in + c * height * width, height, width, first * kOut - 1, n, columns);
        for (int j = 0; j < kIn; ++j) {  // down the columns
          Transform(BT, &patches_[j * patches], kIn * patches, &half_[j * patches], kIn * patches, patches);
        }
        for (int i = 0; i < kIn; ++i) {  // along the rows
          Transform(BT, &half_[i * kIn * patches], patches, &spectrum_[(i * kIn * inputs + c) * patches], inputs * patches,
                    patches);
        }
      }
      for (int at = 0; at < kArea; ++at) {
        const int matrix = back ? kTurned[at / kIn] * kIn + kTurned[at % kIn] : at;
        caffe_cpu_gemm<Dtype>(back ? CblasTrans : CblasNoTrans, CblasNoTrans, outputs, patches, inputs, Dtype(1),
                              &weights_[matrix * outputs * inputs], &spectrum_[at * inputs * patches], Dtype(0),
                              &products_[at * outputs * patches]);
      }
      for (int o = 0; o < outputs; ++o) {
        for (int j = 0; j < kIn; ++j) {
          Transform(AT, &products_[(j * outputs + o) * patches], kIn * outputs * patches, &half_[j * patches], kIn * patches,
                    patches);
        }
        for (int i = 0; i < kOut; ++i) {
          Transform(AT, &half_[i * kIn * patches], patches, &patches_[i * kOut * patches], patches, patches);
        }
        Scatter(bias ? bias[o] : Dtype(0), n, columns, first * kOut, height, width, out + o * height * width);
      }
    }
  }

  // Fills patches_, [row in the patch][column in the patch][patch], with `n` rows of patches of a plane that has a border of
  // zeros; the first of them begins at row `top`.
  void Gather(const Dtype* plane, int height, int width, int top, int n, int columns) {
    const int stride = columns * kOut + 2;
    std::fill(bordered_.begin(), bordered_.end(), Dtype(0));
    for (int y = std::max(0, -top); y < n * kOut + 2 && top + y < height; ++y) {
      std::copy(plane + (top + y) * width, plane + (top + y + 1) * width, &bordered_[y * stride + 1]);
    }
    for (int i = 0; i < kIn; ++i) {
      for (int row = 0; row < n; ++row) {
        const Dtype* __restrict__ from = &bordered_[(row * kOut + i) * stride];
        Dtype* __restrict__ to = &patches_[(i * kIn * n + row) * columns];
        for (int t = 0; t < columns; ++t) {
#pragma GCC unroll 4
          for (int j = 0; j < kIn; ++j) {
            to[j * n * columns + t] = from[t * kOut + j];
          }
        }
      }
    }
  }

  // The reverse, of output: writes those of patches_ that lie in the plane, from row `top` on, with `bias` added.
  void Scatter(Dtype bias, int n, int columns, int top, int height, int width, Dtype* plane) {
    for (int row = 0; row < n; ++row) {
      for (int i = 0; i < kOut && top + row * kOut + i < height; ++i) {
        const Dtype* __restrict__ from = &patches_[(i * kOut * n + row) * columns];
        Dtype* __restrict__ to = bordered_.data();
        for (int t = 0; t < columns; ++t) {
#pragma GCC unroll 2
          for (int j = 0; j < kOut; ++j) {
            to[t * kOut + j] = from[j * n * columns + t] + bias;
          }
        }
        std::copy(to, to + width, plane + (top + row * kOut + i) * width);
      }
    }
  }

  std::vector<Dtype> weights_;                                            // transformed
  std::vector<Dtype> bordered_, patches_, half_, spectrum_, products_;  // scratch
};

INSTANTIATE_CLASS(WinogradConvolutionLayer);
REGISTER_LAYER_CLASS(WinogradConvolution);

}  // namespace caffe
