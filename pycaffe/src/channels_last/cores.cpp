#include "cores.hpp"

#include <semaphore.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>
#include <vector>

namespace caffe {
namespace channels_last {
namespace {

typedef std::chrono::steady_clock Clock;
// How long to spin before sleeping. To wake a sleeping thread takes as long as a piece: with this at 0, a tile is computed 1.1
// times faster on two threads than on one, otherwise 1.8 times. A helping thread that spins has taken a core for that, which it
// returns when a process wants one, so nobody is kept waiting.
const std::chrono::microseconds kSoon(60);

std::atomic<int>* free_cores = nullptr;

// What several threads change has a cache line of its own: they would wait for each other's.
struct alignas(64) {
  void (*work)(const void*, int);
  const void* context;
  std::atomic<int> pieces{0};
  std::atomic<bool> is_open{false};  // whether there are pieces left to begin
  alignas(64) std::atomic<int> next{0};
} job;
alignas(64) std::atomic<int> inside{0};  // helping threads that may be looking at `job`
alignas(64) std::atomic<int> awake{0};   // helping threads with a core
int helpers = 0;                         // all helping threads
sem_t invitations;                       // cores taken for a helping thread that is to wake up

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until is_over() for a short time; returns whether it is.
template <class Condition>
bool WaitBriefly(const Condition& is_over) {
  for (const Clock::time_point end = Clock::now() + kSoon; Clock::now() < end;) {
    for (int i = 0; i < 16; ++i) {
      if (is_over()) return true;
      Pause();
    }
  }
  return is_over();
}

void (*observer)(int, const double*) = nullptr;

void TakePieces() {
  for (int i; (i = job.next++) < job.pieces;) job.work(job.context, i);
}

bool IsCoreWanted() { return *free_cores < 0; }

void Observe() {
  std::vector<double> seconds;
  for (int i = 0; i < job.pieces; ++i) {
    const Clock::time_point begun = Clock::now();
    job.work(job.context, i);
    seconds.push_back(std::chrono::duration<double>(Clock::now() - begun).count());
  }
  observer(job.pieces, seconds.data());
}

// A helping thread's life.
void Help() {
  for (;;) {
    while (sem_wait(&invitations)) {
    }
    do {
      ++inside;
      for (int i; job.is_open && !IsCoreWanted() && (i = job.next++) < job.pieces;) job.work(job.context, i);
      --inside;
      // Until the last piece is done there is nothing to do; then the next layer's pieces come.
    } while (WaitBriefly([] { return (job.is_open && job.next < job.pieces) || IsCoreWanted(); }) && !IsCoreWanted());
    --awake;
    ++*free_cores;
  }
}

// Takes up to `most` free cores and wakes a helping thread for each.
void Invite(int most) {
  for (int free = *free_cores; most > 0 && free > 0;) {
    if (!free_cores->compare_exchange_weak(free, free - 1)) continue;
    if (awake == helpers) {
      try {
        std::thread(Help).detach();
      } catch (const std::system_error&) {  // too many threads: this one has to do
        ++*free_cores;
        return;
      }
      ++helpers;
    }
    ++awake;
    sem_post(&invitations);
    --most;
    free = *free_cores;
  }
}

}  // namespace

void ForEachPiece(int pieces, void (*work)(const void*, int), const void* context) noexcept {
  job.work = work, job.context = context, job.pieces = pieces;
  job.next = 0;
  if (observer) return Observe();
  if (pieces < 2 || !free_cores) return TakePieces();
  job.is_open = true;
  Invite(pieces - 1 - awake);
  TakePieces();
  job.is_open = false;
  while (!WaitBriefly([] { return inside == 0; })) {  // a helping thread was interrupted by another program
    const timespec moment = {0, 50000};
    nanosleep(&moment, nullptr);
  }
}

static_assert(sizeof(std::atomic<int>) == sizeof(int) && std::atomic<int>::is_always_lock_free, "processes can share one");

extern "C" {

void cnn_vis_share_cores(int* shared) {
  if (!free_cores) sem_init(&invitations, 0, 0);
  free_cores = reinterpret_cast<std::atomic<int>*>(shared);
}

void cnn_vis_take_core() { --*free_cores; }
void cnn_vis_return_core() { ++*free_cores; }
void cnn_vis_observe(void (*see)(int, const double*)) { observer = see; }
}

}  // namespace channels_last
}  // namespace caffe
