#include "products.hpp"

#include <utility>

namespace caffe {
namespace channels_last {
namespace {

// All sums stay in registers. Three pixels share a pointer, as an instruction can address p, p + step and p + 2 step.
template <int pixels, int vectors>
__attribute__((noinline)) void Block(const Segment* segments, int count, const float* weights, const Epilogue& epilogue,
                                     float* out, long out_step, int last_lanes) {
  constexpr int kPointers = (pixels + 2) / 3;
  Vector sum[pixels][vectors];
#pragma GCC unroll 16
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[p][v] = Vector{};
  }
  for (const Segment* segment = segments; segment < segments + count; ++segment) {
    const long step = segment->step * sizeof(float);
    const char* x[kPointers];
#pragma GCC unroll 8
    for (int q = 0; q < kPointers; ++q) x[q] = reinterpret_cast<const char*>(segment->first) + 3 * q * step;
#pragma GCC unroll 1
    for (int k = 0; k < segment->length; ++k) {
      Vector w[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) w[v] = Load(weights + kLanes * v);
      weights += kLanes * vectors;
#pragma GCC unroll 16
      for (int p = 0; p < pixels; ++p) {
        const float number = *reinterpret_cast<const float*>(x[p / 3] + p % 3 * step);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[p][v] += number * w[v];
      }
#pragma GCC unroll 8
      for (int q = 0; q < kPointers; ++q) {
        x[q] += sizeof(float);
        asm("" : "+r"(x[q]));  // a register each: GCC would compute all of them from one
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const Vector bias = epilogue.bias ? Load(epilogue.bias + kLanes * v) : Vector{};
    const int lanes = v < vectors - 1 ? kLanes : last_lanes;
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) {
      float* to = out + p * out_step + kLanes * v;
      Vector result = sum[p][v] + bias;
      if (epilogue.continues) result += LoadFirst(to, lanes);
      StoreFirst(to, epilogue.relu ? Relu(result) : result, lanes);
    }
  }
}

typedef void (*BlockFunction)(const Segment*, int, const float*, const Epilogue&, float*, long, int);

template <int... i>
BlockFunction Choose(int pixels, int vectors, std::integer_sequence<int, i...>) {
  static constexpr BlockFunction kFunctions[] = {Block<i / kVectors + 1, i % kVectors + 1>...};
  return kFunctions[(pixels - 1) * kVectors + vectors - 1];
}

}  // namespace

void Multiply(int pixels, int channels, const Segment* segments, int count, const float* weights, const Epilogue& epilogue,
              float* out, long out_step) {
  const int vectors = DivideUp(channels, kLanes);
  const BlockFunction block = Choose(pixels, vectors, std::make_integer_sequence<int, kPixels * kVectors>());
  block(segments, count, weights, epilogue, out, out_step, channels - (vectors - 1) * kLanes);
}

}  // namespace channels_last
}  // namespace caffe
