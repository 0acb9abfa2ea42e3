#include "convolution.hpp"

#include <vector>

#include "cores.hpp"
#include "filtering.hpp"

namespace caffe {
namespace channels_last {
namespace {

const double kPiece = 1 << 19;  // multiplications that are worth another thread

// The finished products of `pixels` pixels for all outputs; `segments(first, list)` lists what the pixels from `first` on
// depend on. Sums up `inputs` numbers for each, with weights that begin with `packed`.
template <class List>
void MultiplyRow(int pixels, int inputs, int outputs, const float* packed, const Epilogue& epilogue, float* out, long out_step,
                 const List& list) {
  std::vector<Segment> segments;
  for (int first = 0; first < pixels; first += kPixels) {
    segments.clear();
    list(first, &segments);
    for (int o = 0; o < outputs; o += kPanel) {
      const Epilogue part = {epilogue.bias ? epilogue.bias + o : nullptr, epilogue.relu, epilogue.continues};
      Multiply(std::min(kPixels, pixels - first), std::min(kPanel, outputs - o), segments.data(), segments.size(),
               packed + static_cast<size_t>(inputs) * o, part, out + first * out_step + o, out_step);
    }
  }
}

// Kernels of a single pixel: products of matrices.
class Pointwise : public Algorithm {
 public:
  Pointwise(const Geometry& geometry, const float* weights) : g_(geometry), weights_(weights) {}

  virtual void Forward(const float* in, const Epilogue& epilogue, float* out) {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs();
    const size_t size = PackedSize(inputs, outputs);
    if (!forward_.data()) {
      for (int group = 0; group < g_.groups; ++group) {
        const float* w = weights_ + static_cast<size_t>(group) * outputs * inputs;
        PackPanels(inputs, outputs, [&](int k, int o) { return w[static_cast<size_t>(o) * inputs + k]; },
                   forward_.Need(g_.groups * size) + group * size);
      }
    }
    Run(in, nullptr, inputs, outputs, forward_.data(), size, epilogue, out);
  }

  virtual void Backward(const float* gradient, const float* mask, bool adds, float* to) {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs();
    const size_t size = PackedSize(outputs, inputs);
    if (!backward_.data()) {
      for (int group = 0; group < g_.groups; ++group) {
        const float* w = weights_ + static_cast<size_t>(group) * outputs * inputs;
        PackPanels(outputs, inputs, [&](int k, int i) { return w[static_cast<size_t>(k) * inputs + i]; },
                   backward_.Need(g_.groups * size) + group * size);
      }
    }
    Run(gradient, mask, outputs, inputs, backward_.data(), size, {nullptr, false, adds}, to);
  }

 private:
  void Run(const float* in, const float* mask, int inputs, int outputs, const float* packed, size_t size,
           const Epilogue& epilogue, float* out) const {
    const int all = g_.y.size * g_.x.size, blocks = DivideUp(all, kPixels);
    const long in_step = static_cast<long>(inputs) * g_.groups, out_step = static_cast<long>(outputs) * g_.groups;
    // Some blocks of pixels for each piece, or some panels of outputs where a block is enough work for several.
    const double block_work = static_cast<double>(kPixels) * inputs * outputs;
    const int panels = DivideUp(outputs, kPanel), parts = std::min<double>(panels, std::max(1., block_work / kPiece));
    const int count = std::max(1., std::min<double>(blocks, blocks * block_work / kPiece));
    const Ranges turns(blocks, count), part(panels, parts);
    ForEach(count * parts * g_.groups, [&](int piece) {
      const int group = piece / (count * parts);
      const Range turn = turns[piece / parts % count], panel = part[piece % parts];
      const int first = turn.begin * kPixels, end = std::min(all, turn.end * kPixels), channel = panel.begin * kPanel;
      const float* from = in + first * in_step + group * inputs;
      long from_step = in_step;
      if (mask) {
        from = Masked(from, mask + (from - in), end - first, inputs, in_step);
        from_step = inputs;
      }
      const float* bias = epilogue.bias ? epilogue.bias + group * outputs + channel : nullptr;
      const Epilogue ours = {bias, epilogue.relu, epilogue.continues};
      MultiplyRow(end - first, inputs, std::min(outputs, panel.end * kPanel) - channel,
                  packed + group * size + static_cast<size_t>(inputs) * channel, ours,
                  out + first * out_step + group * outputs + channel, out_step,
                  [&](int pixel, std::vector<Segment>* segments) {
                    segments->push_back({from + pixel * from_step, from_step, inputs});
                  });
    });
  }

