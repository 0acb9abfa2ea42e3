// A picture on a GPU, for cnn_vis.py: its tiles are cut into the network's input, and their steps are taken, where it is. The
// numbers are those of step_tile.cpp to the last bit, but for powers other than quarters; so this, too, is compiled without
// fused operations. Everything is given to the thread's own stream (--default-stream in cuda.cmake), and nothing here waits.
#include <cmath>
#include <cstdint>

#include "caffe/common.hpp"

namespace cnn_vis {  // nvcc would hide functions that take what is in a namespace without a name

struct Numbers {  // `numbers` and `places` of cnn_vis_step_tile_4; they may change from step to step
  double p_weight, p, p_scale, aux_weight, aux, aux_scale, tv_weight, beta, tv_scale, decay, rate, mean;
  int64_t up, down, size, of_change;
};

struct Place {  // of a tile
  int32_t y, x;
};

struct Canvas {  // as in cnn_vis_lib/gpu_picture.py
  double* image;           // (3, height, width)
  const uint8_t* start;    // (3, height, width), or null
  double* caches;          // (all tiles, 3, h, w), or null without RMSProp
  const double* divisors;  // (height, width), or null
  const Place* places;     // of all tiles
  const Numbers* numbers;
  float* cuts;                     // (tiles of a turn, 3, h, w), as they were before it
  double *slopes_x, *slopes_y, *steps;  // (tiles stepped at once, 3, h, w)
  double* sums;            // (tiles of a part, w), or null with RMSProp, as the next two
  double* sizes;           // the mean size of the gradient in the step before, its sum in this one, and of how many tiles
  float* factors;          // (tiles of a part,), of gradients
  int32_t* flags;          // whether the step has met what is not finite; a gradient; a step that is not 0
  int64_t height, width, h, w, tiles;
  double strength;
  float scale;  // of pixels in the network's input, and of gradients
};

}  // namespace cnn_vis

namespace {

using namespace cnn_vis;

enum { kNotFinite, kGradient, kStep, kFlags };  // all threads that set one write the same 1

// The value i of tiles (N, 3, h, w): its tile, and its place in the tile and in the picture.
struct Value {
  int x, y, tile;
  int64_t in_tile, pixel, in_picture;

