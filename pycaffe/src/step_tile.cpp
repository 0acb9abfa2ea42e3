// The step of a tile in one pass, for cnn_vis.py: what its step_tile does, operation by operation and to the
// last bit, but for powers other than quarters. It is a library of its own, without Caffe, as the program's main
// process uses nothing else. Compiled without contraction into fused operations, which would round otherwise.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace {

struct PNorm {
  double weight, p, scale;
};

struct TotalVariation {
  double weight, beta, scale;
  int64_t up, down, size;  // of the operator: where it has 1 and -1, and its length; size 3 smooths across with 1 2 1
};

// x ** (Quarters / 4) for x >= 0: the same products in the same order as `power` in cnn_vis.py.
template <int Quarters>
double quarter_power(double x) {
  double product = 1;
  if constexpr (Quarters % 4 != 0) {
    const double root = std::sqrt(x);
    if constexpr (Quarters % 4 >= 2) product *= root;
    if constexpr (Quarters % 2 != 0) product *= std::sqrt(root);
  }
  for (int whole = Quarters / 4; whole; whole /= 2) {
    if (whole % 2) product *= x;
    x *= x;
  }
  return product;
}

template <class Use, int... Quarters>
bool with_quarters(double exponent, Use use, std::integer_sequence<int, Quarters...>) {
  return ((exponent * 4 == Quarters && (use([](double x) { return quarter_power<Quarters>(x); }), true)) || ...);
}

// use(f), where f(x) is x ** exponent: a function of its own for each exponent in use, which loops can be made of.
template <class Use>
void with_power(double exponent, Use use) {
  if (with_quarters(exponent, use, std::make_integer_sequence<int, 49>())) return;
  use([exponent](double x) { return std::pow(x, exponent); });
}

double sign(double x) { return x > 0 ? 1.0 : x < 0 ? -1.0 : x; }

// gradient += that of the p-norm of x - start.
void add_p_norm(const PNorm& norm, const double* pixels, const double* start, int64_t n, double* gradient, double* x) {
  for (int64_t i = 0; i < n; i++) x[i] = pixels[i] - start[i];
  if (norm.scale != 1) {
    for (int64_t i = 0; i < n; i++) x[i] /= norm.scale;
  }
  const double factor = norm.weight * norm.p / norm.scale;
  if (norm.p / 2 == std::floor(norm.p / 2)) {
    with_power((norm.p - 2) / 2, [=](auto power) {
      for (int64_t i = 0; i < n; i++) gradient[i] += power(x[i] * x[i]) * x[i] * factor;
    });
  } else {
    with_power(norm.p - 1, [=](auto power) {
      for (int64_t i = 0; i < n; i++) gradient[i] += power(std::fabs(x[i])) * sign(x[i]) * factor;
    });
  }
}

// The slopes of row y of x, and of as many rows below as the operator has, times what is common to both.
void slopes(const TotalVariation& tv, const double* x, int64_t row, int64_t width, double* dx, double* dy) {
  const int64_t n = width - tv.size + 1;
  if (tv.size == 2) {
    for (int64_t i = 0; i < n; i++) {
      dx[i] = x[i + tv.up] - x[i + tv.down];
      dy[i] = x[tv.up * row + i] - x[tv.down * row + i];
    }
  } else {
    const double *a = x + tv.up, *b = x + tv.down;
    for (int64_t i = 0; i < n; i++) {
      dx[i] = (a[row + i] - b[row + i]) * 2 + (a[i] - b[i]) + (a[2 * row + i] - b[2 * row + i]);
    }
    a = x + tv.up * row, b = x + tv.down * row;
    for (int64_t i = 0; i < n; i++) {
      dy[i] = (a[i + 1] - b[i + 1]) * 2 + (a[i] - b[i]) + (a[i + 2] - b[i + 2]);
    }
  }
  if (tv.scale != 1) {
    for (int64_t i = 0; i < n; i++) {
      dx[i] /= tv.scale;
      dy[i] /= tv.scale;
    }
  }
  const double common = tv.weight * tv.beta / tv.scale;
  with_power(tv.beta / 2 - 1, [=](auto power) {
    for (int64_t i = 0; i < n; i++) {
      const double squared = dx[i] * dx[i] + dy[i] * dy[i];
      const double factor = power(squared < 1e-3 ? 1e-3 : squared) * common;
      dx[i] *= factor;
      dy[i] *= factor;
    }
  });
}

void add_row(const double* x, int64_t n, double factor, double* out) {
  for (int64_t i = 0; i < n; i++) out[i] += factor * x[i];
}

// The gradient of total variation, row by row from the top.
class VariationRows {
 public:
  VariationRows(const TotalVariation& tv, int64_t height, int64_t width)
      : tv_(tv), rows_(height - tv.size + 1), w_(width), n_(width - tv.size + 1), memory_(8 * width) {
    double* place = memory_.data();
    for (auto** rows : {dx_, dy_}) {
      for (int i = 0; i < 3; i++, place += w_) rows[i] = place;
    }
    spread_ = place, sum_ = place + w_;
  }

  // Row y; `pixels` is the same row of x.
  const double* next(int64_t y, const double* pixels, int64_t row) {
    if (y < rows_) slopes(tv_, pixels, row, w_, dx_[y % 3], dy_[y % 3]);
    std::fill(sum_, sum_ + w_, 0.0);
    if (const double* across = smooth_across(y)) {
      add_row(across, n_, 1, sum_ + tv_.up);
      add_row(across, n_, -1, sum_ + tv_.down);
    }
    add_along(y - tv_.up, 1);
    add_along(y - tv_.down, -1);
    return sum_;
  }

