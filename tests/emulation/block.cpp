#include "block.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

namespace slimvit {
namespace emulation {

int architecture = 80;
int shared_limit = 99 << 10;

namespace {

constexpr int kStack = 256 << 10;
constexpr int kNobody = -1, kMany = -2;

struct Copy {
  std::size_t offset;
  const void* from;
  bool live;
};

struct Fiber {
  ucontext_t context;
  dim3 index;
  int number;
  bool done = false;
  bool waits_for_block = false, waits_for_warp = false, waits_for_lanes = false;
  std::size_t counts = 0;  // that it took part in
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  int waiting = 0;  // at a warp barrier
  int epoch = 0;    // barriers passed
  int arrived = 0;  // at an instruction of the whole warp
  const char* instruction = "";
  void* brought[32];
};

// Who touched a half-word last, and after how many barriers of the block and of the warp.
struct Touch {
  int who = kNobody;
  int block_epoch = 0, warp_epoch = 0;
};
struct Cell {
  Touch write, read;
  bool in_flight = false;
};

struct Block {
  dim3 index, size;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> bytes;
  std::vector<Cell> cells;
  int waiting = 0, live = 0, epoch = 0;
  std::vector<int> counted;  // each time that threads were
  std::string error;
};

Block* block = nullptr;
Fiber* fiber = nullptr;
bool running = false;  // the fiber, not the scheduler
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
std::vector<char*> stacks;

Warp& warp() { return block->warps[fiber->number / 32]; }

void yield() { swapcontext(&fiber->context, &scheduler); }

std::string thread_name(int number) { return "thread " + std::to_string(number); }

// Whether a barrier lies between a touch and now, for that thread and this one.
bool ordered(const Touch& touch, int who) {
  if (touch.who == kNobody || touch.who == who || touch.block_epoch < block->epoch) return true;
  return touch.who != kMany && touch.who / 32 == who / 32 &&
         touch.warp_epoch < block->warps[who / 32].epoch;
}

Touch touch_by(int who) { return {who, block->epoch, block->warps[who / 32].epoch}; }

void start() {
  (*body)();
  fiber->done = true;
  yield();
}

void check(const char* what, std::size_t offset, int who, const Touch& before, const char* did) {
  if (ordered(before, who)) return;
  const std::string other = before.who == kMany ? "other threads" : thread_name(before.who);
  fail("race: " + thread_name(who) + " " + what + " byte " + std::to_string(offset) +
       " of shared memory, which " + other + " " + did + " with no barrier between");
}

void begin_write(std::size_t offset, std::size_t bytes, int who) {
  if (offset + bytes > block->bytes.size()) return fail("shared memory is written beyond its end");
  for (std::size_t at = offset / 2; at < (offset + bytes + 1) / 2; ++at) {
    Cell& cell = block->cells[at];
    if (cell.in_flight && cell.write.who != who) fail("race: a copy is written over under way");
    check("writes", 2 * at, who, cell.write, "wrote");
    check("writes", 2 * at, who, cell.read, "read");
    cell.write = touch_by(who);
    cell.read = Touch();
  }
}

void read(std::size_t offset, std::size_t bytes, int who) {
  if (offset + bytes > block->bytes.size()) return fail("shared memory is read beyond its end");
  for (std::size_t at = offset / 2; at < (offset + bytes + 1) / 2; ++at) {
    Cell& cell = block->cells[at];
    if (cell.write.who == kNobody) fail("shared memory is read that nothing wrote");
    if (cell.in_flight) fail("shared memory is read that a copy has yet to bring");
    check("reads", 2 * at, who, cell.write, "wrote");
    const Touch now = touch_by(who);
    Touch& last = cell.read;
    if (last.who == kNobody || last.block_epoch < now.block_epoch) {
      last = now;
    } else if (last.who != who) {
      const bool one_warp = last.who != kMany && last.who / 32 == who / 32;
      last = {one_warp ? who / 32 * 32 + (who + 1) % 32 : kMany, now.block_epoch, now.warp_epoch};
    }
  }
}

}  // namespace

void fail(const std::string& what) {
  if (block->error.empty()) block->error = what;
  if (running) yield();  // for ever: no thread goes on after an error
}

const dim3& thread_index() { return fiber->index; }
const dim3& block_index() { return block->index; }
const dim3& block_size() { return block->size; }
unsigned char* memory() { return block->bytes.data(); }

void barrier() {
  fiber->waits_for_block = true;
  ++block->waiting;
  yield();
}

int count(bool holds) {
  const std::size_t which = fiber->counts++;
  if (block->counted.size() <= which) block->counted.resize(which + 1);
  block->counted[which] += holds;
  barrier();
  return block->counted[which];
}

void warp_barrier() {
  fiber->waits_for_warp = true;
  ++warp().waiting;
  yield();
}

void together(const char* name, void* mine, const std::function<void(void* const*)>& all) {
  Warp& mates = warp();
  if (mates.arrived > 0 && std::strcmp(mates.instruction, name) != 0) {
    fail(std::string("lanes of a warp part: ") + mates.instruction + " and " + name);
  }
  mates.instruction = name;
  mates.brought[fiber->number % 32] = mine;
  if (++mates.arrived < 32) {
    fiber->waits_for_lanes = true;
    return yield();
  }
  mates.arrived = 0;
  all(mates.brought);
  const int first = fiber->number / 32 * 32;
  for (int lane = 0; lane < 32; ++lane) block->fibers[first + lane]->waits_for_lanes = false;
}

void note_read(std::size_t offset, std::size_t bytes) { read(offset, bytes, fiber->number); }
void note_read_by(int lane, std::size_t offset, std::size_t bytes) {
  read(offset, bytes, fiber->number / 32 * 32 + lane);
}
void note_write(std::size_t offset, std::size_t bytes) {
  begin_write(offset, bytes, fiber->number);
}

void copy_later(std::size_t offset, const void* from, bool live) {
  begin_write(offset, 16, fiber->number);
  for (std::size_t at = offset / 2; at < offset / 2 + 8; ++at) block->cells[at].in_flight = true;
  fiber->open.push_back({offset, from, live});
}

void close_group() {
  fiber->groups.push_back(std::move(fiber->open));
  fiber->open.clear();
}

void finish_groups(int but) {
  while (fiber->groups.size() > std::size_t(but)) {
    for (const Copy& copy : fiber->groups.front()) {
      for (std::size_t at = copy.offset / 2; at < copy.offset / 2 + 8; ++at) {
        block->cells[at].in_flight = false;
        block->cells[at].write = touch_by(fiber->number);
      }
      if (copy.live) {
        std::memcpy(memory() + copy.offset, copy.from, 16);
      } else {
        std::memset(memory() + copy.offset, 0, 16);
      }
    }
    fiber->groups.pop_front();
  }
}

namespace {

char* stack_of(int number) {
  while (int(stacks.size()) <= number) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[number];
}

void open_barriers() {
  if (block->waiting > 0 && block->waiting == block->live) {
    block->waiting = 0;
    ++block->epoch;
    for (auto& one : block->fibers) one->waits_for_block = false;
  }
  for (std::size_t w = 0; w < block->warps.size(); ++w) {
    Warp& mates = block->warps[w];
    if (mates.waiting < 32) continue;
    mates.waiting = 0;
    ++mates.epoch;
    for (int lane = 0; lane < 32; ++lane) block->fibers[32 * w + lane]->waits_for_warp = false;
  }
}

// Threads in turns, from the last to the first and back, so that order is nobody's friend.
void run_block(int threads) {
  for (int number = 0; number < threads; ++number) {
    auto one = std::make_unique<Fiber>();
    one->index = dim3(number, 0, 0);
    one->number = number;
    getcontext(&one->context);
    one->context.uc_stack.ss_sp = stack_of(number);
    one->context.uc_stack.ss_size = kStack;
    one->context.uc_link = nullptr;
    makecontext(&one->context, start, 0);
    block->fibers.push_back(std::move(one));
  }
  block->live = threads;
  for (int turn = 0; block->live > 0 && block->error.empty(); ++turn) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      Fiber& next = *block->fibers[turn % 2 == 0 ? threads - 1 - i : i];
      if (next.done || next.waits_for_block || next.waits_for_warp || next.waits_for_lanes)
        continue;
      fiber = &next;
      moved = true;
      running = true;
      swapcontext(&scheduler, &next.context);
      running = false;
      if (!block->error.empty()) return;
      if (next.done) {
        --block->live;
        if (!next.open.empty() || !next.groups.empty()) fail("a thread ends with copies under way");
      }
    }
    open_barriers();
    if (!moved && block->live > 0) {
      bool any = false;
      for (auto& one : block->fibers) {
        any |= !one->done && !one->waits_for_block && !one->waits_for_warp && !one->waits_for_lanes;
      }
      if (!any) fail("threads wait for each other for ever");
    }
  }
}

}  // namespace

void run(const char* name, const std::function<void()>& kernel, dim3 grid, int threads,
         int shared) {
  if (threads % 32 != 0 || threads > 1024 || threads == 0) {
    throw std::runtime_error(std::string(name) + ": a block of " + std::to_string(threads) +
                             " threads");
  }
  body = &kernel;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        Block now;
        now.index = dim3(x, y, z);
        now.size = dim3(threads);
        now.warps.resize(threads / 32);
        now.bytes.assign(shared, 0xff);
        now.cells.resize(shared / 2 + 1);
        block = &now;
        run_block(threads);
        block = nullptr;
        if (!now.error.empty()) throw std::runtime_error(std::string(name) + ": " + now.error);
      }
    }
  }
}

}  // namespace emulation
}  // namespace slimvit
