// The step of a tile in one pass, for cnn_vis.py: what its step_tile does, operation by operation and to the
// last bit, but for powers other than quarters. It is a library of its own, without Caffe, as the program's main
// process uses nothing else. Compiled without contraction into fused operations, which would round otherwise.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

struct PNorm {
  double weight, p, scale;
};

struct TotalVariation {
  double weight, beta, scale;
  int64_t up, down, size;  // of the operator: where it has 1 and -1, and its length; size 3 smooths across with 1 2 1
};

void sqrt_row(const double* x, int64_t n, double* out) {
  for (int64_t i = 0; i < n; i++) out[i] = std::sqrt(x[i]);
}

void multiply_row(const double* x, int64_t n, double* out) {
  for (int64_t i = 0; i < n; i++) out[i] *= x[i];
}

// out = x ** exponent; changes x. The same products in the same order as `power`.
void power_row(double* x, int64_t n, double exponent, double* out, double* scratch) {
  const double quarters = exponent * 4;
  if (!(quarters == std::floor(quarters) && quarters >= 0 && quarters <= 48)) {
    for (int64_t i = 0; i < n; i++) out[i] = std::pow(x[i], exponent);
    return;
  }
  int whole = static_cast<int>(quarters) / 4, rest = static_cast<int>(quarters) % 4;
  bool is_first = true;
  auto factor = [&](const double* f) {
    if (is_first) {
      for (int64_t i = 0; i < n; i++) out[i] = f[i];
    } else {
      multiply_row(f, n, out);
    }
    is_first = false;
  };
  if (rest) {
    sqrt_row(x, n, scratch);
    if (rest >= 2) factor(scratch);
    if (rest % 2) {
      sqrt_row(scratch, n, scratch);
      factor(scratch);
    }
  }
  for (; whole; whole /= 2) {
    if (whole % 2) factor(x);
    if (whole > 1) multiply_row(x, n, x);
  }
  if (is_first) {
    for (int64_t i = 0; i < n; i++) out[i] = 1;
  }
}

// gradient += that of the p-norm of x; changes x.
void add_p_norm(const PNorm& norm, double* x, int64_t n, double* gradient, double* out, double* scratch, double* sign) {
  if (norm.scale != 1) {
    for (int64_t i = 0; i < n; i++) x[i] /= norm.scale;
  }
  if (norm.p == 2) {
    const double factor = norm.weight * 2 / norm.scale;
    for (int64_t i = 0; i < n; i++) gradient[i] += x[i] * factor;
    return;
  }
  const bool is_even = std::fmod(norm.p, 2) == 0;
  for (int64_t i = 0; i < n; i++) {
    sign[i] = is_even ? x[i] : x[i] > 0 ? 1.0 : x[i] < 0 ? -1.0 : x[i];
    x[i] = is_even ? x[i] * x[i] : std::fabs(x[i]);
  }
  power_row(x, n, is_even ? (norm.p - 2) / 2 : norm.p - 1, out, scratch);
  const double factor = norm.weight * norm.p / norm.scale;
  for (int64_t i = 0; i < n; i++) gradient[i] += out[i] * sign[i] * factor;
}

// The slopes of row y of x, and of as many rows below as the operator has, times what is common to both.
void slopes(const TotalVariation& tv, const double* x, int64_t row, int64_t width, double* dx, double* dy, double* squared,
            double* scratch) {
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
  for (int64_t i = 0; i < n; i++) {
    const double s = dx[i] * dx[i] + dy[i] * dy[i];
    squared[i] = s < 1e-3 ? 1e-3 : s;
  }
  double* factor = scratch + width;
  power_row(squared, n, tv.beta / 2 - 1, factor, scratch);
  const double common = tv.weight * tv.beta / tv.scale;
  for (int64_t i = 0; i < n; i++) {
    const double f = factor[i] * common;
    dx[i] *= f;
    dy[i] *= f;
  }
}

void add_row(const double* x, int64_t n, double factor, double* out) {
  for (int64_t i = 0; i < n; i++) out[i] += factor * x[i];
}

