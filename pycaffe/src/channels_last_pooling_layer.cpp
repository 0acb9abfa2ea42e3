// ChannelsLastPooling: Caffe's max pooling for blobs (N, height, width, C). Same values, same choice among equals (the first
// in reading order), and gradients summed in the same order, so the same to the last bit, unless they are added to others. With
// a relu_param, as after that ReLU: the maxima are the same, and where they are 0 there is no gradient.

#include <cfloat>

#include "channels_last/layer.hpp"

namespace caffe {

class ChannelsLastPoolingLayer : public channels_last::ChannelsLastLayer {
 public:
  using ChannelsLastLayer::ChannelsLastLayer;
  virtual inline const char* type() const { return "ChannelsLastPooling"; }

  virtual void LayerSetUp(const Blobs& bottom, const Blobs& top) {
    const PoolingParameter& p = layer_param_.pooling_param();
    y_.kernel = p.has_kernel_size() ? p.kernel_size() : p.kernel_h();
    x_.kernel = p.has_kernel_size() ? p.kernel_size() : p.kernel_w();
    y_.stride = p.has_stride_h() ? p.stride_h() : p.stride();
    x_.stride = p.has_stride_h() ? p.stride_w() : p.stride();
    y_.pad = p.has_pad_h() ? p.pad_h() : p.pad();
    x_.pad = p.has_pad_h() ? p.pad_w() : p.pad();
    CHECK(p.pool() == PoolingParameter_PoolMethod_MAX && !p.global_pooling()) << "only maxima in windows";
    CHECK(y_.pad < y_.kernel && x_.pad < x_.kernel) << "some windows would be empty";
  }

  virtual void Reshape(const Blobs& bottom, const Blobs& top) {
    CHECK_EQ(bottom[0]->num_axes(), 4);
    SetSize(&y_, bottom[0]->shape(1));
    SetSize(&x_, bottom[0]->shape(2));
    channels_ = bottom[0]->shape(3);
    top[0]->Reshape({bottom[0]->shape(0), y_.out_size, x_.out_size, channels_});
    chosen_.Reshape(top[0]->shape());
  }

 protected:
  virtual void Forward_cpu(const Blobs& bottom, const Blobs& top) {
    const float* in = bottom[0]->cpu_data();
    float* out = top[0]->mutable_cpu_data();
    int* chosen = chosen_.mutable_cpu_data();
    const long row = static_cast<long>(x_.out_size) * channels_;
    channels_last::ForRows(bottom[0]->shape(0) * y_.out_size, row * y_.kernel, [&](int begin, int end) {
      for (int i = begin; i < end; ++i) {
        const int n = i / y_.out_size, y = i % y_.out_size * y_.stride - y_.pad;
        for (int x = 0; x < x_.out_size; ++x) {
          const long place = i * row + static_cast<long>(x) * channels_;
          Choose(in + n * bottom[0]->count(1), y, x * x_.stride - x_.pad, out + place, chosen + place);
        }
      }
    });
  }

  virtual void Backward_cpu(const Blobs& top, const vector<bool>& propagate_down, const Blobs& bottom) {
    if (!propagate_down[0]) return;
    const float* gradient = top[0]->cpu_diff();
    const int* chosen = chosen_.cpu_data();
    float* to = bottom[0]->mutable_cpu_diff();
    const long row = static_cast<long>(x_.size) * channels_;
    channels_last::ForRows(bottom[0]->shape(0) * y_.size, row * y_.kernel, [&](int begin, int end) {
      for (int i = begin; i < end; ++i) {
        const int n = i / y_.size;
        for (int x = 0; x < x_.size; ++x) {
          Gather(gradient, chosen, n, i % y_.size, x, to + i * row + static_cast<long>(x) * channels_);
        }
      }
    });
  }

 private:
  struct Side {
    int kernel, stride, pad, size, out_size;
    // The windows that contain a place.
    int First(int place) const { return std::max(0, channels_last::DivideUp(place + pad - kernel + 1, stride)); }
    int Last(int place) const { return std::min(out_size - 1, (place + pad) / stride); }
  };
  static const int kNone = -1;  // instead of a place in the window: no number was larger than the least

  // As Caffe rounds: with padding, no window begins beyond the picture.
  void SetSize(Side* side, int size) const {
    const PoolingParameter& p = layer_param_.pooling_param();
    const int room = size + 2 * side->pad - side->kernel;
    const float steps = static_cast<float>(room) / side->stride;
    side->size = size;
    side->out_size = static_cast<int>(p.round_mode() == PoolingParameter_RoundMode_FLOOR ? floor(steps) : ceil(steps)) + 1;
    if ((y_.pad || x_.pad) && (side->out_size - 1) * side->stride >= size + side->pad) --side->out_size;
  }