 private:
  // What the slopes dx add to row y, before it is moved up and down.
  const double* smooth_across(int64_t y) {
    if (tv_.size == 2) return y < rows_ ? dx_[y % 3] : nullptr;
    std::fill(spread_, spread_ + n_, 0.0);
    for (int k = 0; k < 3; k++) {
      if (y - k >= 0 && y - k < rows_) add_row(dx_[(y - k) % 3], n_, k == 1 ? 2 : 1, spread_);
    }
    return spread_;
  }

  // Adds what row `from` of the slopes dy gives.
  void add_along(int64_t from, double sign) {
    if (from < 0 || from >= rows_) return;
    const double* along = dy_[from % 3];
    if (tv_.size == 2) return add_row(along, n_, sign, sum_);
    std::fill(spread_, spread_ + w_, 0.0);
    for (int k = 0; k < 3; k++) add_row(along, n_, k == 1 ? 2 : 1, spread_ + k);
    add_row(spread_, w_, sign, sum_);
  }

  const TotalVariation tv_;
  const int64_t rows_, w_, n_;  // of the slopes; w_ is the picture's
  std::vector<double> memory_;
  double *dx_[3], *dy_[3], *spread_, *sum_;
};

// The sum of |x|, and not a number, or infinite, if an x is.
double sum_of_sizes(const double* x, int64_t n) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; k++) sums[k] += std::fabs(x[i + k]);
  }
  for (; i < n; i++) sums[i % 8] += std::fabs(x[i]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// What an image's channel has more than the start picture, less its mean.
void subtract(const double* image, const uint8_t* start, double mean, int64_t h, int64_t w, int64_t row,
              std::vector<double>* change) {
  change->resize(h * w);
  for (int64_t y = 0; y < h; y++) {
    for (int64_t i = 0; i < w; i++) (*change)[y * w + i] = image[y * row + i] - (start[y * row + i] - mean);
  }
}

}  // namespace

// x, start (or null) and counts (or null, one channel) are parts of pictures, `row` and `plane` pixels from one row and one
// channel to the next; descent and cache (or null, without RMSProp) are (3, height, width) without gaps. `numbers` are
// weight, p and scale of two p-norms, of x's change and of x; weight, beta and scale of total variation; decay, learning
// rate and mean: the change is x - (start - mean). `places` tell the operator of total variation, and whether it is that of
// the change. A term without weight is left out. Returns the mean size of the step; or -1 if it overflows: the channel in
// which it does, and those after it, are left as they were.
extern "C" double cnn_vis_step_tile_4(int64_t h, int64_t w, int64_t row, int64_t plane, double* images,
                                      const uint8_t* starts, const float* descents, double* caches, const double* counts,
                                      const double* numbers, const int64_t* places) {
  const PNorm p{numbers[0], numbers[1], numbers[2]}, aux{numbers[3], numbers[4], numbers[5]};
  const TotalVariation variation{numbers[6], numbers[7], numbers[8], places[0], places[1], places[2]};
  const double decay = numbers[9], rest = 1 - decay, rate = -numbers[10], mean = numbers[11];
  VariationRows variation_rows(variation, h, w);
  // The step of a channel and its change from the start, kept by the thread: they stay in the core's own cache.
  static thread_local std::vector<double> step, change;
  step.resize(h * w);
  std::vector<double> scratch(w), zeros(w), begun(w);  // begun stays 0 without a start
  double total = 0;
  for (int channel = 0; channel < 3; channel++) {
    double* image = images + channel * plane;
    double* cache = caches ? caches + channel * h * w : nullptr;
    const uint8_t* start = starts ? starts + channel * plane : nullptr;
    const float* descent = descents + channel * h * w;
    const bool is_of_change = start && places[3];
    if (is_of_change && variation.weight) subtract(image, start, mean, h, w, row, &change);
    double cached = 0;
    for (int64_t y = 0; y < h; y++) {
      double* g = step.data() + y * w;
      const double* pixels = image + y * row;
      for (int64_t i = 0; i < w; i++) g[i] = descent[y * w + i];
      for (int64_t i = 0; start && i < w; i++) begun[i] = start[y * row + i] - mean;
      if (p.weight) add_p_norm(p, pixels, begun.data(), w, g, scratch.data());
      if (aux.weight) add_p_norm(aux, pixels, zeros.data(), w, g, scratch.data());
      if (variation.weight) {
        const double* tv = is_of_change ? variation_rows.next(y, change.data() + y * w, w)
                                        : variation_rows.next(y, pixels, row);
        for (int64_t i = 0; i < w; i++) g[i] += tv[i];
      }
      if (cache) {
        double* c = cache + y * w;
        for (int64_t i = 0; i < w; i++) {
          const double square = g[i] * g[i] * rest;
          c[i] = c[i] * decay + square;
          g[i] = g[i] / std::sqrt(c[i] + 1e-8) * rate;
        }
        cached += sum_of_sizes(c, w);
      } else {
        for (int64_t i = 0; i < w; i++) g[i] *= rate;
      }
      if (counts) {
        for (int64_t i = 0; i < w; i++) g[i] /= counts[y * row + i];
      }
      total += sum_of_sizes(g, w);
    }
    if (!std::isfinite(total + cached)) return -1;
    for (int64_t y = 0; y < h; y++) {
      for (int64_t i = 0; i < w; i++) image[y * row + i] += step[y * w + i];
    }
  }
  return total / (3 * h * w);
}
