// WinogradConvolution: Caffe's convolution with 3x3 kernels, stride 1 and padding 1, on the CPU in less than half of the
// multiplications, by the minimal filtering F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks" (2016). Rounding differs from Caffe's own as that of two BLAS libraries does.
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

// Transforms the patches of one row, B^T d B: `even` and `odd` hold the even and odd columns of the kIn rows that they lie
// in, `stride` apart. Of each patch element goes to `to`, elements `step` apart.
template <typename Dtype>
void TransformInput(const Dtype* even, const Dtype* odd, int stride, int columns, Dtype* half, Dtype* to, int step) {
  const int n = columns + 1;
  for (int parity = 0; parity < 2; ++parity) {  // down the columns
    const Dtype* from = parity ? odd : even;
    Dtype* down = half + parity * kIn * n;
    for (int t = 0; t < n; ++t) {
      const Dtype r0 = from[t], r1 = from[stride + t], r2 = from[2 * stride + t], r3 = from[3 * stride + t];
      down[t] = r0 - r2;
      down[n + t] = r1 + r2;
      down[2 * n + t] = r2 - r1;
      down[3 * n + t] = r1 - r3;
    }
  }
  for (int i = 0; i < kIn; ++i) {  // along the rows
    const Dtype* e = half + i * n;
    const Dtype* o = half + (kIn + i) * n;
    Dtype* row = to + i * kIn * step;
    for (int t = 0; t < columns; ++t) {
      row[t] = e[t] - e[t + 1];
      row[step + t] = o[t] + e[t + 1];
      row[2 * step + t] = e[t + 1] - o[t];
      row[3 * step + t] = o[t] - o[t + 1];
    }
  }
}

