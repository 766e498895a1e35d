// A block's threads as fibers, which run in turns until they meet a barrier or an instruction of
// the whole warp. Shared memory starts as NaN and knows who wrote and read each half-word since
// which barrier: reading what nothing wrote, what another thread wrote with no barrier between, or
// what a copy has yet to bring is an error, and so is writing over it.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace slimvit {
namespace emulation {

// The thread that runs now.
const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();

unsigned char* memory();
void barrier();
// A barrier of the block, and for how many of its threads something holds.
int count(bool holds);
void warp_barrier();
// Runs `all` once the 32 lanes of the warp have come here, with what each brought.
void together(const char* name, void* mine, const std::function<void(void* const*)>& all);

// Of `bytes` of shared memory from `offset` on.
void note_read(std::size_t offset, std::size_t bytes);
void note_write(std::size_t offset, std::size_t bytes);
// A read by another lane of this warp, in its name.
void note_read_by(int lane, std::size_t offset, std::size_t bytes);

void copy_later(std::size_t offset, const void* from, bool live);
void close_group();
void finish_groups(int but);

// Ends the launch with an error.
void fail(const std::string& what);

void run(const char* name, const std::function<void()>& kernel, dim3 grid, int threads, int shared);

extern int architecture;
extern int shared_limit;

}  // namespace emulation
}  // namespace slimvit
