// The pieces of a layer's work on as many of this machine's cores as are free.
#ifndef CHANNELS_LAST_CORES_HPP_
#define CHANNELS_LAST_CORES_HPP_

namespace caffe {
namespace channels_last {

// Calls work(context, i) for each piece 0 <= i < pieces, in this thread and in helping ones. What a piece computes must not
// depend on the others: then results do not depend on who helps. One caller at a time in a process.
void ForEachPiece(int pieces, void (*work)(const void* context, int i), const void* context) noexcept;

template <class Work>
void ForEach(int pieces, const Work& work) {
  ForEachPiece(pieces, [](const void* context, int i) { (*static_cast<const Work*>(context))(i); }, &work);
}

extern "C" {

// The number of cores that nobody uses, in memory that several processes share, from now on: before, there is no help.
// A process that computes a tile takes one and returns it afterwards. It need not wait for one: if all are in use, the
// number becomes negative, and then helping threads return theirs as soon as they have finished a piece.
void cnn_vis_share_cores(int* free_cores);
void cnn_vis_take_core();
void cnn_vis_return_core();

// From now on no thread helps, and see(pieces, seconds that each took) is called after all pieces of some work. NULL: as
// before.
void cnn_vis_observe(void (*see)(int pieces, const double* seconds));
}

}  // namespace channels_last
}  // namespace caffe

#endif  // CHANNELS_LAST_CORES_HPP_