  __device__ Value(const Canvas& c, int first, int i) {
    const int w = c.w, h = c.h, plane = w * h;
    x = i % w, y = i / w % h, tile = i / (3 * plane), in_tile = i % (3 * plane);
    const Place place = c.places[first + tile];
    pixel = (place.y + y) * c.width + place.x + x;
    in_picture = in_tile / plane * c.height * c.width + pixel;
  }
};

// x ** exponent for x >= 0, as in step_tile.cpp.
__device__ double power(double x, double exponent) {
  const double quarters = exponent * 4;
  if (quarters < 0 || quarters > 48 || quarters != floor(quarters)) return pow(x, exponent);
  double product = 1;
  const int number = static_cast<int>(quarters);
  if (number % 4) {
    const double root = sqrt(x);
    if (number % 4 >= 2) product *= root;
    if (number % 2) product *= sqrt(root);
  }
  for (int whole = number / 4; whole; whole /= 2) {
    if (whole % 2) product *= x;
    x *= x;
  }
  return product;
}

__device__ double p_norm_gradient(double x, double weight, double p, double scale) {
  if (scale != 1) x /= scale;
  const double factor = weight * p / scale;
  if (p / 2 == floor(p / 2)) return power(x * x, (p - 2) / 2) * x * factor;
  return power(fabs(x), p - 1) * (x > 0 ? 1.0 : x < 0 ? -1.0 : x) * factor;
}

// What the picture has more than the start picture; all that it has, if there is none.
__device__ double change(const Canvas& c, int64_t at, double mean) {
  return c.start ? c.image[at] - (c.start[at] - mean) : c.image[at];
}

__device__ float gradient(const Canvas& c, const float* descent, int i) {
  return c.scale == 1 ? descent[i] : descent[i] * c.scale;
}

__global__ void cut(int n, Canvas c, int first, float* cuts) {
  CUDA_KERNEL_LOOP(i, n) cuts[i] = c.image[Value(c, first, i).in_picture];
}

__global__ void feed(int n, const float* cuts, float scale, float* input) {
  CUDA_KERNEL_LOOP(i, n) input[i] = scale == 1 ? cuts[i] : cuts[i] * scale;
}

// The slopes times what is common to both, where the operator fits; 0 elsewhere.
__global__ void slopes(int n, Canvas c, int first) {
  const Numbers& numbers = *c.numbers;
  if (!numbers.tv_weight) return;
  const double common = numbers.tv_weight * numbers.beta / numbers.tv_scale;
  CUDA_KERNEL_LOOP(i, n) {
    const Value value(c, first, i);
    double dx = 0, dy = 0;
    if (value.x <= c.w - numbers.size && value.y <= c.h - numbers.size) {
      // The difference of what is `up` and `down` along one axis, `across` steps along the other.
      const auto difference = [&](int64_t along, int64_t across) {
        const int64_t up = value.in_picture + across + numbers.up * along, down = value.in_picture + across + numbers.down * along;
        if (!numbers.of_change) return c.image[up] - c.image[down];
        return change(c, up, numbers.mean) - change(c, down, numbers.mean);
      };
      dx = difference(1, 0), dy = difference(c.width, 0);
      if (numbers.size == 3) {
        dx = difference(1, c.width) * 2 + dx + difference(1, 2 * c.width);
        dy = difference(c.width, 1) * 2 + dy + difference(c.width, 2);
      }
      if (numbers.tv_scale != 1) dx /= numbers.tv_scale, dy /= numbers.tv_scale;
      const double squared = dx * dx + dy * dy;
      const double factor = power(squared < 1e-3 ? 1e-3 : squared, numbers.beta / 2 - 1) * common;
      dx *= factor, dy *= factor;
    }
    c.slopes_x[i] = dx, c.slopes_y[i] = dy;
  }
}

// What the slope at `number` along one axis adds to a value: the slopes there, smoothed across. `at` is the value's place along
// the other axis; one step is `along` or `across` in memory, and slopes are n x n_across.
__device__ double smoothed(const double* slope, int number, int n, int along, int at, int n_across, int across, int size) {
  if (number < 0 || number >= n) return 0;
  if (size == 2) return at < n_across ? slope[number * along + at * across] : 0;
  double sum = 0;
  for (int k = 0; k < 3; ++k) {
    if (at - k >= 0 && at - k < n_across) sum += (k == 1 ? 2 : 1) * slope[number * along + (at - k) * across];
  }
  return sum;
}

// The gradient of total variation at (y, x) of a plane: the transpose of the slopes.
__device__ double variation_gradient(const Canvas& c, const Numbers& numbers, int64_t plane, int y, int x) {
  const int w = c.w, size = numbers.size, rows = c.h - size + 1, columns = w - size + 1;
  const double *dx = c.slopes_x + plane, *dy = c.slopes_y + plane;
  double sum = 0;
  sum += smoothed(dx, x - numbers.up, columns, 1, y, rows, w, size);
  sum -= smoothed(dx, x - numbers.down, columns, 1, y, rows, w, size);
  sum += smoothed(dy, y - numbers.up, rows, w, x, columns, 1, size);
  sum -= smoothed(dy, y - numbers.down, rows, w, x, columns, 1, size);
  return sum;
}

// Steps of tiles that do not overlap; `descent` and `factors` are theirs.
__global__ void step(int n, Canvas c, int first, const float* descent, const float* factors) {
  const Numbers& numbers = *c.numbers;
  const int64_t plane = c.w * c.h;
  CUDA_KERNEL_LOOP(i, n) {
    const Value value(c, first, i);
    const double pixel = c.image[value.in_picture];
    float from_network = gradient(c, descent, i);
    if (from_network != 0) c.flags[kGradient] = 1;
    if (factors) from_network *= factors[value.tile];
    double g = from_network;
    if (numbers.p_weight) {
      g += p_norm_gradient(change(c, value.in_picture, numbers.mean), numbers.p_weight, numbers.p, numbers.p_scale);
    }
    if (numbers.aux_weight) g += p_norm_gradient(pixel, numbers.aux_weight, numbers.aux, numbers.aux_scale);
    if (numbers.tv_weight) g += variation_gradient(c, numbers, i / plane * plane, value.y, value.x);
    double cached = 0;
    if (c.caches) {
      double& cache = c.caches[(first + value.tile) * 3 * plane + value.in_tile];
      const double square = g * g * (1 - numbers.decay);
      cache = cached = cache * numbers.decay + square;
      g = g / sqrt(cached + 1e-8) * -numbers.rate;
    } else {
      g *= -numbers.rate;
    }
    if (c.divisors) g /= c.divisors[value.pixel];
    if (!(fabs(g) + cached < INFINITY)) c.flags[kNotFinite] = 1;
    if (g != 0) c.flags[kStep] = 1;
    c.steps[i] = g;
  }
}

// Once something is not finite, the picture stays as it is.
__global__ void apply(int n, Canvas c, int first) {
  if (c.flags[kNotFinite]) return;
  CUDA_KERNEL_LOOP(i, n) c.image[Value(c, first, i).in_picture] += c.steps[i];
}

// Sums of the gradient's sizes over the columns of tiles.
__global__ void sum_columns(int n, Canvas c, const float* descent) {
  const int w = c.w, column = 3 * c.h;
  CUDA_KERNEL_LOOP(i, n) {
    double sum = 0;
    for (int y = 0; y < column; ++y) sum += fabs(static_cast<double>(gradient(c, descent, (i / w * column + y) * w + i % w)));
    c.sums[i] = sum;
  }
}

// The mean size of each tile's gradient, which takes the place of its first column's sum.
__global__ void mean_sizes(int n, Canvas c) {
  CUDA_KERNEL_LOOP(i, n) {
    double sum = 0;
    for (int x = 0; x < c.w; ++x) sum += c.sums[i * c.w + x];
    c.sums[i * c.w] = sum / (3 * c.h * c.w);
  }
}

// By one thread: the factors of the gradients, with the mean size in the step before or, in the first one, so far.
__global__ void find_factors(int n, Canvas c) {
  for (int i = 0; i < n; ++i) {
    c.sizes[1] += c.sums[i * c.w];
    c.sizes[2] += 1;
    const double size = c.sizes[0] ? c.sizes[0] : c.sizes[1] / c.sizes[2];
    c.factors[i] = c.strength / (size ? size : 1);
  }
}

// By one thread: tells the flags, and prepares for the next step.
__global__ void end_step(Canvas c, int32_t* told) {
  for (int i = 0; i < kFlags; ++i) told[i] = c.flags[i], c.flags[i] = 0;
  if (!c.sizes) return;
  c.sizes[0] = c.sizes[1] / c.tiles;
  c.sizes[1] = c.sizes[2] = 0;
}

int values(const Canvas* c, int count) { return count * 3 * c->h * c->w; }

}  // namespace

