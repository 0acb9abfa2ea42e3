// The transforms of minimal filtering F(M x M, R x R), for vectors.
#ifndef CHANNELS_LAST_TRANSFORMS_HPP_
#define CHANNELS_LAST_TRANSFORMS_HPP_

#include "vectors.hpp"

namespace caffe {
namespace channels_last {

// M outputs from N = M + R - 1 inputs d and R weights g are AT [(G g) * (BT d)]: the coefficients of a product of polynomials,
// found from its values at N - 1 points and the leading coefficient (Toom and Cook). These points are exact in binary; of
// points 0, +-a, +-b they are nearly those with the least rounding errors, half of those of 0, +-1, +-2.
template <int M, int R>
struct Filter {
  static constexpr int N = M + R - 1, kArea = N * N;
  static_assert(N == 4 || N == 6, "points are known for these");
  float AT[M][N] = {}, BT[N][N] = {};
  double G[N][R] = {};

  constexpr Filter() {
    constexpr double kPoints[2][5] = {{0, 1, -1}, {0, .625, -.625, 1.5, -1.5}};
    const auto& points = kPoints[N == 6];
    for (int i = 0; i < N; ++i) {  // row N - 1: the leading coefficient
      double others[N] = {1}, divisor = 1, power = 1;  // others: the product of x - points[j], but not of j = i
      for (int j = 0, degree = 0; j < N - 1; ++j) {
        if (j == i) continue;
        for (int k = ++degree; k >= 0; --k) others[k] = (k ? others[k - 1] : 0) - points[j] * others[k];
        if (i < N - 1) divisor *= points[i] - points[j];
      }
      for (int k = 0; k < N; ++k) {
        BT[i][k] = others[k];
        if (k < M) AT[k][i] = i < N - 1 ? power : k == M - 1;
        if (k < R) G[i][k] = i < N - 1 ? power / divisor : k == R - 1;
        if (i < N - 1) power *= points[i];
      }
    }
  }
};

// A sum of vectors that are `step` apart. The factors are constants once this is inlined, so zeros cost nothing.
template <int n>
inline __attribute__((always_inline)) Vector Combine(const float (&factors)[n], const Vector* x, int step) {
  Vector sum{};
  bool is_begun = false;
#pragma GCC unroll 8
  for (int j = n - 1; j >= 0; --j) {
    if (factors[j] == 0) continue;
    sum = is_begun ? sum + factors[j] * x[j * step] : factors[j] * x[j * step];
    is_begun = true;
  }
  return sum;
}

// BT and AT with what the rows of BT, or the columns of AT, have in common for the points p and -p, which are i and i + 1:
// in one of them the odd powers have the opposite sign.
template <int M, int R>
struct Transforms : Filter<M, R> {
  using Filter<M, R>::N;
  float even[N][N] = {}, odd[N][N] = {}, factor[N] = {};  // BT[i] = even + factor odd, BT[i + 1] = even - factor odd
  float sums[M][N] = {};  // AT for z with z[i] = m[i] + m[i + 1], z[i + 1] = m[i] - m[i + 1]

  constexpr Transforms() {
    for (int i = 1; i + 1 < N - 1; i += 2) {
      for (int j = 0; j < N; ++j) {
        even[i][j] = (this->BT[i][j] + this->BT[i + 1][j]) / 2;
        odd[i][j] = (this->BT[i][j] - this->BT[i + 1][j]) / 2;
        if (odd[i][j] != 0) factor[i] = odd[i][j];
      }
      for (int j = 0; j < N; ++j) odd[i][j] /= factor[i];
    }
    for (int k = 0; k < M; ++k) {
      for (int i = 0; i < N; ++i) sums[k][i] = this->AT[k][i];
      for (int i = 1; i + 1 < N - 1; i += 2) sums[k][k % 2 ? i : i + 1] = 0, sums[k][i + k % 2] = this->AT[k][i];
    }
  }

  // N numbers d to N products' factors.
  inline __attribute__((always_inline)) void In(const Vector* d, int step, Vector* to, int to_step) const {
    to[0] = Combine(this->BT[0], d, step);
#pragma GCC unroll 4
    for (int i = 1; i + 1 < N - 1; i += 2) {
      const Vector one = Combine(even[i], d, step), other = factor[i] * Combine(odd[i], d, step);
      to[i * to_step] = one + other;
      to[(i + 1) * to_step] = one - other;
    }
    to[(N - 1) * to_step] = Combine(this->BT[N - 1], d, step);
  }

  // N products m to M outputs.
  inline __attribute__((always_inline)) void Out(const Vector* m, int step, Vector* to, int to_step) const {
    Vector z[N];
    z[0] = m[0], z[N - 1] = m[(N - 1) * step];
#pragma GCC unroll 4
    for (int i = 1; i + 1 < N - 1; i += 2) z[i] = m[i * step] + m[(i + 1) * step], z[i + 1] = m[i * step] - m[(i + 1) * step];
#pragma GCC unroll 4
    for (int k = 0; k < M; ++k) to[k * to_step] = Combine(sums[k], z, 1);
  }
};

}  // namespace channels_last
}  // namespace caffe

#endif  // CHANNELS_LAST_TRANSFORMS_HPP_
