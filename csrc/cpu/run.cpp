#include "cpu/run.h"

#include <omp.h>
#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/memory.h"

namespace slimvit {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr long kChunk = 8;  // images that one thread takes through the depth together

struct Free {
  void operator()(char* p) const { std::free(p); }
};

// One call's memory, kept from call to call.
struct Workspace {
  std::unique_ptr<char, Free> bytes;
  std::size_t size = 0;
  std::vector<Barrier> barriers;
  std::unique_ptr<Workspace> next;  // idle ones are a chain

  void reserve(std::size_t wanted, int threads) {
    if (wanted > size) {
      bytes.reset();
      size = 0;
      const std::size_t whole = (wanted + kHugePage - 1) / kHugePage * kHugePage;
      bytes.reset(static_cast<char*>(std::aligned_alloc(kHugePage, whole)));
      if (bytes == nullptr) throw std::bad_alloc();
      prefer_huge_pages(bytes.get(), static_cast<std::int64_t>(whole));
      size = whole;
    }
    if (barriers.size() < static_cast<std::size_t>(threads)) barriers.resize(threads);
  }
};

// Workspaces that no call uses. Nothing of it is ever destroyed: a daemon thread may still be
// computing when the process ends. A process that is forked waits for the mutex, so that its child
// does not find it locked by a thread that is not there.
struct Idle {
  std::mutex mutex;
  std::unique_ptr<Workspace> first;

  Idle();
};

Idle& idle = *new Idle;

Idle::Idle() {
  const auto unlock = [] { idle.mutex.unlock(); };
  pthread_atfork([] { idle.mutex.lock(); }, unlock, unlock);
}

// Lends a workspace to each call; as many exist as calls have ever run at once.
class Lent {
 public:
  Lent() {
    const std::lock_guard<std::mutex> lock(idle.mutex);
    workspace_ = std::move(idle.first);
    if (workspace_ == nullptr)
      workspace_ = std::make_unique<Workspace>();
    else
      idle.first = std::move(workspace_->next);
  }
  ~Lent() {
    const std::lock_guard<std::mutex> lock(idle.mutex);
    workspace_->next = std::move(idle.first);
    idle.first = std::move(workspace_);
  }
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;
  Workspace* operator->() { return workspace_.get(); }

 private:
  std::unique_ptr<Workspace> workspace_;
};

std::size_t whole_lines(std::int64_t bytes) {
  return static_cast<std::size_t>((bytes + kAlignment - 1) / kAlignment * kAlignment);
}

// Each thread first takes its equal share of whole images alone. The images that are left over are
// shared by teams, so that no thread ever waits for a whole image.
template <class Call, class Work>
void divide(const Call& call, int threads, std::int64_t own_bytes, std::int64_t shared_bytes,
            Work work) {
  if (call.batch == 0) return;
  const std::size_t own = whole_lines(own_bytes), shared = whole_lines(shared_bytes);
  Lent workspace;
  workspace->reserve(own * threads + shared * std::min<std::int64_t>(threads, call.batch), threads);
  char* base = workspace->bytes.get();
  std::vector<Barrier>& barriers = workspace->barriers;
  const auto worker = [&](int rank, int size) {
    char *mine = base + own * rank, *first_shared = base + own * threads;
    renew(mine, own);
    const std::int64_t each = call.batch / size, left = call.batch % size;
    if (each > 0) {
      renew(first_shared + shared * rank, shared);
      work(each * rank, each, Team{}, first_shared + shared * rank, mine);
    }
    if (left == 0) return;
    const int team = static_cast<int>(rank * left / size);
    const int first = static_cast<int>((team * size + left - 1) / left);
    const int next = static_cast<int>(((team + 1) * size + left - 1) / left);
    char* teams = first_shared + shared * (each > 0 ? first : team);
    if (rank == first) renew(teams, shared);
    const Team together{rank - first, next - first, &barriers[first]};
    together.sync();  // their memory is the first one's, who may still be at an image of its own
    work(each * size + team, 1, together, teams, mine);
  };
  if (threads == 1) return worker(0, 1);
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer threads than it was asked for, never more.
    const int size = omp_get_num_threads(), rank = omp_get_thread_num();
#pragma omp single
    {
      const std::int64_t left = call.batch % size;
      for (std::int64_t team = 0; team < left; ++team) {
        const auto first = (team * size + left - 1) / left;
        barriers[first].reset(static_cast<int>(((team + 1) * size + left - 1) / left - first));
      }
    }
    worker(rank, size);
  }
}

}  // namespace

void run(const BlockCall& call, int threads) {
  const PackHead& head = call.pack->head;
  const Kernels& k = kernels(head.isa, head.dtype);
  divide(call, threads, k.block_own_memory(call), k.block_memory(call),
         [&](long first, long count, const Team& team, char* shared, char* own) {
           k.block(call, first, count, team, shared, own);
           k.finish();
         });
}

void run(const SelectCall& call, int threads) {
  const PackHead& head = call.pack->head;
  const Kernels& k = kernels(head.isa, head.dtype);
  divide(call, threads, k.select_own_memory(call), k.select_memory(call),
         [&](long first, long count, const Team& team, char* shared, char* own) {
           k.select(call, first, count, team, shared, own);
           k.finish();
         });
}

void run(NetworkCall call, int threads) {
  call.chunk = std::clamp<long>(call.batch / threads, 1, kChunk);
  const PackHead& head = call.embedding->head;
  const Kernels& k = kernels(head.isa, head.dtype);
  divide(call, threads, k.network_own_memory(call), k.network_memory(call),
         [&](long first, long count, const Team& team, char* shared, char* own) {
           k.network(call, first, count, team, shared, own);
           k.finish();
         });
}

void prefer_huge_pages(void* begin, std::int64_t bytes) {
#if defined(__linux__)
  const auto first = (reinterpret_cast<std::uintptr_t>(begin) + kHugePage - 1) / kHugePage;
  const auto last = (reinterpret_cast<std::uintptr_t>(begin) + bytes) / kHugePage;
  if (last > first)
    madvise(reinterpret_cast<void*>(first * kHugePage), (last - first) * kHugePage, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

double measure_peak(Isa isa, Dtype dtype) {
  const Kernels& k = kernels(isa, dtype);
  double best = 0.0;
  for (int attempt = 0; attempt < 20; ++attempt) {
    const auto start = std::chrono::steady_clock::now();
    const double operations = k.peak(20000);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    k.finish();
    best = std::max(best, operations / seconds.count());
  }
  return best;
}

}  // namespace slimvit