  // A copy of some pixels, with zeros where the mask is not positive.
  static const float* Masked(const float* from, const float* mask, int pixels, int channels, long step) {
    float* copy = OwnScratch(static_cast<size_t>(pixels) * channels);
    for (int p = 0; p < pixels; ++p) {
      for (int k = 0; k < channels; ++k) copy[p * channels + k] = mask[p * step + k] > 0 ? from[p * step + k] : 0;
    }
    return copy;
  }

  const Geometry g_;
  const float* weights_;
  Buffer forward_, backward_;
};

// Square kernels with stride 1, by minimal filtering.
template <int M, int R>
class Filtered : public Algorithm {
 public:
  Filtered(const Geometry& geometry, const float* weights) : g_(geometry), weights_(weights) {}

  virtual void Forward(const float* in, const Epilogue& epilogue, float* out) {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs();
    if (!forward_) {
      forward_.reset(new Filtering<M, R>[g_.groups]);
      for (int group = 0; group < g_.groups; ++group) {
        forward_[group].Pack(inputs, outputs, [&](int k, int o, int y, int x) { return Weight(group, o, k, y, x); });
      }
    }
    for (int group = 0; group < g_.groups; ++group) {
      const Epilogue ours = {epilogue.bias ? epilogue.bias + group * outputs : nullptr, epilogue.relu};
      forward_[group].Run({in, g_.y.size, g_.x.size, g_.inputs, group * inputs}, nullptr, g_.y.pad, ours,
                          {out, g_.y.out_size, g_.x.out_size, g_.outputs, group * outputs});
    }
  }

  // The same with each kernel turned by half a turn.
  virtual void Backward(const float* gradient, const float* mask, bool adds, float* to) {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs();
    if (!backward_) {
      backward_.reset(new Filtering<M, R>[g_.groups]);
      for (int group = 0; group < g_.groups; ++group) {
        backward_[group].Pack(outputs, inputs, [&](int k, int i, int y, int x) {
          return Weight(group, k, i, R - 1 - y, R - 1 - x);
        });
      }
    }
    for (int group = 0; group < g_.groups; ++group) {
      backward_[group].Run({gradient, g_.y.out_size, g_.x.out_size, g_.outputs, group * outputs}, mask,
                           R - 1 - g_.y.pad, {nullptr, false, adds},
                           {to, g_.y.size, g_.x.size, g_.inputs, group * inputs});
    }
  }

 private:
  float Weight(int group, int output, int input, int y, int x) const {
    const size_t kernel = static_cast<size_t>(group * g_.group_outputs() + output) * g_.group_inputs() + input;
    return weights_[(kernel * R + y) * R + x];
  }

  const Geometry g_;
  const float* weights_;
  std::unique_ptr<Filtering<M, R>[]> forward_, backward_;  // for each group
};

// Kernels of up to 8 x 8 with stride 2: of every second column and row, that is four pictures, kernels of 4 x 4 with stride 1.
// Reads and writes pictures of any strides.
class InPhases : public Algorithm {
 public:
  InPhases(const Geometry& geometry, const Strides& strides, const float* weights)
      : g_(geometry), strides_(strides), weights_(weights), height_(g_.y.out_size + 3), width_(g_.x.out_size + 3) {
    phases_.Need(static_cast<size_t>(height_) * width_ * step());
  }

  virtual void Forward(const float* in, const Epilogue& epilogue, float* out) {
    if (!is_forward_packed_) {
      is_forward_packed_ = true;
      forward_.Pack(channels(), g_.outputs, [&](int k, int o, int y, int x) { return Weight(o, k, y, x); });
    }
    ForEach(height_, [&](int row) {
      std::fill_n(Row(row), static_cast<long>(width_) * step(), 0.f);
      ForPixels(row, [&](long place, float* phase) { *phase = in[place]; });
    });
    forward_.Run({phases_.data(), height_, width_, step()}, nullptr, 0, epilogue,
                 {out, g_.y.out_size, g_.x.out_size, g_.outputs});
  }

  virtual void Backward(const float* gradient, const float* mask, bool adds, float* to) {
    if (!is_backward_packed_) {
      is_backward_packed_ = true;
      backward_.Pack(g_.outputs, channels(), [&](int k, int o, int y, int x) { return Weight(k, o, 3 - y, 3 - x); });
    }
    backward_.Run({gradient, g_.y.out_size, g_.x.out_size, g_.outputs}, mask, 3, {nullptr, false},
                  {phases_.data(), height_, width_, step()});
    for (int y = 0; y < g_.y.size; ++y) {  // what no kernel reaches
      const int first = y < 2 * height_ - g_.y.pad ? std::max(0, 2 * width_ - g_.x.pad) : 0;
      for (int x = first; x < g_.x.size && !adds; ++x) {
        for (int c = 0; c < g_.inputs; ++c) to[Place(c, y, x)] = 0;
      }
    }
    ForEach(height_, [&](int row) {
      ForPixels(row, [&](long place, const float* phase) { to[place] = adds ? to[place] + *phase : *phase; });
    });
  }

