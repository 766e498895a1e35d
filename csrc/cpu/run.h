#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace slimvit {

// Divides the images of a call among `threads` OpenMP threads, and an image among several where
// there are fewer images than threads. Memory is kept for the next call. Any thread may call.
void run(const BlockCall& call, int threads);
void run(const SelectCall& call, int threads);
void run(NetworkCall call, int threads);

// Asks the system for huge pages within memory that nothing has touched yet; it may not have any.
void prefer_huge_pages(void* begin, std::int64_t bytes);

// Measured floating-point operations per second of one thread that only multiplies and adds.
double measure_peak(Isa isa, Dtype dtype);

}  // namespace slimvit
