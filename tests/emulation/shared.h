// Shared memory that tells the block of each access, and the copies into it.
#pragma once

#include <cstddef>
#include <cstring>

#include "block.h"

struct uint4 {
  unsigned x, y, z, w;
};

namespace slimvit {

template <class T>
class Shared {
 public:
  class Value {
   public:
    explicit Value(std::size_t offset) : offset_(offset) {}
    operator T() const {
      emulation::note_read(offset_, sizeof(T));
      T value;
      std::memcpy(&value, emulation::memory() + offset_, sizeof(T));
      return value;
    }
    Value& operator=(T value) {
      emulation::note_write(offset_, sizeof(T));
      std::memcpy(emulation::memory() + offset_, &value, sizeof(T));
      return *this;
    }
    Value& operator=(const Value& other) { return *this = T(other); }

   private:
    std::size_t offset_;
  };

  explicit Shared(std::size_t offset) : offset_(offset) {}
  Value operator[](std::ptrdiff_t i) const { return Value(offset_ + i * sizeof(T)); }
  Shared operator+(std::ptrdiff_t i) const { return Shared(offset_ + i * sizeof(T)); }
  std::size_t offset() const { return offset_; }

 private:
  std::size_t offset_;
};

inline Shared<unsigned char> shared_memory() { return Shared<unsigned char>(0); }

template <class T>
Shared<T> carve(Shared<unsigned char>& at, int count) {
  const Shared<T> start(at.offset());
  at = at + (count * sizeof(T) + 31) / 32 * 32;
  return start;
}

template <class T>
uint4 load16(const T* at) {
  uint4 value;
  std::memcpy(&value, at, 16);
  return value;
}
template <class T>
uint4 load16(Shared<T> at) {
  emulation::note_read(at.offset(), 16);
  uint4 value;
  std::memcpy(&value, emulation::memory() + at.offset(), 16);
  return value;
}
template <class T>
void store16(T* at, uint4 value) {
  std::memcpy(at, &value, 16);
}
template <class T>
void store16(Shared<T> at, uint4 value) {
  emulation::note_write(at.offset(), 16);
  std::memcpy(emulation::memory() + at.offset(), &value, 16);
}

template <class T>
void store4(Shared<T> at, unsigned value) {
  emulation::note_write(at.offset(), 4);
  std::memcpy(emulation::memory() + at.offset(), &value, 4);
}

template <class T>
void copy16_async(Shared<T> to, const T* from, bool live) {
  emulation::copy_later(to.offset(), from, live);
}
inline void close_copies() { emulation::close_group(); }
template <int n>
void wait_copies() {
  emulation::finish_groups(n);
}

}  // namespace slimvit
