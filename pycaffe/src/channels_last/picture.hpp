// Pictures with the channels last, what is done to parts of them, and scratch memory.
#ifndef CHANNELS_LAST_PICTURE_HPP_
#define CHANNELS_LAST_PICTURE_HPP_

#include "cores.hpp"
#include "vectors.hpp"

namespace caffe {
namespace channels_last {

// A picture of pixels with `step` numbers each, of which the channels from `channel` on are meant.
template <class Number>
struct Picture {
  Number* data;
  int height, width;
  long step;
  int channel = 0;
  Number* at(int y, int x) const { return data + (static_cast<long>(y) * width + x) * step + channel; }
};

struct Range {
  int begin, end;
  int size() const { return end - begin; }
};

// A range, divided into parts of nearly the same size.
class Ranges {
 public:
  Ranges(Range whole, int parts) : whole_(whole), parts_(parts) {}
  Ranges(int size, int parts) : Ranges(Range{0, size}, parts) {}
  Range operator[](int i) const { return {Begin(i), Begin(i + 1)}; }
  int size() const { return parts_; }
  int Find(int place) const {
    int i = 0;
    while (Begin(i + 1) <= place) ++i;
    return i;
  }

  struct Iterator {
    const Ranges& ranges;
    int i;
    Range operator*() const { return ranges[i]; }
    void operator++() { ++i; }
    bool operator!=(const Iterator& other) const { return i != other.i; }
  };
  Iterator begin() const { return {*this, 0}; }
  Iterator end() const { return {*this, parts_}; }

 private:
  int Begin(int i) const { return whole_.begin + static_cast<long>(whole_.size()) * i / parts_; }
  Range whole_;
  int parts_;
};

// Calls work(begin, end) for parts of `rows` rows of `length` numbers, each large enough for another thread.
template <class Work>
void ForRows(int rows, long length, const Work& work) {
  const int each = std::max(1L, (1L << 16) / std::max(1L, length));
  ForEach(DivideUp(rows, each), [&](int i) { work(i * each, std::min(rows, (i + 1) * each)); });
}

// `number` matrices rows x columns to columns x rows, in squares that stay in the processor's cache.
inline void TransposeMatrices(const float* from, int rows, int columns, int number, float* to) {
  const int side = 32, squares = DivideUp(rows, side);
  ForRows(number * squares, static_cast<long>(side) * columns, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const long matrix = static_cast<long>(i / squares) * rows * columns;
      const int top = i % squares * side, bottom = std::min(rows, top + side);
      for (int left = 0; left < columns; left += side) {
        for (int column = left; column < std::min(columns, left + side); ++column) {
          for (int row = top; row < bottom; ++row) {
            to[matrix + static_cast<long>(column) * rows + row] = from[matrix + static_cast<long>(row) * columns + column];
          }
        }
      }
    }
  });
}

// Memory for the layer that is being computed: shared by all threads, and of each thread's own. The next call overwrites it.
inline float* SharedScratch(size_t count) {
  static Buffer buffer;
  return buffer.Need(count);
}
inline float* OwnScratch(size_t count) {
  static thread_local Buffer buffer;
  return buffer.Need(count);
}

}  // namespace channels_last
}  // namespace caffe

#endif  // CHANNELS_LAST_PICTURE_HPP_
