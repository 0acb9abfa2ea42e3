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
      Multiply(std::min(kPixels, pixels - first), std::min(kPanel, outputs - o), segments.data(), segments.size(),
               packed + static_cast<size_t>(inputs) * o, epilogue.From(o), out + first * out_step + o, out_step);
    }
  }
}

// Packs weight(group, k, o), inputs x outputs for each group, unless that is done. Returns them; each group takes PackedSize.
template <class Weight>
const float* PackOnce(int groups, int inputs, int outputs, const Weight& weight, Buffer* packed) {
  if (!packed->data()) {
    const size_t size = PackedSize(inputs, outputs);
    float* to = packed->Need(groups * size);
    for (int group = 0; group < groups; ++group) {
      PackPanels(inputs, outputs, [&](int k, int o) { return weight(group, k, o); }, to + group * size);
    }
  }
  return packed->data();
}

// What all algorithms know.
class WithWeights : public Algorithm {
 public:
  WithWeights(const Geometry& geometry, const float* weights) : g_(geometry), weights_(weights) {}

 protected:
  // `place` in the kernel: row by row.
  float Weight(int group, int output, int input, int place) const {
    const size_t kernel = static_cast<size_t>(group * g_.group_outputs() + output) * g_.group_inputs() + input;
    return weights_[kernel * g_.y.kernel * g_.x.kernel + place];
  }

  const Geometry g_;

 private:
  const float* weights_;
};

// Kernels of a single pixel: products of matrices.
class Pointwise : public WithWeights {
 public:
  using WithWeights::WithWeights;

  virtual void Forward(const float* in, const Epilogue& epilogue, float* out) {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs();
    const auto weight = [this](int group, int k, int o) { return Weight(group, o, k, 0); };
    Run(in, nullptr, inputs, outputs, PackOnce(g_.groups, inputs, outputs, weight, &forward_), epilogue, out);
  }

  virtual void Backward(const float* gradient, const float* mask, bool adds, float* to) {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs();
    const auto weight = [this](int group, int k, int i) { return Weight(group, k, i, 0); };
    const float* packed = PackOnce(g_.groups, outputs, inputs, weight, &backward_);
    Run(gradient, mask, outputs, inputs, packed, {nullptr, false, adds}, to);
  }