// Transforms the products of one row of patches, A^T m A, elements `step` apart, to two rows of pixels, and adds `bias`.
template <typename Dtype>
void TransformOutput(const Dtype* from, int step, int columns, Dtype bias, Dtype* upper, Dtype* lower) {
  for (int t = 0; t < columns; ++t) {
    Dtype up[kIn], down[kIn];
    for (int j = 0; j < kIn; ++j) {
      const Dtype* m = from + j * step + t;
      up[j] = m[0] + m[kIn * step] + m[2 * kIn * step];
      down[j] = m[kIn * step] - m[2 * kIn * step] - m[3 * kIn * step];
    }
    upper[2 * t] = up[0] + up[1] + up[2] + bias;
    upper[2 * t + 1] = up[1] - up[2] - up[3] + bias;
    lower[2 * t] = down[0] + down[1] + down[2] + bias;
    lower[2 * t + 1] = down[1] - down[2] - down[3] + bias;
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
    if (forward_.empty()) {
      TransformWeights();
    }
    const Dtype* bias = this->bias_term_ ? this->blobs_[1]->cpu_data() : NULL;
    for (int i = 0; i < bottom.size(); ++i) {
      for (int n = 0; n < this->num_; ++n) {
        Convolve(bottom[i]->cpu_data() + n * this->bottom_dim_, this->channels_, bottom[i]->height(), bottom[i]->width(),
                 forward_.data(), this->num_output_, bias, top[i]->mutable_cpu_data() + n * this->top_dim_);
      }
    }
  }

  // The gradient by the input is the same convolution with each kernel turned by half a turn.
  virtual void Backward_cpu(const vector<Blob<Dtype>*>& top, const vector<bool>& propagate_down,
                            const vector<Blob<Dtype>*>& bottom) {
    const vector<bool>& learns = this->param_propagate_down_;
    if (!Fits() || forward_.empty() || std::find(learns.begin(), learns.end(), true) != learns.end()) {
      return ConvolutionLayer<Dtype>::Backward_cpu(top, propagate_down, bottom);
    }
    for (int i = 0; i < top.size(); ++i) {
      for (int n = 0; propagate_down[i] && n < this->num_; ++n) {
        Convolve(top[i]->cpu_diff() + n * this->top_dim_, this->num_output_, bottom[i]->height(), bottom[i]->width(),
                 backward_.data(), this->channels_, NULL, bottom[i]->mutable_cpu_diff() + n * this->bottom_dim_);
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

  // Fills forward_, kArea matrices num_output x channels, and backward_, kArea matrices channels x num_output.
  void TransformWeights() {
    const float g[kIn][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
    const int outputs = this->num_output_, inputs = this->channels_;
    const Dtype* kernel = this->blobs_[0]->cpu_data();
    forward_.resize(kArea * outputs * inputs);
    backward_.resize(forward_.size());
    for (int o = 0; o < outputs; ++o) {
      for (int c = 0; c < inputs; ++c, kernel += 9) {
        for (int i = 0; i < kIn; ++i) {
          for (int j = 0; j < kIn; ++j) {
            Dtype sum = 0, turned = 0;
            for (int r = 0; r < 3; ++r) {
              for (int s = 0; s < 3; ++s) {
                sum += g[i][r] * g[j][s] * kernel[r * 3 + s];
                turned += g[i][r] * g[j][s] * kernel[(2 - r) * 3 + 2 - s];
              }
            }
            const int at = i * kIn + j;
            forward_[(at * outputs + o) * inputs + c] = sum;
            backward_[(at * inputs + c) * outputs + o] = turned;
          }
        }
      }
    }
  }

  // Convolves planes `in` (inputs x height x width) to `out` (outputs x height x width), adding `bias` where it is not NULL.
  void Convolve(const Dtype* in, int inputs, int height, int width, const Dtype* weights, int outputs, const Dtype* bias,
                Dtype* out) {
    const int rows = (height + kOut - 1) / kOut, columns = (width + kOut - 1) / kOut, stride = columns + 1;
    // So many rows of patches at once that what they are transformed to stays in the processor's cache.
    const int some_rows = std::max(1, std::min(rows, kCached / (kArea * (inputs + outputs) * columns)));
    spectrum_.resize(kArea * inputs * some_rows * columns);
    products_.resize(kArea * outputs * some_rows * columns);
    even_.resize((some_rows * kOut + 2) * stride);
    odd_.resize(even_.size());
    half_.resize(2 * kIn * stride);
    pixels_.resize(2 * kOut * columns);
    for (int first = 0; first < rows; first += some_rows) {
      const int n = std::min(some_rows, rows - first), patches = n * columns;
      for (int c = 0; c < inputs; ++c) {
        Deinterleave(in + c * height * width, height, width, first * kOut - 1, n * kOut + 2, stride);
        for (int row = 0; row < n; ++row) {
          TransformInput(&even_[row * kOut * stride], &odd_[row * kOut * stride], stride, columns, half_.data(),
                         &spectrum_[c * patches + row * columns], inputs * patches);
        }
      }
      for (int i = 0; i < kArea; ++i) {
        caffe_cpu_gemm<Dtype>(CblasNoTrans, CblasNoTrans, outputs, patches, inputs, Dtype(1), weights + i * outputs * inputs,
                              &spectrum_[i * inputs * patches], Dtype(0), &products_[i * outputs * patches]);
      }
      Dtype* upper = pixels_.data();
      Dtype* lower = upper + kOut * columns;
      for (int o = 0; o < outputs; ++o) {
        for (int row = 0; row < n; ++row) {
          TransformOutput(&products_[o * patches + row * columns], outputs * patches, columns, bias ? bias[o] : Dtype(0), upper,
                          lower);
          const int h = (first + row) * kOut;
          Dtype* to = out + (o * height + h) * width;
          std::copy(upper, upper + width, to);
          if (h + 1 < height) {
            std::copy(lower, lower + width, to + width);
          }
        }
      }
    }
  }

  // Fills even_ and odd_ with the columns of `count` rows from row `first` of a plane that has a border of zeros.
  void Deinterleave(const Dtype* plane, int height, int width, int first, int count, int stride) {
    for (int i = 0; i < count; ++i) {
      const int h = first + i;
      Dtype* even = &even_[i * stride];
      Dtype* odd = &odd_[i * stride];
      std::fill(even, even + stride, Dtype(0));
      std::fill(odd, odd + stride, Dtype(0));
      if (h < 0 || h >= height) {
        continue;
      }
      for (int w = 0; w < width / 2; ++w) {
        odd[w] = plane[h * width + 2 * w];
        even[w + 1] = plane[h * width + 2 * w + 1];
      }
      if (width % 2) {
        odd[width / 2] = plane[h * width + width - 1];
      }
    }
  }

  std::vector<Dtype> forward_, backward_;                                   // transformed weights
  std::vector<Dtype> even_, odd_, half_, spectrum_, products_, pixels_;  // scratch
};

INSTANTIATE_CLASS(WinogradConvolutionLayer);
REGISTER_LAYER_CLASS(WinogradConvolution);

}  // namespace caffe
