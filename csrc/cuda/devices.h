#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace slimvit {

struct Device {
  std::string name;
  int major;  // of the compute capability
  int minor;
  std::size_t memory;  // bytes
};

// Why no device can be used, in the runtime's words; empty where at least one can.
std::string why_not();

// The devices that can be seen; empty where why_not() has a reason.
std::vector<Device> devices();

// Why a kernel of this build does not run on that device; empty where it does.
std::string probe(int device);

// CUDA versions as 1000 * major + 10 * minor; the driver's is 0 where there is none.
int driver_version();
int runtime_version();

// Such as 13.0 for 13000.
std::string dotted(int version);

}  // namespace slimvit
