// Convolution with stride 1 in a fraction of the multiplications: minimal filtering F(M x M, R x R), as in Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks" (2016).
#ifndef CHANNELS_LAST_FILTERING_HPP_
#define CHANNELS_LAST_FILTERING_HPP_

#include "cores.hpp"
#include "picture.hpp"
#include "products.hpp"
#include "transforms.hpp"

namespace caffe {
namespace channels_last {

template <int M, int R>
class Filtering {
 public:
  bool is_packed() const { return packed_.data(); }

  // Takes kernels of R x R: weight(k, o, y, x) for input k and output o.
  template <class Weight>
  void Pack(int inputs, int outputs, const Weight& weight) {
    inputs_ = inputs, outputs_ = outputs;
    const size_t matrix = PackedSize(inputs, outputs);
    float* to = packed_.Need(kArea * matrix);
    ForEach(inputs, [&](int k) {
      for (int o = 0; o < outputs; ++o) {
        double half[N][R] = {};
        for (int i = 0; i < N; ++i) {
          for (int x = 0; x < R; ++x) {
            for (int y = 0; y < R; ++y) half[i][x] += kTransforms.G[i][y] * weight(k, o, y, x);
          }
        }
        for (int i = 0; i < kArea; ++i) {
          double sum = 0;
          for (int x = 0; x < R; ++x) sum += kTransforms.G[i % N][x] * half[i / N][x];
          to[i * matrix + PackedPlace(inputs, outputs, k, o)] = sum;
        }
      }
    });
  }

  // out(y, x) = the finished sum of kernel(i, j) in(y + i - offset, x + j - offset), where `in` is zero outside, and where
  // `mask`, of the same shape, is not positive. A NULL mask: nowhere.
  void Run(const Picture<const float>& in, const float* mask, int offset, const Epilogue& epilogue,
           const Picture<float>& out) const {
    const int columns = DivideUp(out.width, M), patches = DivideUp(out.height, M) * columns;
    const int input_step = WholeVectors(inputs_), panels = DivideUp(outputs_, kPanel);
    // So many blocks that each stays in a core's cache, and that there is work for many cores; but each uses weights for
    // several patches.
    const int most = kCached / (kArea * input_step) / kPixels * kPixels;
    const int least = DivideUp(patches, std::max(kPixels, std::min(most, 4 * kPixels)));
    const Ranges blocks(patches, std::max(least, std::min(DivideUp(patches, kPixels), DivideUp(kPieces, panels))));
    const int largest = DivideUp(patches, blocks.size());
    const long matrix = static_cast<long>(largest) * input_step + kLanes;  // not a power of two: those share a cache's places
    const auto transform = [&](int patch, int b, float* to) {
      TransformPatch(in, mask, patch / columns * M - offset, patch % columns * M - offset,
                     to + (patch - blocks[b].begin) * input_step, matrix);
    };
    if (blocks.size() >= kPieces) {  // none need wait for others
      ForEach(blocks.size(), [&](int b) {
        float* own = OwnScratch(kArea * (matrix + ProductsStep(largest, kPanel)));
        for (int patch = blocks[b].begin; patch < blocks[b].end; ++patch) transform(patch, b, own);
        for (int o = 0; o < outputs_; o += kPanel) {
          FinishBlock(own, matrix, blocks[b], columns, o, epilogue, out, own + kArea * matrix);
        }
      });
      return;
    }
    float* shared = SharedScratch(blocks.size() * kArea * matrix);
    const Ranges turns(patches, std::min(patches, std::max(kPieces, DivideUp(patches, kPixels))));
    ForEach(turns.size(), [&](int piece) {
      const int first = turns[piece].begin, end = turns[piece].end;
      for (int patch = first, b = blocks.Find(first); patch < end; ++patch) {
        if (patch == blocks[b].end) ++b;
        transform(patch, b, shared + b * kArea * matrix);
      }
    });
    ForEach(blocks.size() * panels, [&](int piece) {
      const int b = piece / panels;
      FinishBlock(shared + b * kArea * matrix, matrix, blocks[b], columns, piece % panels * kPanel, epilogue, out,
                  OwnScratch(kArea * ProductsStep(largest, kPanel)));
    });
  }

 private:
  static constexpr int N = Filter<M, R>::N, kArea = N * N;
  static constexpr Transforms<M, R> kTransforms{};
  static constexpr int kCached = 1 << 17;  // numbers that a core's cache holds with ease
  static constexpr int kPieces = 16;       // keep as many cores busy

  static long ProductsStep(int patches, int width) { return static_cast<long>(patches) * width + kLanes; }

  // Writes kArea rows of inputs_ numbers, `matrix` apart, for the patch of `in` that begins at y0, x0.
  void TransformPatch(const Picture<const float>& in, const float* mask, int y0, int x0, float* to, long matrix) const {
    const bool is_inside = y0 >= 0 && x0 >= 0 && y0 + N <= in.height && x0 + N <= in.width;
    const long row = in.width * in.step, behind = mask ? mask - in.data : 0;
    const float* first = in.data + y0 * row + x0 * in.step + in.channel;
    for (int k = 0; k < inputs_; k += kLanes) {
      const bool is_whole = in.channel + k + kLanes <= in.step;  // what is behind the channels does not matter
      if (is_inside && is_whole && mask) {
        Transform(first + k, row, in.step, [behind](const float* p) { return WherePositive(Load(p + behind), Load(p)); },
                  to + k, matrix);
      } else if (is_inside && is_whole) {
        Transform(first + k, row, in.step, Load, to + k, matrix);
      } else {
        float patch[kArea * kLanes] = {};
        const int lanes = std::min(kLanes, inputs_ - k);
        for (int y = std::max(0, -y0); y < std::min(N, in.height - y0); ++y) {
          for (int x = std::max(0, -x0); x < std::min(N, in.width - x0); ++x) {
            const float* p = first + y * row + x * in.step + k;
            const Vector v = LoadFirst(p, lanes);
            Store(patch + (y * N + x) * kLanes, mask ? WherePositive(LoadFirst(p + behind, lanes), v) : v);
          }
        }
        Transform(patch, N * kLanes, kLanes, Load, to + k, matrix);
      }
    }
  }

