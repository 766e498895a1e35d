#include "tensor_cores.h"

#include <cmath>

namespace slimvit {
namespace emulation {

namespace {

float cut(double value) {
  float rounded = static_cast<float>(value);
  if (std::fabs(double(rounded)) > std::fabs(value)) rounded = std::nextafter(rounded, 0.0f);
  return rounded;
}

}  // namespace

float accumulate(float c, const float* a, const float* b, int stride_a, int stride_b) {
  const int group = architecture < 80 ? 4 : 8;
  for (int k = 0; k < 16; k += group) {
    double sum = c;
    for (int i = k; i < k + group; ++i) sum += double(a[i * stride_a]) * double(b[i * stride_b]);
    c = std::isfinite(sum) ? cut(sum) : float(sum);
  }
  return c;
}

}  // namespace emulation
}  // namespace slimvit