  // The maximum of the window at y, x for all channels, and which of its places that is.
  void Choose(const float* in, int y, int x, float* out, int* chosen) const {
    using namespace channels_last;
    const int top = std::max(0, -y), left = std::max(0, -x);
    const int bottom = std::min(y_.kernel, y_.size - y), right = std::min(x_.kernel, x_.size - x);
    const bool is_usual = !top && !left && y_.kernel == 3 && x_.kernel == 3 && bottom == 3 && right == 3;
    const long row = static_cast<long>(x_.size) * channels_;
    const float* window = in + y * row + static_cast<long>(x) * channels_;
    const float least = layer_param_.has_relu_param() ? 0 : -FLT_MAX;
    for (int c = 0; c < channels_; c += kLanes) {
      Vector best = Vector{} + least;
      Integers place = Integers{} + kNone;
      const int lanes = std::min(kLanes, channels_ - c);
      const auto look = [&](int i, int j, auto load) __attribute__((always_inline)) {
        const Vector v = load(window + i * row + j * channels_ + c);
        const Integers is_larger = v > best;
        best = is_larger ? v : best;
        place = is_larger ? Integers{} + (i * x_.kernel + j) : place;
      };
      if (is_usual && lanes == kLanes) {
#pragma GCC unroll 9
        for (int k = 0; k < 9; ++k) look(k / 3, k % 3, Load);
      } else {
        for (int i = top; i < bottom; ++i) {
          for (int j = left; j < right; ++j) look(i, j, [&](const float* p) { return LoadFirst(p, lanes); });
        }
      }
      StoreFirst(out + c, best, lanes);
      StoreFirst(reinterpret_cast<float*>(chosen + c), reinterpret_cast<Vector>(place), lanes);
    }
  }

  // The sum of the gradients of the windows in which the place y, x was chosen.
  void Gather(const float* gradient, const int* chosen, int n, int y, int x, float* to) const {
    const int top = y_.First(y), left = x_.First(x), rows = y_.Last(y) + 1 - top, columns = x_.Last(x) + 1 - left;
    const Windows windows = {((static_cast<long>(n) * y_.out_size + top) * x_.out_size + left) * channels_, rows, columns,
                             (y + y_.pad - top * y_.stride) * x_.kernel + x + x_.pad - left * x_.stride};
    if (rows == 1 && columns == 1) return Sum<1, 1>(gradient, chosen, windows, to);
    if (rows == 1 && columns == 2) return Sum<1, 2>(gradient, chosen, windows, to);
    if (rows == 2 && columns == 1) return Sum<2, 1>(gradient, chosen, windows, to);
    if (rows == 2 && columns == 2) return Sum<2, 2>(gradient, chosen, windows, to);
    if (rows == 3 && columns == 3) return Sum<3, 3>(gradient, chosen, windows, to);
    Sum<0, 0>(gradient, chosen, windows, to);
  }

  struct Windows {
    long first;  // where the gradient of the first one is
    int rows, columns;
    int own;  // the place in the first one
  };

  // For usual numbers of rows and columns, otherwise 0.
  template <int kRows, int kColumns>
  void Sum(const float* gradient, const int* chosen, const Windows& windows, float* to) const {
    using namespace channels_last;
    const bool adds = Adds();
    const int rows = kRows ? kRows : windows.rows, columns = kColumns ? kColumns : windows.columns;
    for (int c = 0; c < channels_; c += kLanes) {
      const int lanes = std::min(kLanes, channels_ - c);
      Vector sum = adds ? LoadFirst(to + c, lanes) : Vector{};
      const auto add = [&](const auto& load) __attribute__((always_inline)) {
#pragma GCC unroll 3
        for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 3
          for (int j = 0; j < columns; ++j) {
            const long place = windows.first + (static_cast<long>(i) * x_.out_size + j) * channels_ + c;
            const int own = windows.own - i * y_.stride * x_.kernel - j * x_.stride;
            const Vector choice = load(reinterpret_cast<const float*>(chosen + place));
            sum += reinterpret_cast<Integers>(choice) == own ? load(gradient + place) : Vector{};
          }
        }
      };
      if (lanes == kLanes) {
        add(Load);
      } else {
        add([&](const float* p) { return LoadFirst(p, lanes); });
      }
      StoreFirst(to + c, sum, lanes);
    }
  }

  Side y_, x_;
  int channels_;
  Blob<int> chosen_;
};

REGISTER_CHANNELS_LAST(ChannelsLastPooling);

}  // namespace caffe