  // A patch of vectors at `first`, whose next row is `row` numbers further on and next column `step`, to vectors at `to`.
  template <class Read>
  static inline __attribute__((always_inline)) void Transform(const float* first, long row, long step, const Read& read,
                                                              float* to, long matrix) {
    Vector half[N][N];
#pragma GCC unroll 8
    for (int x = 0; x < N; ++x, first += step) {
      Vector column[N];
#pragma GCC unroll 8
      for (int y = 0; y < N; ++y) column[y] = read(first + y * row);
      kTransforms.In(column, 1, &half[0][x], N);
      asm("" : "+r"(first));  // else GCC prepares all addresses for the whole loop
    }
#pragma GCC unroll 8
    for (int y = 0; y < N; ++y, to += N * matrix) {
      Vector line[N];
      kTransforms.In(half[y], 1, line, 1);
#pragma GCC unroll 8
      for (int x = 0; x < N; ++x) Store(to + x * matrix, line[x]);
      asm("" : "+r"(to));
    }
  }

  // The outputs of the patches of `block` for a panel of channels; `products` is scratch.
  void FinishBlock(const float* transformed, long matrix, Range block, int columns, int channel, const Epilogue& epilogue,
                   const Picture<float>& out, float* products) const {
    const int width = std::min(kPanel, outputs_ - channel), input_step = WholeVectors(inputs_);
    const int product_step = WholeVectors(width);
    const long product_matrix = ProductsStep(block.size(), product_step);
    const size_t weights_matrix = PackedSize(inputs_, outputs_);
    const Ranges groups(Range{0, block.size()}, DivideUp(block.size(), kPixels));
    for (int i = 0; i < kArea; ++i) {
      const float* weights = packed_.data() + i * weights_matrix + static_cast<size_t>(inputs_) * channel;
      for (const Range group : groups) {
        const Segment segment = {transformed + i * matrix + group.begin * input_step, input_step, inputs_};
        Multiply(group.size(), product_step, &segment, 1, weights, {nullptr, false},
                 products + i * product_matrix + group.begin * product_step, product_step);
      }
    }
    for (int patch = block.begin; patch < block.end; ++patch) {
      for (int o = 0; o < width; o += kLanes) {
        const float* from = products + (patch - block.begin) * product_step + o;
        const int y = patch / columns * M, x = patch % columns * M;
        const Vector bias = epilogue.bias ? Load(epilogue.bias + channel + o) : Vector{};
        float* to = out.at(y, x) + channel + o;
        const long row = out.width * out.step;
        if (y + M <= out.height && x + M <= out.width && o + kLanes <= width) {
          TransformBack(from, product_matrix, bias, epilogue, to, row, out.step);
          continue;
        }
        float numbers[M * M * kLanes];
        TransformBack(from, product_matrix, bias, {nullptr, epilogue.relu}, numbers, M * kLanes, kLanes);
        for (int i = 0; i < std::min(M, out.height - y); ++i) {
          for (int j = 0; j < std::min(M, out.width - x); ++j) {
            const float* number = numbers + (i * M + j) * kLanes;
            float* place = to + i * row + j * out.step;
            for (int k = 0; k < std::min(kLanes, width - o); ++k) {
              place[k] = epilogue.continues ? place[k] + number[k] : number[k];
            }
          }
        }
      }
    }
  }

  // Vectors of products, `matrix` apart, to M x M outputs.
  static inline __attribute__((always_inline)) void TransformBack(const float* products, long matrix, Vector bias,
                                                                  const Epilogue& epilogue, float* to, long row, long step) {
    Vector half[M][N];
#pragma GCC unroll 8
    for (int x = 0; x < N; ++x, products += matrix) {
      Vector column[N];
#pragma GCC unroll 8
      for (int y = 0; y < N; ++y) column[y] = Load(products + y * (N * matrix));
      kTransforms.Out(column, 1, &half[0][x], N);
      asm("" : "+r"(products));
    }
#pragma GCC unroll 4
    for (int y = 0; y < M; ++y, to += row) {
      Vector line[M];
      kTransforms.Out(half[y], 1, line, 1);
#pragma GCC unroll 4
      for (int x = 0; x < M; ++x) {
        Vector sum = line[x] + bias;
        if (epilogue.continues) sum += Load(to + x * step);
        Store(to + x * step, epilogue.relu ? Relu(sum) : sum);
      }
      asm("" : "+r"(to));
    }
  }

  int inputs_ = 0, outputs_ = 0;
  Buffer packed_;  // kArea matrices
};

}  // namespace channels_last
}  // namespace caffe

#endif  // CHANNELS_LAST_FILTERING_HPP_