 private:
  int channels() const { return 4 * g_.inputs; }
  int step() const { return WholeVectors(channels()); }
  float* Row(int row) { return phases_.data() + static_cast<long>(row) * width_ * step(); }
  long Place(int channel, int y, int x) const { return channel * strides_.channel + y * strides_.row + x * strides_.column; }

  // Calls use(place in the picture, number in phases_) for all numbers of a row of phases_ that lie in the picture.
  template <class Use>
  void ForPixels(int row, const Use& use) {
    for (int i = 0; i < channels(); ++i) {
      const int phase = i / g_.inputs, y = 2 * row + phase / 2 - g_.y.pad, before = phase % 2 - g_.x.pad;
      if (y < 0 || y >= g_.y.size) continue;
      const int first = std::max(0, DivideUp(-before, 2)), end = std::min(width_, DivideUp(g_.x.size - before, 2));
      const long place = Place(i % g_.inputs, y, before);
      for (int x = first; x < end; ++x) use(place + 2 * x * strides_.column, Row(row) + x * step() + i);
    }
  }

  float Weight(int output, int channel, int y, int x) const {
    const int phase = channel / g_.inputs, input = channel % g_.inputs;
    const int row = 2 * y + phase / 2, column = 2 * x + phase % 2;
    if (row >= g_.y.kernel || column >= g_.x.kernel) return 0;
    return weights_[((static_cast<size_t>(output) * g_.inputs + input) * g_.y.kernel + row) * g_.x.kernel + column];
  }

  const Geometry g_;
  const Strides strides_;
  const float* weights_;
  const int height_, width_;  // of phases_
  Buffer phases_;
  Filtering<3, 4> forward_, backward_;
  bool is_forward_packed_ = false, is_backward_packed_ = false;
};

// Any other convolution, by its definition, and with sums in the order of Caffe's. The gradient has one kernel for each place
// of an input pixel between those on which kernels begin.
class Direct : public Algorithm {
 public:
  Direct(const Geometry& geometry, const float* weights)
      : g_(geometry), weights_(weights), is_by_plane_(g_.inputs < 8 && g_.groups == 1 && g_.x.dilation == 1) {}

  virtual void Forward(const float* in, const Epilogue& epilogue, float* out) {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs(), taps = g_.y.kernel * g_.x.kernel;
    const size_t size = PackedSize(taps * inputs, outputs);
    if (!forward_.data()) {
      const auto place = [&](int k) { return is_by_plane_ ? k : k % inputs * taps + k / inputs; };
      for (int group = 0; group < g_.groups; ++group) {
        const float* w = weights_ + static_cast<size_t>(group) * outputs * inputs * taps;
        PackPanels(taps * inputs, outputs, [&](int k, int o) { return w[static_cast<size_t>(o) * inputs * taps + place(k)]; },
                   forward_.Need(g_.groups * size) + group * size);
      }
    }
    const Picture<float> bordered = Bordered({in, g_.y.size, g_.x.size, g_.inputs}, nullptr, g_.y.pad, g_.x.pad,
                                             std::max(g_.y.size + g_.y.pad, Reach(g_.y)),
                                             std::max(g_.x.size + g_.x.pad, Reach(g_.x)), is_by_plane_);
    ForEach(g_.y.out_size * g_.groups, [&](int piece) {
      const int group = piece % g_.groups, row = piece / g_.groups;
      const Epilogue ours = {epilogue.bias ? epilogue.bias + group * outputs : nullptr, epilogue.relu};
      MultiplyRow(g_.x.out_size, taps * inputs, outputs, forward_.data() + group * size, ours,
                  out + static_cast<long>(row) * g_.x.out_size * g_.outputs + group * outputs, g_.outputs,
                  [&](int first, std::vector<Segment>* segments) {
                    const int x = first * g_.x.stride;
                    for (int i = 0; is_by_plane_ && i < g_.inputs * g_.y.kernel; ++i) {
                      const int y = row * g_.y.stride + i % g_.y.kernel * g_.y.dilation;
                      const long area = static_cast<long>(bordered.height) * bordered.width;
                      const float* plane = bordered.data + i / g_.y.kernel * area;
                      segments->push_back({plane + static_cast<long>(y) * bordered.width + x, g_.x.stride, g_.x.kernel});
                    }
                    for (int i = 0; !is_by_plane_ && i < taps; ++i) {
                      const int y = row * g_.y.stride + i / g_.x.kernel * g_.y.dilation;
                      const float* from = bordered.at(y, x + i % g_.x.kernel * g_.x.dilation);
                      segments->push_back({from + group * inputs, g_.x.stride * bordered.step, inputs});
                    }
                  });
    });
  }

