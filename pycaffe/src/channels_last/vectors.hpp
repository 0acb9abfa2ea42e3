// Vectors of floats as wide as the processor's, by GCC's vector extensions, and memory for them.
#ifndef CHANNELS_LAST_VECTORS_HPP_
#define CHANNELS_LAST_VECTORS_HPP_

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace caffe {
namespace channels_last {

// kLanes: numbers in a vector. A block of products is kPixels x kVectors vectors of sums, which must all fit in registers
// with kVectors weights and a pixel's number (32 registers; 16 with AVX2 and SSE). -DCHANNELS_LAST_AVX2: as if there were no
// AVX-512, to compare.
#if defined(CHANNELS_LAST_AVX2) || (defined(__AVX__) && !defined(__AVX512F__))
constexpr int kLanes = 8, kPixels = 6, kVectors = 2;
#elif defined(__AVX512F__)
constexpr int kLanes = 16, kPixels = 14, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kPixels = 6, kVectors = 4;
#else
constexpr int kLanes = 4, kPixels = 6, kVectors = 2;
#endif
constexpr int kPanel = kLanes * kVectors;  // channels of a block of products

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector Load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void Store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
inline Vector Relu(Vector v) { return Vector{} > v ? Vector{} : v; }  // leaves NaN
inline Vector WherePositive(Vector condition, Vector v) { return condition > 0 ? v : Vector{}; }

// The first n numbers, and zeros.
inline Vector LoadFirst(const float* p, int n) {
  if (n >= kLanes) return Load(p);
  float numbers[kLanes] = {};
  std::copy(p, p + n, numbers);
  return Load(numbers);
}

inline void StoreFirst(float* p, Vector v, int n) {
  if (n >= kLanes) return Store(p, v);
  float numbers[kLanes];
  Store(numbers, v);
  std::copy(numbers, numbers + n, p);
}

// Numbers of two vectors in turn, from number `first` of each on.
template <int first, int... i>
inline Vector Alternate(Vector a, Vector b, std::integer_sequence<int, i...>) {
  return __builtin_shuffle(a, b, Integers{(first + i / 2 + i % 2 * kLanes)...});
}

// Makes rows columns, as one shuffles cards: in each turn the rows of the first half alternate with those of the second.
inline __attribute__((always_inline)) void Transpose(Vector (&rows)[kLanes]) {
  const std::make_integer_sequence<int, kLanes> lanes;
#pragma GCC unroll 4
  for (int turn = 1; turn < kLanes; turn *= 2) {
    Vector next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = Alternate<0>(rows[i], rows[i + kLanes / 2], lanes);
      next[2 * i + 1] = Alternate<kLanes / 2>(rows[i], rows[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

inline int DivideUp(int a, int b) { return (a + b - 1) / b; }
inline int WholeVectors(int channels) { return DivideUp(channels, kLanes) * kLanes; }

// Memory that only grows, and is zeros when it has grown; in huge pages if it is large.
class Buffer {
 public:
  Buffer() {}
  Buffer(const Buffer&) = delete;
  void operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  float* data() const { return data_; }
  float* Need(size_t count) {
    const size_t bytes = (count + kLanes) * sizeof(float);  // a vector may begin at the last number
    if (bytes > bytes_) {
      const size_t page = bytes >= kHugePage / 2 ? kHugePage : 4096;
      const size_t whole = (bytes + page - 1) / page * page;
      free(data_);
      bytes_ = 0;
      data_ = static_cast<float*>(aligned_alloc(page, whole));
      if (!data_) throw std::bad_alloc();
      if (page == kHugePage) madvise(data_, whole, MADV_HUGEPAGE);
      memset(data_, 0, whole);
      bytes_ = whole;
    }
    return data_;
  }

 private:
  static constexpr size_t kHugePage = 2 << 20;
  float* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace channels_last
}  // namespace caffe

#endif  // CHANNELS_LAST_VECTORS_HPP_