#define CNN_VIS_LAUNCH(kernel, n, ...)                                            \
  kernel<<<caffe::CAFFE_GET_BLOCKS(n), caffe::CAFFE_CUDA_NUM_THREADS>>>((n), __VA_ARGS__); \
  CUDA_POST_KERNEL_CHECK

extern "C" {

// Keeps `count` tiles from the tile `first` on as they are, from the place `at` on.
void cnn_vis_cut(const Canvas* c, int first, int count, int at) {
  CNN_VIS_LAUNCH(cut, values(c, count), *c, first, c->cuts + values(c, 1) * static_cast<int64_t>(at));
}

// Writes kept tiles to the network's input.
void cnn_vis_feed(const Canvas* c, int at, int count, float* input) {
  CNN_VIS_LAUNCH(feed, values(c, count), c->cuts + values(c, 1) * static_cast<int64_t>(at), c->scale, input);
}

// Finds the factors of the gradients `descent` of the tiles of a part, unless the step is by RMSProp.
void cnn_vis_measure(const Canvas* c, int count, const float* descent) {
  if (!c->sizes) return;
  CNN_VIS_LAUNCH(sum_columns, static_cast<int>(count * c->w), *c, descent);
  CNN_VIS_LAUNCH(mean_sizes, count, *c);
  find_factors<<<1, 1>>>(count, *c);
  CUDA_POST_KERNEL_CHECK;
}

// Takes the steps of `count` tiles that do not overlap, from the tile `first` on, which is the number `in_part` of its part,
// whose gradients are `descent`.
void cnn_vis_step(const Canvas* c, int first, int count, int in_part, const float* descent) {
  const int n = values(c, count);
  CNN_VIS_LAUNCH(slopes, n, *c, first);
  CNN_VIS_LAUNCH(step, n, *c, first, descent + values(c, in_part), c->factors ? c->factors + in_part : nullptr);
  CNN_VIS_LAUNCH(apply, n, *c, first);
}

// Writes the flags to `told`, in pinned memory, and clears them.
void cnn_vis_end_step(const Canvas* c, int32_t* told) {
  end_step<<<1, 1>>>(*c, told);
  CUDA_POST_KERNEL_CHECK;
}

}