  virtual void Backward(const float* gradient, const float* mask, bool adds, float* to) {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs();
    if (phases_.empty()) PackBackward();
    const int above = (g_.y.kernel - 1) * g_.y.dilation / g_.y.stride, left = (g_.x.kernel - 1) * g_.x.dilation / g_.x.stride;
    const int below = std::max(g_.y.out_size, (g_.y.size - 1 + g_.y.pad) / g_.y.stride + 1);
    const int right = std::max(g_.x.out_size, (g_.x.size - 1 + g_.x.pad) / g_.x.stride + 1);
    const Picture<float> bordered = Bordered({gradient, g_.y.out_size, g_.x.out_size, g_.outputs}, mask, above, left,
                                             above + below, left + right);
    ForEach(g_.y.size * g_.groups, [&](int piece) {
      const int group = piece % g_.groups, y = piece / g_.groups;
      for (int phase_x = 0; phase_x < g_.x.stride; ++phase_x) {
        const Phase& phase = phases_[(y + g_.y.pad) % g_.y.stride * g_.x.stride + phase_x];
        const int x = ((phase_x - g_.x.pad) % g_.x.stride + g_.x.stride) % g_.x.stride;  // the first pixel
        const int count = DivideUp(g_.x.size - x, g_.x.stride);
        float* out = to + (static_cast<long>(y) * g_.x.size + x) * g_.inputs + group * inputs;
        const long out_step = static_cast<long>(g_.x.stride) * g_.inputs;
        for (int p = 0; phase.taps.empty() && !adds && p < count; ++p) std::fill_n(out + p * out_step, inputs, 0.f);
        for (int i = 0; i < phase.taps.size(); ++i) {
          const float* from = bordered.at((y + g_.y.pad) / g_.y.stride - phase.taps[i].up + above,
                                          (x + g_.x.pad) / g_.x.stride - phase.taps[i].left + left) + group * outputs;
          const float* packed = phase.packed[group * phase.taps.size() + i].data();
          MultiplyRow(count, outputs, inputs, packed, {nullptr, false, adds || i > 0}, out, out_step,
                      [&](int first, std::vector<Segment>* segments) {
                        segments->push_back({from + first * bordered.step, bordered.step, outputs});
                      });
        }
      }
    });
  }

 private:
  struct Tap {  // a weight of the kernel, and by how many output pixels the output that it leads to is further up and left
    int up, left, place;
  };
  struct Phase {
    std::vector<Tap> taps;
    std::unique_ptr<Buffer[]> packed;  // for each group, each tap
  };

  static int Reach(const Side& side) { return (side.out_size - 1) * side.stride + (side.kernel - 1) * side.dilation + 1; }

  void PackBackward() {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs();
    phases_.resize(g_.y.stride * g_.x.stride);
    for (int y = 0; y < g_.y.kernel; ++y) {
      for (int x = 0; x < g_.x.kernel; ++x) {
        const int down = y * g_.y.dilation, right = x * g_.x.dilation;
        phases_[down % g_.y.stride * g_.x.stride + right % g_.x.stride].taps.push_back(
            {down / g_.y.stride, right / g_.x.stride, y * g_.x.kernel + x});
      }
    }
    for (Phase& phase : phases_) {
      const int taps = phase.taps.size();
      phase.packed.reset(new Buffer[g_.groups * taps]);
      for (int i = 0; i < g_.groups * taps; ++i) {
        const float* w = weights_ + static_cast<size_t>(i / taps) * outputs * inputs * g_.y.kernel * g_.x.kernel;
        PackPanels(outputs, inputs, [&](int o, int k) {
          return w[(static_cast<size_t>(o) * inputs + k) * g_.y.kernel * g_.x.kernel + phase.taps[i % taps].place];
        }, phase.packed[i].Need(PackedSize(outputs, inputs)));
      }
    }
  }