 private:
  void Run(const float* in, const float* mask, int inputs, int outputs, const float* packed, const Epilogue& epilogue,
           float* out) const {
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
      MultiplyRow(end - first, inputs, std::min(outputs, panel.end * kPanel) - channel,
                  packed + group * PackedSize(inputs, outputs) + static_cast<size_t>(inputs) * channel,
                  epilogue.From(group * outputs + channel), out + first * out_step + group * outputs + channel, out_step,
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

  Buffer forward_, backward_;
};

// Square kernels with stride 1, by minimal filtering.
template <int M, int R>
class Filtered : public WithWeights {
 public:
  Filtered(const Geometry& geometry, const float* weights)
      : WithWeights(geometry, weights), forward_(new Filtering<M, R>[g_.groups]), backward_(new Filtering<M, R>[g_.groups]) {}

  virtual void Forward(const float* in, const Epilogue& epilogue, float* out) {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs();
    for (int group = 0; group < g_.groups; ++group) {
      if (!forward_[group].is_packed()) {
        forward_[group].Pack(inputs, outputs, [&](int k, int o, int y, int x) { return Weight(group, o, k, y * R + x); });
      }
      forward_[group].Run({in, g_.y.size, g_.x.size, g_.inputs, group * inputs}, nullptr, g_.y.pad,
                          epilogue.From(group * outputs),
                          {out, g_.y.out_size, g_.x.out_size, g_.outputs, group * outputs});
    }
  }

  // The same with each kernel turned by half a turn.
  virtual void Backward(const float* gradient, const float* mask, bool adds, float* to) {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs();
    for (int group = 0; group < g_.groups; ++group) {
      if (!backward_[group].is_packed()) {
        backward_[group].Pack(outputs, inputs, [&](int k, int i, int y, int x) {
          return Weight(group, k, i, R * R - 1 - (y * R + x));
        });
      }
      backward_[group].Run({gradient, g_.y.out_size, g_.x.out_size, g_.outputs, group * outputs}, mask,
                           R - 1 - g_.y.pad, {nullptr, false, adds},
                           {to, g_.y.size, g_.x.size, g_.inputs, group * inputs});
    }
  }

 private:
  const std::unique_ptr<Filtering<M, R>[]> forward_, backward_;  // for each group
};

// Kernels of up to 8 x 8 with stride 2: of every second column and row, that is four pictures, kernels of 4 x 4 with stride 1.
// Reads and writes pictures of any strides.
class InPhases : public WithWeights {
 public:
  InPhases(const Geometry& geometry, const Strides& strides, const float* weights)
      : WithWeights(geometry, weights), strides_(strides), height_(g_.y.out_size + 3), width_(g_.x.out_size + 3) {
    phases_.Need(static_cast<size_t>(height_) * width_ * step());
  }

  virtual void Forward(const float* in, const Epilogue& epilogue, float* out) {
    if (!forward_.is_packed()) {
      forward_.Pack(channels(), g_.outputs, [&](int k, int o, int y, int x) { return PhaseWeight(o, k, y, x); });
    }
    ForEach(height_, [&](int row) {
      std::fill_n(Row(row), static_cast<long>(width_) * step(), 0.f);
      ForPixels(row, [&](long place, float* phase) { *phase = in[place]; });
    });
    forward_.Run({phases_.data(), height_, width_, step()}, nullptr, 0, epilogue,
                 {out, g_.y.out_size, g_.x.out_size, g_.outputs});
  }

  virtual void Backward(const float* gradient, const float* mask, bool adds, float* to) {
    if (!backward_.is_packed()) {
      backward_.Pack(g_.outputs, channels(), [&](int k, int o, int y, int x) { return PhaseWeight(k, o, 3 - y, 3 - x); });
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

  float PhaseWeight(int output, int channel, int y, int x) const {
    const int phase = channel / g_.inputs, input = channel % g_.inputs;
    const int row = 2 * y + phase / 2, column = 2 * x + phase % 2;
    if (row >= g_.y.kernel || column >= g_.x.kernel) return 0;
    return Weight(0, output, input, row * g_.x.kernel + column);
  }

  const Strides strides_;
  const int height_, width_;  // of phases_
  Buffer phases_;
  Filtering<3, 4> forward_, backward_;
};

// Any other convolution, by its definition, and with sums in the order of Caffe's. The gradient has one kernel for each place
// of an input pixel between those on which kernels begin.
class Direct : public WithWeights {
 public:
  Direct(const Geometry& geometry, const float* weights)
      : WithWeights(geometry, weights), is_by_plane_(g_.inputs < 8 && g_.groups == 1 && g_.x.dilation == 1) {}

  virtual void Forward(const float* in, const Epilogue& epilogue, float* out) {
    const int inputs = g_.group_inputs(), outputs = g_.group_outputs(), taps = g_.y.kernel * g_.x.kernel;
    const auto weight = [&](int group, int k, int o) {
      return is_by_plane_ ? Weight(group, o, k / taps, k % taps) : Weight(group, o, k % inputs, k / inputs);
    };
    const float* packed = PackOnce(g_.groups, taps * inputs, outputs, weight, &forward_);
    const Picture<const float> picture = {in, g_.y.size, g_.x.size, g_.inputs};
    const int height = std::max(g_.y.size + g_.y.pad, Reach(g_.y)), width = std::max(g_.x.size + g_.x.pad, Reach(g_.x));
    const Picture<float> bordered = is_by_plane_ ? BorderedPlanes(picture, g_.y.pad, g_.x.pad, height, width)
                                                 : Bordered(picture, nullptr, g_.y.pad, g_.x.pad, height, width);
    ForEach(g_.y.out_size * g_.groups, [&](int piece) {
      const int group = piece % g_.groups, row = piece / g_.groups;
      MultiplyRow(g_.x.out_size, taps * inputs, outputs, packed + group * PackedSize(taps * inputs, outputs),
                  epilogue.From(group * outputs),
                  out + static_cast<long>(row) * g_.x.out_size * g_.outputs + group * outputs, g_.outputs,
                  [&](int first, std::vector<Segment>* segments) {
                    const int y = row * g_.y.stride, x = first * g_.x.stride;
                    if (is_by_plane_) {
                      ListRows(bordered, y, x, segments);
                    } else {
                      ListTaps(bordered, y, x, group * inputs, segments);
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
        PackPanels(outputs, inputs, [&](int k, int o) { return Weight(i / taps, k, o, phase.taps[i % taps].place); },
                   phase.packed[i].Need(PackedSize(outputs, inputs)));
      }
    }
  }

  // What the pixel at y, x and those after it depend on: in planes, a row of the kernel in each channel;
  void ListRows(const Picture<float>& planes, int y, int x, std::vector<Segment>* segments) const {
    for (int i = 0; i < g_.inputs * g_.y.kernel; ++i) {
      const long row = static_cast<long>(i / g_.y.kernel) * planes.height + y + i % g_.y.kernel * g_.y.dilation;
      segments->push_back({planes.data + row * planes.width + x, g_.x.stride, g_.x.kernel});
    }
  }

  // or else all channels of the group at each place of the kernel.
  void ListTaps(const Picture<float>& bordered, int y, int x, int channel, std::vector<Segment>* segments) const {
    for (int i = 0; i < g_.y.kernel * g_.x.kernel; ++i) {
      const float* from = bordered.at(y + i / g_.x.kernel * g_.y.dilation, x + i % g_.x.kernel * g_.x.dilation);
      segments->push_back({from + channel, g_.x.stride * bordered.step, g_.group_inputs()});
    }
  }

  // A copy of a picture in the middle of zeros, which are also where `mask` is not positive.
  static Picture<float> Bordered(const Picture<const float>& in, const float* mask, int above, int left, int height,
                                 int width) {
    const Picture<float> copy = {SharedScratch(static_cast<size_t>(height) * width * in.step), height, width, in.step};
    ForEach(height, [&](int row) {
      std::fill_n(copy.at(row, 0), width * in.step, 0.f);
      const int y = row - above;
      if (y < 0 || y >= in.height) return;
      const long count = std::min(in.width, width - left) * in.step, place = static_cast<long>(y) * in.width * in.step;
      float* to = copy.at(row, left);
      for (long i = 0; i < count; ++i) to[i] = !mask || mask[place + i] > 0 ? in.data[place + i] : 0;
    });
    return copy;
  }

  // The same, one channel after the other.
  static Picture<float> BorderedPlanes(const Picture<const float>& in, int above, int left, int height, int width) {
    const Picture<float> copy = {SharedScratch(static_cast<size_t>(height) * width * in.step), height, width, in.step};
    ForEach(in.step * height, [&](int row) {
      float* to = copy.data + static_cast<long>(row) * width;
      std::fill_n(to, width, 0.f);
      const int channel = row / height, y = row % height - above;
      if (y < 0 || y >= in.height) return;
      for (int x = 0; x < std::min(in.width, width - left); ++x) to[left + x] = in.at(y, x)[channel];
    });
    return copy;
  }

  const bool is_by_plane_;
  Buffer forward_;
  std::vector<Phase> phases_;
};

// For pictures with the channels first: a copy with them last, computed by another algorithm. Never adds.
class Reordered : public Algorithm {
 public:
  Reordered(const Geometry& geometry, std::unique_ptr<Algorithm> algorithm)
      : channels_(geometry.inputs), pixels_(geometry.y.size * geometry.x.size), algorithm_(std::move(algorithm)) {
    copy_.Need(static_cast<size_t>(channels_) * pixels_);
  }

  virtual void Forward(const float* in, const Epilogue& epilogue, float* out) {
    TransposeMatrices(in, channels_, pixels_, 1, copy_.data());
    algorithm_->Forward(copy_.data(), epilogue, out);
  }

  virtual void Backward(const float* gradient, const float* mask, bool adds, float* to) {
    algorithm_->Backward(gradient, mask, false, copy_.data());
    TransposeMatrices(copy_.data(), pixels_, channels_, 1, to);
  }

 private:
  const int channels_, pixels_;
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
  return std::unique_ptr<Algorithm>(new Reordered(g, std::move(algorithm)));
}

}  // namespace channels_last
}  // namespace caffe