// The gradient of total variation, row by row from the top.
class VariationRows {
 public:
  VariationRows(const TotalVariation& tv, int64_t height, int64_t width)
      : tv_(tv), rows_(height - tv.size + 1), w_(width), n_(width - tv.size + 1), memory_(11 * width) {
    double* place = memory_.data();
    for (auto** rows : {dx_, dy_}) {
      for (int i = 0; i < 3; i++, place += w_) rows[i] = place;
    }
    spread_ = place, squared_ = place + w_, sum_ = place + 2 * w_, scratch_ = place + 3 * w_;
  }

  // Row y; `pixels` is the same row of x.
  const double* next(int64_t y, const double* pixels, int64_t row) {
    if (y < rows_) slopes(tv_, pixels, row, w_, dx_[y % 3], dy_[y % 3], squared_, scratch_);
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
  double *dx_[3], *dy_[3], *spread_, *squared_, *sum_, *scratch_;
};

}  // namespace

// x, start (or null) and counts (or null, one channel) are parts of pictures, `row` and `plane` doubles from one row and
// one channel to the next; descent, cache and step are (3, height, width) without gaps. `numbers` are weight, p and
// scale of two p-norms, of x - start and of x; weight, beta and scale of total variation; decay and learning rate.
// `places` tell its operator. A term without weight is left out. Returns 0 if the step overflows: the channel in which
// it does, and those after it, are left as they were.
extern "C" int cnn_vis_step_tile(int64_t h, int64_t w, int64_t row, int64_t plane, double* images, const double* starts,
                                 const float* descents, double* caches, const double* counts, double* steps,
                                 const double* numbers, const int64_t* places) {
  const PNorm p{numbers[0], numbers[1], numbers[2]}, aux{numbers[3], numbers[4], numbers[5]};
  const TotalVariation variation{numbers[6], numbers[7], numbers[8], places[0], places[1], places[2]};
  const double decay = numbers[9], rest = 1 - decay, rate = -numbers[10];
  VariationRows variation_rows(variation, h, w);
  std::vector<double> memory(4 * w);
  double *x = memory.data(), *out = x + w, *scratch = out + w, *sign = scratch + w;
  for (int channel = 0; channel < 3; channel++) {
    double* image = images + channel * plane;
    double* step = steps + channel * h * w;
    double* cache = caches + channel * h * w;
    const double* start = starts ? starts + channel * plane : nullptr;
    const float* descent = descents + channel * h * w;
    bool is_finite = true;
    for (int64_t y = 0; y < h; y++) {
      double *g = step + y * w, *c = cache + y * w;
      const double* pixels = image + y * row;
      for (int64_t i = 0; i < w; i++) g[i] = descent[y * w + i];
      if (p.weight) {
        for (int64_t i = 0; i < w; i++) x[i] = start ? pixels[i] - start[y * row + i] : pixels[i];
        add_p_norm(p, x, w, g, out, scratch, sign);
      }
      if (aux.weight) {
        for (int64_t i = 0; i < w; i++) x[i] = pixels[i];
        add_p_norm(aux, x, w, g, out, scratch, sign);
      }
      if (variation.weight) {
        const double* tv = variation_rows.next(y, pixels, row);
        for (int64_t i = 0; i < w; i++) g[i] += tv[i];
      }
      int odd = 0;
      for (int64_t i = 0; i < w; i++) {
        const double square = g[i] * g[i] * rest;
        c[i] = c[i] * decay + square;
        g[i] = g[i] / std::sqrt(c[i] + 1e-8) * rate;
        odd |= !(g[i] - g[i] == 0) | !(c[i] - c[i] == 0);
      }
      is_finite = is_finite && !odd;
      if (counts) {
        for (int64_t i = 0; i < w; i++) g[i] /= counts[y * row + i];
      }
    }
    if (!is_finite) return 0;
    for (int64_t y = 0; y < h; y++) {
      for (int64_t i = 0; i < w; i++) image[y * row + i] += step[y * w + i];
    }
  }
  return 1;
}