  // A copy of a picture in the middle of zeros, which are also where `mask` is not positive; with `by_plane`, channel by
  // channel.
  static Picture<float> Bordered(const Picture<const float>& in, const float* mask, int above, int left, int height,
                                 int width, bool by_plane = false) {
    const Picture<float> copy = {SharedScratch(static_cast<size_t>(height) * width * in.step), height, width, in.step};
    const long plane = static_cast<long>(height) * width;
    ForEach(height, [&](int row) {
      const int y = row - above, count = y >= 0 && y < in.height ? std::min(in.width, width - left) : 0;
      for (int c = 0; c < (by_plane ? in.step : 1); ++c) {
        float* to = by_plane ? copy.data + c * plane + static_cast<long>(row) * width : copy.at(row, 0);
        std::fill_n(to, by_plane ? width : width * in.step, 0.f);
        for (int x = 0; by_plane && x < count; ++x) to[left + x] = in.at(y, x)[c];
      }
      const long numbers = by_plane ? 0 : count * in.step, place = static_cast<long>(y) * in.width * in.step;
      for (long i = 0; i < numbers; ++i) {
        copy.at(row, left)[i] = !mask || mask[place + i] > 0 ? in.data[place + i] : 0;
      }
    });
    return copy;
  }

  const Geometry g_;
  const float* weights_;
  const bool is_by_plane_;
  Buffer forward_;
  std::vector<Phase> phases_;
};

// For pictures with the channels first: a copy with them last, computed by another algorithm.
class Reordered : public Algorithm {
 public:
  Reordered(const Geometry& geometry, const Strides& strides, std::unique_ptr<Algorithm> algorithm)
      : g_(geometry), strides_(strides), algorithm_(std::move(algorithm)) {}

  virtual void Forward(const float* in, const Epilogue& epilogue, float* out) {
    Need();
    ForNumbers([&](long place, float* last) { *last = in[place]; });
    algorithm_->Forward(copy_.data(), epilogue, out);
  }

  virtual void Backward(const float* gradient, const float* mask, bool adds, float* to) {
    Need();
    algorithm_->Backward(gradient, mask, false, copy_.data());
    ForNumbers([&](long place, const float* last) { to[place] = adds ? to[place] + *last : *last; });
  }

 private:
  void Need() { copy_.Need(static_cast<size_t>(g_.y.size) * g_.x.size * g_.inputs); }

  template <class Use>
  void ForNumbers(const Use& use) {
    ForEach(g_.y.size, [&](int y) {
      for (int c = 0; c < g_.inputs; ++c) {
        float* last = copy_.data() + static_cast<long>(y) * g_.x.size * g_.inputs + c;
        for (int x = 0; x < g_.x.size; ++x) {
          use(c * strides_.channel + y * strides_.row + x * strides_.column, last + static_cast<long>(x) * g_.inputs);
        }
      }
    });
  }

  const Geometry g_;
  const Strides strides_;
  const std::unique_ptr<Algorithm> algorithm_;
  Buffer copy_;
};

// Larger patches save more multiplications. But they need more weights, which are most of what is read for a small picture, and
// with few channels their rounding errors are large beside those of the sums.
bool AreLargePatchesBetter(const Geometry& g) {
  return g.y.size * g.x.size > 400 && std::min(g.group_inputs(), g.group_outputs()) >= 32;
}

std::unique_ptr<Algorithm> ChannelsLastAlgorithm(const Geometry& g, const float* weights) {
  typedef std::unique_ptr<Algorithm> Chosen;

  const bool is_dense = g.y.stride == 1 && g.x.stride == 1 && g.y.dilation == 1 && g.x.dilation == 1;
  const int kernel = g.y.kernel == g.x.kernel && g.y.pad == g.x.pad && g.y.pad < g.y.kernel ? g.y.kernel : 0;
  if (is_dense && kernel == 1) return Chosen(new Pointwise(g, weights));
  if (is_dense && kernel == 3 && AreLargePatchesBetter(g)) return Chosen(new Filtered<4, 3>(g, weights));
  if (is_dense && kernel == 3) return Chosen(new Filtered<2, 3>(g, weights));
  if (is_dense && kernel == 5) return Chosen(new Filtered<2, 5>(g, weights));
  return Chosen(new Direct(g, weights));
}

}  // namespace

std::unique_ptr<Algorithm> ChooseAlgorithm(const Geometry& g, const Strides& strides, const float* weights) {
  const auto is_halved = [](const Side& side) {
    return side.stride == 2 && side.dilation == 1 && (side.kernel == 7 || side.kernel == 8);
  };
  if (is_halved(g.y) && is_halved(g.x) && g.groups == 1) return std::unique_ptr<Algorithm>(new InPhases(g, strides, weights));
  std::unique_ptr<Algorithm> algorithm = ChannelsLastAlgorithm(g, weights);
  if (strides.channel == 1) return algorithm;
  return std::unique_ptr<Algorithm>(new Reordered(g, strides, std::move(algorithm)));
}

}  // namespace channels_last
}  // namespace caffe
